"""A runner without a model: the next token is a function of the last one and its place. Knows no torch.

`scls-router mock-worker` draws by the same rule, so both can serve one pool and stand in for each other in the
conformance suite.
"""

import time
from collections.abc import Callable, Sequence

from .rows import Chunk

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


class MockRunner:
    def __init__(
        self,
        vocab: int,
        step_us: int = 0,
        prefill_us_per_token: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.vocab = vocab
        self.step_us = step_us
        self.prefill_us_per_token = prefill_us_per_token
        self.sleep = sleep

    def run(self, chunks: Sequence[Chunk]) -> list[int]:
        prefill = sum(chunk.size for chunk in chunks if chunk.size > 1)
        duration_us = self.step_us + prefill * self.prefill_us_per_token
        if duration_us > 0:
            self.sleep(duration_us / 1e6)
        return [
            next_token(int(row.tokens[row.known - 1]), row.known - 1, self.vocab)
            for row, _, _, draws in chunks
            if draws
        ]
