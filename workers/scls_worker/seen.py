"""The ids that a row's penalties weigh, counted. Knows neither logits nor penalties.

A function of the row's tokens alone, so it is the same in whatever slice, and at whatever worker, it is built.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class Seen:
    """Distinct ids in the order they came, and how often the output has had each: 0 where only the prompt has.

    What a token costs does not grow with the context, so a row keeps its `Seen` from one draw to the next.
    """

    def __init__(self, prompt: Iterable[int], capacity: int) -> None:
        """`capacity`: the most tokens that prompt and output can have."""
        self._place = {id_: place for place, id_ in enumerate(dict.fromkeys(prompt))}
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._times = np.zeros(capacity, dtype=np.float32)
        self._ids[: len(self._place)] = list(self._place)
        self._output_len = 0

    @property
    def ids(self) -> NDArray[np.int64]:  # [D]
        return self._ids[: len(self._place)]

    @property
    def times(self) -> NDArray[np.float32]:  # [D]
        return self._times[: len(self._place)]

    def follow(self, output: NDArray[np.uint32]) -> None:
        """Counts what the output has more than the last time."""
        for id_ in output[self._output_len :].tolist():
            place = self._place.setdefault(id_, len(self._place))
            self._ids[place] = id_
            self._times[place] += 1
        self._output_len = len(output)
