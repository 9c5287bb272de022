"""The engine benchmark's own arithmetic: the workload, and the bounds that shares are shares of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT / "bench/engine"))

from roofline import Limits, Shape, step_seconds, workload_bound
from workload import Request, refreshed, requests, totals

# Two layers of 10 weights and a head of 100, one head of width 1; numbers of 2 bytes.
SHAPE = Shape(layers=2, layer_weights=10, head_weights=100, heads=1, kv_heads=1, width=1, size=2)


def test_the_workload_is_the_one_that_figures_are_of() -> None:
    made = requests()
    assert totals(made) == (6391, 4987)
    assert (min(len(one.prompt) for one in made), max(one.output for one in made)) == (17, 256)
    assert made[0].prompt[:3] == [2376, 26914, 17562]


def test_a_later_turn_has_other_ids_of_the_same_lengths() -> None:
    first, later = refreshed(8, 0, 2000), refreshed(8, 3, 2000)
    assert [(len(one.prompt), one.output) for one in first] == [(len(one.prompt), one.output) for one in later]
    assert all(one.prompt[:4] != other.prompt[:4] for one, other in zip(first, later, strict=True))
    assert max(id_ for one in first + later for id_ in one.prompt) < 2000
    assert later == refreshed(8, 3, 2000)


def test_the_shape_of_a_folder_counts_its_weights(tmp_path: Path) -> None:
    sizes = '"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 32000'
    heads = '"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64'
    (tmp_path / "config.json").write_text(f"{{{sizes}, {heads}}}")
    shape = Shape.of(tmp_path, "bfloat16")
    assert shape.weight_bytes == 2 * 107_151_360
    assert shape.kv_bytes(1) == 12 << 10


def test_a_step_takes_what_takes_longer_reading_or_computing() -> None:
    # 2 layers, 10 weights each, and the head: 240 bytes; KV of 3 rows that see 5: 2 * 2 * 2 * 15 bytes
    assert step_seconds(SHAPE, Limits(bandwidth=1, peak=1e9), rows=3, context=5) == 240 + 120
    # 2 * 2 * 10 a token, 4 * 2 a token seen, 2 * 100 a token drawn
    assert step_seconds(SHAPE, Limits(bandwidth=1e9, peak=1), rows=3, context=5) == 3 * 40 + 15 * 8 + 3 * 200


def test_the_bound_of_a_workload_is_its_schedule_added_up() -> None:
    limits = Limits(bandwidth=1.0, peak=1e12)
    work = [Request([5] * 4, 3), Request([5] * 2, 2)]
    # together: a step of both rows that see 5 and 3, then one of the first alone that sees 6
    together = workload_bound(SHAPE, limits, work, places=2)
    assert together.seconds == pytest.approx((240 + 8 * 8) + (240 + 6 * 8))
    # one after the other: two steps of the first, then one of the second
    alone = workload_bound(SHAPE, limits, work, places=1)
    assert alone.seconds == pytest.approx((240 + 5 * 8) + (240 + 6 * 8) + (240 + 3 * 8))
    assert together.overlapped == pytest.approx(together.seconds)


def test_prefills_take_their_products_and_can_hide_behind_reading() -> None:
    limits = Limits(bandwidth=1.0, peak=1.0)
    bound = workload_bound(SHAPE, limits, [Request([5] * 3, 2)])
    prefill, step, read = 3 * 40 + 6 * 8 + 200, 40 + 4 * 8 + 200, 240 + 4 * 8
    assert bound.seconds == prefill + max(step, read)
    assert bound.overlapped == prefill + step


def test_a_part_that_is_measured_again_leaves_the_others() -> None:
    from run import beside

    old = {"steps": [1], "levels": [2], "goals": [{"goal": "a", "value": 1}, {"goal": "b", "value": 2}], "when": "then"}
    new = {"levels": [3], "goals": [{"goal": "b", "value": 4}]}
    assert beside(old, new) == {
        "steps": [1],
        "levels": [3],
        "goals": [{"goal": "a", "value": 1}, {"goal": "b", "value": 4}],
    }
