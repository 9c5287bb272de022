"""The work that every engine is given: 64 requests at once, prompts log-uniform from 16 to 512 tokens, outputs log-normal
from 8 to 256, greedy, an end token or not.

Of the standard library alone: rivals have environments of their own. Drawn by one generator in one order, so a count or a
seed names the same requests everywhere.
"""

from __future__ import annotations

import random
from typing import NamedTuple

VOCAB = 32_000
SEED = 7
COUNT = 64
# Ids below these are the pad, begin and end tokens of most vocabularies.
FIRST_ID = 3


class Request(NamedTuple):
    prompt: list[int]
    output: int  # tokens to draw


def requests(count: int = COUNT, seed: int = SEED, vocab: int = VOCAB) -> list[Request]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = round(16 * (512 / 16) ** draw.random())
        output = int(min(256, max(8, draw.lognormvariate(4.2, 0.9))))
        made.append(Request([draw.randrange(FIRST_ID, vocab) for _ in range(prompt)], output))
    return made


def totals(made: list[Request]) -> tuple[int, int]:
    """Prompt and output tokens."""
    return sum(len(one.prompt) for one in made), sum(one.output for one in made)


def refreshed(count: int, turn: int, vocab: int) -> list[Request]:
    """The requests, after the first turn with other ids: an engine that keeps prefixes finds none of an earlier turn."""
    made = requests(count, vocab=vocab)
    if turn == 0:
        return made
    draw = random.Random(turn)
    return [Request([draw.randrange(FIRST_ID, vocab) for _ in one.prompt], one.output) for one in made]
