"""Draws: greedy, by temperature, masked; counter-based, so that nothing but seed and token index decides."""

import math
from itertools import pairwise

import pytest
from scls_worker.mock import splitmix64
from scls_worker.rows import Draw

torch = pytest.importorskip("torch")
sampling = pytest.importorskip("scls_worker.sampling")
Want = sampling.Want


def draw(logits: list[list[float]], *wants: object) -> list[int]:
    return [drawn.token for drawn in sampling.draw_tokens(torch.tensor(logits), list(wants))]


def test_greedy() -> None:
    assert draw([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]], Want(Draw(), 0), Want(Draw(), 9)) == [1, 0]


def test_forbidden_ids_before_min_tokens() -> None:
    rule = Draw(min_tokens=3, forbidden=(1,))
    assert [draw([[0.0, 3.0, 1.0]], Want(rule, place))[0] for place in range(5)] == [2, 2, 2, 1, 1]
    warm = Draw(temperature=5.0, seed=1, min_tokens=100, forbidden=(1,))
    assert 1 not in {draw([[0.0, 3.0, 1.0]], Want(warm, place))[0] for place in range(99)}


def test_frequencies_follow_the_softmax() -> None:
    logits, heat, count = [2.0, 1.0, 0.0, -1.0], 0.7, 4000
    weights = [math.exp(x / heat) for x in logits]
    drawn = draw([logits] * count, *(Want(Draw(temperature=heat, seed=11), place) for place in range(count)))
    for id_, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(drawn.count(id_) / count - p) < 4 * math.sqrt(p * (1 - p) / count), id_


def test_neighbours_are_independent() -> None:
    """Places and seeds one apart draw as if they had nothing to do with each other."""
    logits, count = [0.0, 0.0], 4000
    by_place = draw([logits] * count, *(Want(Draw(temperature=1.0, seed=3), i) for i in range(count)))
    by_seed = draw([logits] * count, *(Want(Draw(temperature=1.0, seed=i), 3) for i in range(count)))
    for drawn in (by_place, by_seed):
        same = sum(a == b for a, b in pairwise(drawn)) / count
        assert abs(same - 0.5) < 0.04 and abs(sum(drawn) / count - 0.5) < 0.04


def test_a_row_draws_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 1000).tolist()
    wants = [Want(Draw(temperature=t, seed=2**64 - 1 - i), 7 * i) for i, t in enumerate((0.5, 0.0, 1.0, 2.0, 0.9))]
    together = draw(logits, *wants)
    assert together == [draw([row], want)[0] for row, want in zip(logits, wants, strict=True)]
    assert together == draw(logits[::-1], *wants[::-1])[::-1]


def test_tiny_temperatures_are_greedy() -> None:
    assert draw([[1.0, 1.5, -3.0]] * 50, *(Want(Draw(temperature=1e-30, seed=i), i) for i in range(50))) == [1] * 50


def test_the_integer_hash_is_splitmix64() -> None:
    values = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 123456789]
    ours = sampling._splitmix64(torch.tensor([sampling._signed(x) for x in values])).tolist()
    assert [x % 2**64 for x in ours] == [splitmix64(x) for x in values]


def test_pinned() -> None:
    """The rule is part of the contract between versions: a row moved to a newer worker draws on alike."""
    logits = [[math.sin(i) for i in range(64)]]
    drawn = [draw(logits, Want(Draw(temperature=1.0, seed=42), place))[0] for place in range(8)]
    assert drawn == [21, 51, 21, 7, 57, 6, 26, 16]
