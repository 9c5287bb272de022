"""Draws one token a row from logits. Counter-based: a function of logits, seed, token index and vocabulary id alone, so
a row draws the same in every slice length, batch and worker that computes the same logits. Knows no rows.

Greedy is an argmax. A temperature draws by the Gumbel-max trick, as an exponential race: the id with the smallest
`e / p` wins, `e` exponentially distributed. The random bits are integer arithmetic, equal on every device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .mock import splitmix64
from .rows import Draw

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Want(NamedTuple):
    """One row's draw: how, and the place in its output of the token to come."""

    draw: Draw
    place: int


def draw_tokens(logits: Tensor, wants: Sequence[Want]) -> Tensor:  # [N, V], N -> [N]
    logits = logits.float()
    for i, (draw, place) in enumerate(wants):
        if place < draw.min_tokens and draw.forbidden:
            logits[i, list(draw.forbidden)] = -torch.inf
    warm = [i for i, want in enumerate(wants) if want.draw.temperature > 0]
    if not warm:
        return logits.argmax(-1)
    keys = [_signed(row_key(want.draw.seed, want.place)) for want in wants]
    race = _race(torch.tensor([keys[i] for i in warm], device=logits.device), logits.shape[-1])  # [W, V]
    heat = torch.tensor([wants[i].draw.temperature for i in warm], device=logits.device)[:, None]
    picked = logits[warm]
    # Relative to the best, so that a small temperature cannot overflow to a tie of infinities.
    picked = (picked - picked.amax(-1, keepdim=True)) / heat
    scores = logits
    scores[warm] = picked - race.log()
    return scores.argmax(-1)


def row_key(seed: int, place: int) -> int:
    return splitmix64((splitmix64(seed) + place) & 0xFFFFFFFFFFFFFFFF)


def _race(keys: Tensor, vocab: int) -> Tensor:  # [W] -> [W, V]
    """Exponential variates, one for each row and id."""
    ids = torch.arange(vocab, device=keys.device)
    bits = _splitmix64(keys[:, None] + ids[None, :])
    # 63 bits, never 0. The small values decide who wins: as a float of its own exponent each keeps 24 good bits.
    uniform = (_shift(bits, 1) | 1).float() * 2.0**-63
    return -torch.log1p(-uniform)


def _splitmix64(x: Tensor) -> Tensor:
    """`mock.splitmix64` on int64, which wraps the same way."""
    x = x + _signed(_GAMMA)
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right that brings in zeros; torch's brings in the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
