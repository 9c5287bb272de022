"""Natural logarithms of the model's own probabilities: log_softmax of its logits as they come, in float32.

Knows nothing of how tokens are drawn.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from scls_router.proto import common_pb2 as common
from torch import Tensor


class Logprobs(NamedTuple):
    """Of the rows that ask for them. Taken before the draw, which writes to the logits."""

    asked: Sequence[int | None]  # N; how many of the most likely, or None
    rows: list[int]  # the A that ask
    values: Tensor  # [A, V]

    @classmethod
    def of(cls, logits: Tensor, asked: Sequence[int | None]) -> "Logprobs":  # [N, V], N
        rows = [i for i, top in enumerate(asked) if top is not None]
        return cls(asked, rows, logits[rows].log_softmax(-1) if rows else logits[:0])

    def told(self, tokens: Tensor) -> Iterator[common.TokenLogprobs | None]:  # [N] -> N
        """As messages, in the order of `tokens`."""
        if not self.rows:
            yield from (None for _ in self.asked)
            return
        most = min(max(top or 0 for top in self.asked), self.values.shape[-1])
        ids = ranked(self.values, most)  # [A, most]
        chosen = self.values.gather(-1, tokens[self.rows][:, None])
        told = zip(ids.tolist(), self.values.gather(-1, ids).tolist(), chosen[:, 0].tolist(), strict=True)
        for top in self.asked:
            if top is None:
                yield None
            else:
                top_ids, best, own = next(told)
                yield common.TokenLogprobs(chosen=own, top_ids=top_ids[:top], top=best[:top])


def ranked(values: Tensor, count: int) -> Tensor:  # [N, V] -> [N, count]
    """Ids of the largest values, best first; of equals the lower id first, which `torch.topk` and `torch.sort` leave
    open. No value is above 0.

    Each value and its id become one integer, so no two are equal: the bits of a float without its sign are in the order
    of its size.
    """
    keys = values.abs().view(torch.int32).long()
    keys = keys.bitwise_left_shift_(32).bitwise_or_(torch.arange(values.shape[-1], device=values.device))
    return keys.topk(count, largest=False).values & 0xFFFFFFFF
