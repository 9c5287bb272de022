"""Draws: greedy, by temperature, masked; counter-based, so that nothing but seed and token index decides. What is
told of their probabilities. The steps before a draw are held against transformers in test_processors.py.
"""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scls_worker.mock import splitmix64
from scls_worker.rows import Draw
from scls_worker.seen import Seen

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


def test_choices_of_one_request_do_not_share_random_numbers() -> None:
    """Choice i draws with seed + i: no (seed, place) may meet another's, nor come so near that vocabularies overlap."""
    for first in (0, 2**64 - 32):
        keys = sorted(sampling.row_key((first + i) % 2**64, place) for i in range(64) for place in range(512))
        assert min(b - a for a, b in pairwise(keys)) > 2**18
    logits = [[0.0] * 50]
    one, two = ([draw(logits, Want(Draw(1.0, seed), place))[0] for place in range(200)] for seed in (7, 8))
    for shift in range(-3, 4):
        same = sum(a == b for a, b in zip(one[3:-3], two[3 + shift :], strict=False))
        assert same < 20, shift  # 4 of 194 by chance


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


# ---------------------------------------------------------------- with all that Sampling has


FULL = Draw(
    temperature=0.8,
    seed=5,
    top_k=6,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias=((1, 1.5), (4, -1.0)),
    min_tokens=10**6,
    forbidden=(0,),
)


def seen(prompt: list[int], output: list[int]) -> Seen:
    counted = Seen(prompt, len(prompt) + len(output))
    counted.follow(np.array(output, dtype=np.uint32))
    return counted


def test_draws_follow_the_distribution_that_the_steps_leave() -> None:
    """Chi-square, for a fixed seed: 4,000 places of one row whose tokens stay as they are."""
    logits, count = torch.tensor([2.0, 1.0, 0.5, 0.1, 0.9, -0.8, 1.5, -6.0]), 4000
    prompt, output = [6, 6, 3], [1, 1, 2]
    # By hand, in the contract's order.
    scores = logits.double().clone()
    scores[0] = -math.inf
    scores[1] += 1.5
    scores[4] -= 1.0
    for id_ in {*prompt, *output}:
        scores[id_] = scores[id_] * 1.3 if scores[id_] < 0 else scores[id_] / 1.3
    scores[1] -= 2 * 0.3 + 0.4
    scores[2] -= 1 * 0.3 + 0.4
    scores /= 0.8
    scores[scores < scores.topk(6).values[-1]] = -math.inf
    best = scores.softmax(-1).sort(descending=True)
    nucleus = int((best.values.cumsum(-1) < 0.9).sum()) + 1
    scores[best.indices[nucleus:]] = -math.inf
    p = scores.softmax(-1)
    p[p < 0.05 * p.max()] = 0
    p /= p.sum()

    want = [Want(FULL, place, seen(prompt, output)) for place in range(count)]
    drawn = draw([logits.tolist()] * count, *want)
    times = torch.bincount(torch.tensor(drawn), minlength=8)
    assert not times[p == 0].any() and 2 < (p > 0).sum() < 8
    kept = p > 0
    chi2 = float(((times[kept] - count * p[kept]) ** 2 / (count * p[kept])).sum())
    assert chi2 < 20  # of 3 to 5 degrees of freedom: p < 0.002


bits = st.integers(0, 2**64 - 1)
some_draws = st.builds(
    Draw,
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    seed=bits,
    top_k=st.sampled_from([0, 1, 20]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((3, 2.0),)]),
    logprobs=st.sampled_from([None, 0, 3, 20]),
    min_tokens=st.just(5),
    forbidden=st.sampled_from([(), (1, 2)]),
)
ids = st.lists(st.integers(0, 299), max_size=20)
some_rows = st.tuples(some_draws, ids, ids, st.integers(0, 2**32))


@settings(max_examples=100, deadline=None)
@given(st.lists(some_rows, min_size=2, max_size=6), st.randoms())
def test_no_row_depends_on_the_rows_beside_it(rows: list[Any], random: Any) -> None:
    def run(rows: list[Any]) -> list[Any]:
        logits = torch.stack([torch.randn(300, generator=torch.Generator().manual_seed(row[3])) for row in rows])
        wants = [
            Want(draw, len(output), seen(prompt, output) if draw.penalises else None)
            for draw, prompt, output, _ in rows
        ]
        return sampling.draw_tokens(logits, wants)

    together = run(rows)
    assert together == [run([row])[0] for row in rows]
    order = random.sample(range(len(rows)), len(rows))
    assert run([rows[i] for i in order]) == [together[i] for i in order]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda() -> None:
    """The same draws as on the CPU, alone and together. Of logits that are not near a tie."""
    logits = torch.randn(16, 32000, generator=torch.Generator().manual_seed(3)) * 3
    rules = [dataclasses.replace(FULL, seed=i, temperature=i % 3 / 2, top_k=i % 2 * 50, logprobs=5) for i in range(16)]
    wants = [Want(rule, i, seen(list(range(500)), [i, 7, 7])) for i, rule in enumerate(rules)]
    expected = sampling.draw_tokens(logits.clone(), wants)
    together = sampling.draw_tokens(logits.cuda(), wants)
    alone = [sampling.draw_tokens(logits[i : i + 1].cuda(), wants[i : i + 1])[0] for i in range(16)]
    for drawn in (together, alone):
        assert [one.token for one in drawn] == [one.token for one in expected]
        assert [one.logprobs.top_ids for one in drawn] == [one.logprobs.top_ids for one in expected]


def test_values_at_the_ends_of_their_ranges_draw_something_allowed() -> None:
    """No overflow lets through what is forbidden."""
    most = float(np.finfo(np.float32).max)
    counted = seen([1, 2], [0, 1, 2, 2])
    for repetition in (1e-45, most):
        for penalty in (-most, most):
            for heat in (0.0, 1e-45, most):
                rule = Draw(
                    temperature=heat,
                    top_p=1e-45,
                    min_p=1e-45,
                    repetition_penalty=repetition,
                    presence_penalty=penalty,
                    frequency_penalty=penalty,
                    logit_bias=((0, most), (3, -most)),
                    min_tokens=9,
                    forbidden=(0, 2),
                )
                (token,) = draw([[3.0, -1.0, 2.0, 0.5]], Want(rule, 4, counted))
                assert token in (1, 3), rule


def test_seen_counts_what_came_since() -> None:
    counted = Seen([7, 9, 7], capacity=8)
    output = np.array([9, 4, 4, 9, 4], dtype=np.uint32)
    for end in (0, 1, 1, 3, 5):
        counted.follow(output[:end])
    assert dict(zip(counted.ids.tolist(), counted.times.tolist(), strict=True)) == {7: 0, 9: 2, 4: 3}


# ---------------------------------------------------------------- logprobs


def test_logprobs_are_the_models_own_for_rows_that_ask() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 500) * 4
    raw = logits.double().log_softmax(-1)
    loud = Draw(temperature=2.0, seed=1, top_k=3, logit_bias=((17, 100.0),), forbidden=(1,), min_tokens=9, logprobs=4)
    wants = [Want(Draw(), 0), Want(Draw(logprobs=0), 0), Want(loud, 0), Want(Draw(logprobs=20), 0)]
    drawn = sampling.draw_tokens(logits.clone(), wants)
    assert drawn[0].logprobs is None and drawn[2].token == 17
    for i, top in ((1, 0), (2, 4), (3, 20)):
        told = drawn[i].logprobs
        assert told.chosen == pytest.approx(raw[i, drawn[i].token].item(), abs=1e-5)
        best = raw[i].topk(top)
        assert list(told.top_ids) == best.indices.tolist()
        assert list(told.top) == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_lower_id_is_told_first_where_two_are_equal() -> None:
    logits = [[1.0, 2.0, 2.0, -0.0, 0.0, 2.0, 1.0]] * 3
    drawn = sampling.draw_tokens(torch.tensor(logits), [Want(Draw(logprobs=k), 0) for k in (2, 5, 20)])
    assert [list(one.logprobs.top_ids) for one in drawn] == [[1, 2], [1, 2, 5, 0, 6], [1, 2, 5, 0, 6, 3, 4]]
    flat = sampling.draw_tokens(torch.zeros(1, 9000), [Want(Draw(logprobs=20), 0)])[0]
    assert list(flat.logprobs.top_ids) == list(range(20))


def test_half_precision_is_raised_before_anything_is_computed() -> None:
    torch.manual_seed(2)
    logits = (torch.randn(1, 400) * 3).bfloat16()
    (drawn,) = sampling.draw_tokens(logits.clone(), [Want(Draw(logprobs=1), 0)])
    assert drawn.logprobs.chosen == pytest.approx(float(logits.double().log_softmax(-1)[0, drawn.token]), abs=1e-6)
