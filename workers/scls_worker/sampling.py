"""Draws one token a row from logits. Counter-based: a function of logits, the row's own tokens, seed, token index and
vocabulary id alone, so a row draws the same in every slice length, batch and worker that computes the same logits.
Knows no rows.

The steps, in this order: `min_tokens`, `logit_bias`, repetition, presence and frequency penalty, temperature, `top_k`,
`top_p`, `min_p`, draw. What they mean is transformers' (its logits processors), and OpenAI's for presence and frequency.
A step touches only the rows that ask for it.

Greedy is an argmax. A temperature draws by the Gumbel-max trick, as an exponential race: the id with the smallest
`e / p` wins, `e` exponentially distributed. The random bits are integer arithmetic, equal on every device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .logprobs import Logprobs, ranked
from .mock import splitmix64
from .rows import Draw, Drawn
from .seen import Seen

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MOST = torch.finfo(torch.float32).max
# Best ids that top_p looks at before it looks at all: most nuclei are far smaller, and to sort a vocabulary is slow.
NUCLEUS = 1024


class Want(NamedTuple):
    """One row's draw: how, the place in its output of the token to come, and what its penalties weigh."""

    draw: Draw
    place: int
    seen: Seen | None = None


def draw_tokens(logits: Tensor, wants: Sequence[Want]) -> list[Drawn]:  # [N, V], N
    """May write to `logits`. Rows that penalise come with their `seen`."""
    logits = logits.float().contiguous()
    logprobs = Logprobs.of(logits, [want.draw.logprobs for want in wants])
    adjust(logits, wants)
    warm = [i for i, want in enumerate(wants) if want.draw.temperature > 0]
    if warm:
        scores = filtered(logits[warm], [wants[i].draw for i in warm])
        keys = torch.tensor([_signed(row_key(wants[i].draw.seed, wants[i].place)) for i in warm], device=logits.device)
        logits[warm] = scores - _race(keys, logits.shape[-1]).log()
    tokens = logits.argmax(-1)  # the lowest of equals
    return [Drawn(*drawn) for drawn in zip(tokens.tolist(), logprobs.told(tokens), strict=True)]


def draw_plainly(logits: Tensor, seeds: Tensor, places: Tensor, heat: Tensor) -> Tensor:  # [N, V], N, N, [N, 1] -> [N]
    """What `draw_tokens` draws for rows with a temperature (0: greedy) and nothing else, of numbers that lie on the device.
    `seeds` are hashed once, as `row_key` does.
    """
    logits = logits.float()
    scores = (logits - logits.amax(-1, keepdim=True)) / (heat + (heat == 0))
    warm = scores - _race(_splitmix64(seeds + places), logits.shape[-1]).log()
    return torch.where(heat > 0, warm, logits).argmax(-1)


def seed_key(seed: int) -> int:
    """The half of `row_key` that is the same for all of a row's tokens, as an int64."""
    return _signed(splitmix64(seed))


# ---------------------------------------------------------------- single ids of single rows


def adjust(logits: Tensor, wants: Sequence[Want]) -> None:  # [N, V], N
    """All that comes before the temperature, in place."""
    _forbid(logits, wants)
    _bias(logits, wants)
    _penalise(logits, wants)


def _forbid(logits: Tensor, wants: Sequence[Want]) -> None:
    forbidden = [(i, want.draw.forbidden) for i, want in enumerate(wants) if want.place < want.draw.min_tokens]
    if forbidden:
        logits.view(-1)[_places(logits, forbidden)] = -torch.inf


def _bias(logits: Tensor, wants: Sequence[Want]) -> None:
    biased = [(i, want.draw.logit_bias) for i, want in enumerate(wants) if want.draw.logit_bias]
    if biased:
        at = _places(logits, [(i, [id_ for id_, _ in bias]) for i, bias in biased])
        logits.view(-1)[at] += torch.tensor([x for _, bias in biased for _, x in bias], device=logits.device)


def _penalise(logits: Tensor, wants: Sequence[Want]) -> None:
    """One gather and one scatter of the ids that all rows have seen."""
    rows = [(i, want.draw, want.seen) for i, want in enumerate(wants) if want.seen is not None]
    if not rows:
        return
    at = _places(logits, [(i, seen.ids) for i, _, seen in rows])  # [D]
    times = torch.from_numpy(np.concatenate([seen.times for _, _, seen in rows])).to(logits.device)
    knobs = [(draw.repetition_penalty, draw.presence_penalty, draw.frequency_penalty) for _, draw, _ in rows]
    lengths = torch.tensor([len(seen.ids) for _, _, seen in rows], device=logits.device)
    spread = torch.tensor(knobs, device=logits.device).repeat_interleave(lengths, 0, output_size=len(at))
    repetition, presence, frequency = spread.unbind(-1)
    flat = logits.view(-1)
    had = flat[at]
    had = torch.where(had < 0, had * repetition, had / repetition)
    # Finite, so that what is forbidden stays so: two infinities can make a NaN.
    had -= (times * frequency).clamp(-_MOST, _MOST)
    had -= (times > 0) * presence
    flat[at] = had.clamp(max=_MOST)


def _places(logits: Tensor, ids: Sequence[tuple[int, Sequence[int] | np.ndarray]]) -> Tensor:
    """Where ids of rows stand in `logits` laid flat."""
    vocab = logits.shape[-1]
    flat = np.concatenate([row * vocab + np.asarray(of_row, dtype=np.int64) for row, of_row in ids])
    return torch.from_numpy(flat).to(logits.device)


# ---------------------------------------------------------------- whole rows


def filtered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:  # [W, V], W -> [W, V]
    """Logits over temperature, relative to the best, and -inf where a filter leaves an id out."""
    # Relative, so that a small temperature cannot overflow to a tie of infinities.
    heat = _column([draw.temperature for draw in draws], logits)
    scores = (logits - logits.amax(-1, keepdim=True)) / heat
    if rows := [i for i, draw in enumerate(draws) if 0 < draw.top_k < scores.shape[-1]]:
        scores[rows] = keep_top_k(scores[rows], [draws[i].top_k for i in rows])
    if rows := [i for i, draw in enumerate(draws) if draw.top_p < 1]:
        scores[rows] = keep_top_p(scores[rows], [draws[i].top_p for i in rows])
    if rows := [i for i, draw in enumerate(draws) if draw.min_p > 0]:
        scores[rows] = keep_min_p(scores[rows], [draws[i].min_p for i in rows])
    return scores


def keep_top_k(scores: Tensor, top_k: Sequence[int]) -> Tensor:  # [M, V], M -> [M, V]
    """The k best, and all that equal the last of them. k is from 1 to V."""
    best = scores.topk(max(top_k)).values
    last = best.gather(-1, _column(top_k, scores, torch.int64) - 1)
    return scores.masked_fill(scores < last, -torch.inf)


def keep_top_p(scores: Tensor, top_p: Sequence[float]) -> Tensor:  # [M, V], M -> [M, V]
    """The fewest best that have `top_p` of the probability; of equals, the lower ids. One is always left.

    `scores` are relative to the best. Probabilities are added as integers: a sum of floats depends on its order, and
    that on the device and on the batch.
    """
    weights = (scores.double().exp() * 2.0**40).round().long()  # 2**23 of them would still fit in 63 bits
    total = weights.sum(-1, keepdim=True)
    spare = (1 - _column(top_p, scores, torch.float64)) * total
    vocab = scores.shape[-1]
    for width in (min(NUCLEUS, vocab), vocab):
        ids = ranked(scores, width)  # [M, width]
        own = weights.gather(-1, ids)
        left = total - own.cumsum(-1)  # behind each
        if bool((left[:, -1:] <= spare).all()):
            break
    kept = left + own > spare
    kept[:, 0] = True
    return scores.masked_fill(~torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ids, kept), -torch.inf)


def keep_min_p(scores: Tensor, min_p: Sequence[float]) -> Tensor:  # [M, V], M -> [M, V]
    """Those with at least `min_p` times the probability of the best. `scores` are relative to the best."""
    return scores.masked_fill(scores < _column([math.log(p) for p in min_p], scores), -torch.inf)


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:  # N -> [N, 1]
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


# ---------------------------------------------------------------- random bits


def row_key(seed: int, place: int) -> int:
    """Hashed before the place is added: choices of a request have seeds side by side."""
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
