"""A runner without a model: the next token is a function of the last one and its place, whatever `Sampling` asks for.
Knows no torch.

`scls-router mock-worker` draws by the same rule, so both can serve one pool and stand in for each other in the
conformance suite.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from scls_router.proto import common_pb2 as common

from .rows import Chunk, Drawn, Row

# Ids below are left to a tokenizer's special tokens. An eos is never drawn: mock rows end by length or a stop id.
FIRST_ID = 3
EOS_ID = 2
_MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def next_token(token: int, position: int, vocab: int) -> int:
    """The id after `token`, which stands at `position` of prompt and output together."""
    return FIRST_ID + splitmix64((token << 32) | position) % (vocab - FIRST_ID)


def next_logprobs(token: int, top: int, vocab: int) -> common.TokenLogprobs:
    """As if each id were half as likely as the one before, beginning with `token`."""
    ranks = range(min(top, vocab))
    return common.TokenLogprobs(
        chosen=-math.log(2),
        top_ids=[(token + rank) % vocab for rank in ranks],
        top=[-(rank + 1) * math.log(2) for rank in ranks],
    )


class MockRunner:
    def __init__(
        self,
        vocab: int,
        step_us: int = 0,
        prefill_us_per_token: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        padded: bool = False,
    ) -> None:
        self.vocab = vocab
        self.step_us = step_us
        self.prefill_us_per_token = prefill_us_per_token
        self.sleep = sleep
        self.padded = padded

    def run(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        duration_us = self.step_us + self._prefilled(chunks) * self.prefill_us_per_token
        if duration_us > 0:
            self.sleep(duration_us / 1e6)
        return [self._draw(chunk.row) for chunk in chunks if chunk.draws]

    def cost(self) -> dict[str, Any] | None:
        """Its cost model, as `scls_router.CostModel.to_dict` gives one: exactly what it sleeps. None: it does not."""
        if not self.step_us and not self.prefill_us_per_token:
            return None
        step, prefilled = self.step_us / 1e6, self.prefill_us_per_token / 1e6
        exact = {"r2": 1.0, "mean_error": 0.0, "p99_error": 0.0}
        if self.padded:
            nothing = {"per_row": 0.0, "per_position": 0.0, "per_cell": 0.0}
            passes = {"prefill": {**nothing, "constant": step, "per_cell": prefilled}}
            return {"shape": "padded", **passes, "step": {**nothing, "constant": step}, **exact}
        prefill = {"constant": 0.0, "per_token": prefilled, "per_pair": 0.0}
        return {
            "shape": "paged",
            "prefill": prefill,
            "step": {"constant": step, "per_row": 0.0, "per_context": 0.0},
            **exact,
        }

    def _prefilled(self, chunks: Sequence[Chunk]) -> int:
        """Tokens, or cells of the rectangle."""
        sizes = [chunk.size for chunk in chunks if chunk.row.wants_prefill and not chunk.row.finish]
        if self.padded:
            return len(chunks) * max(sizes, default=0)
        return sum(sizes)

    def _draw(self, row: Row) -> Drawn:
        token = next_token(int(row.tokens[row.known - 1]), row.known - 1, self.vocab)
        top = row.draw.logprobs
        return Drawn(token, None if top is None else next_logprobs(token, top, self.vocab))
