"""The batcher against all partitions, the offloader against all assignments, of few rows."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scls_router import Batcher, CostModel, Offloader, RowTooLong

coefficient = st.sampled_from([0.0, 1e-6, 1e-4, 3e-3])
four = st.tuples(*[coefficient] * 4)


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    first, *rest = rows
    for of_rest in partitions(rest):
        yield [[first], *of_rest]
        for at, part in enumerate(of_rest):
            yield [*of_rest[:at], [first, *part], *of_rest[at + 1 :]]


@given(four, four, st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 64))
def test_no_partition_takes_less(
    prefill: tuple[float, ...], step: tuple[float, ...], lengths: list[int], max_rows: int, slice_len: int
) -> None:
    model = CostModel.padded(prefill=prefill, step=step)  # type: ignore[arg-type]
    capacity = 2 * (max(lengths) + slice_len)
    batches = Batcher(model, capacity, max_rows, slice_len).split(lengths)

    def seconds(rows: list[int]) -> float:
        longest = max(lengths[row] for row in rows)
        if len(rows) > max_rows or len(rows) * (longest + slice_len - 1) > capacity:
            return float("inf")
        return model.slice(rows=len(rows), longest=longest, steps=slice_len)

    best = min(sum(map(seconds, parts)) for parts in partitions(list(range(len(lengths)))))
    assert sum(batch.seconds for batch in batches) == pytest.approx(best, abs=2e-6)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for batch in batches:
        assert batch.longest == max(lengths[row] for row in batch.rows)
        assert batch.ceiling == len(batch.rows) * (batch.longest + slice_len - 1) <= capacity


@given(st.lists(st.floats(0, 100), max_size=7), st.integers(1, 3))
def test_the_last_worker_is_done_within_grahams_bound(seconds: list[float], workers: int) -> None:
    offloader = Offloader(workers)
    assigned = offloader.assign(seconds)
    loads = [0.0] * workers
    for worker, time in zip(assigned, seconds, strict=True):
        loads[worker] += time
    assert offloader.loads == pytest.approx(loads, abs=1e-5)
    best = min(
        max(sum(time for time, at in zip(seconds, to, strict=True) if at == worker) for worker in range(workers))
        for to in itertools.product(range(workers), repeat=len(seconds))
    )
    assert max(loads) <= (4 / 3 - 1 / (3 * workers)) * best + 1e-5
    for worker, time in zip(assigned, seconds, strict=True):
        offloader.done(worker, time)
    assert offloader.loads == [0.0] * workers


MODEL = CostModel.padded(prefill=(3e-3, 0, 0, 1e-4), step=(3e-3, 5e-5, 0, 1e-6))


def test_lengths_come_in_any_sequence() -> None:
    batcher = Batcher(MODEL, 16_000, 8, 32)
    lengths = [900, 20, 1000, 30]
    expected = batcher.split(lengths)
    for lengths_as in (
        tuple(lengths),
        np.array(lengths),
        np.array(lengths, np.uint16),
        array("q", lengths),
        iter(lengths),
    ):
        assert batcher.split(lengths_as) == expected
    assert batcher.split([]) == []
    assert expected[0]._replace(seconds=0) == ((1, 3), 30, 0, 122)


def test_memory_is_counted_in_whole_blocks() -> None:
    (batch,) = Batcher(MODEL, 1000, 8, 32, block_size=16).split([30])
    assert batch.ceiling == 64, "61 tokens are four blocks"


def test_the_plain_cuts() -> None:
    batcher = Batcher(MODEL, 16_000, 8, 32)
    lengths = [900, 20, 1000, 30]
    assert [batch.rows for batch in batcher.in_order(lengths, 3)] == [(0, 1, 2), (3,)]
    assert [batch.rows for batch in batcher.by_length(lengths, 3)] == [(1, 3, 0), (2,)]
    few = Batcher(MODEL, 2100, 8, 32)
    assert [batch.rows for batch in few.in_order(lengths, 3)] == [(0, 1), (2, 3)], "no more than fit"


def test_a_paged_worker_packs() -> None:
    model = CostModel.paged(
        prefill_constant=0,
        prefill_per_token=1e-4,
        prefill_per_pair=0,
        step_constant=3e-3,
        step_per_row=0,
        step_per_context=0,
    )
    batches = Batcher(model, 1000, 64, 32).split([100] * 14)
    assert [len(batch.rows) for batch in batches] == [7, 7]
    assert all(batch.ceiling <= 1000 for batch in batches)


def test_what_makes_no_sense_is_an_error() -> None:
    batcher = Batcher(MODEL, 1000, 8, 32)
    for cut in (
        batcher.split,
        lambda lengths: batcher.in_order(lengths, 4),
        lambda lengths: batcher.by_length(lengths, 4),
    ):
        with pytest.raises(RowTooLong, match=r"row 1 .* 970 tokens\na worker holds 1000 tokens"):
            cut([5, 970])
    with pytest.raises(OverflowError):
        batcher.split([-1])
    with pytest.raises(TypeError, match="got a str"):
        batcher.split("12")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        batcher.split([1.5])  # type: ignore[list-item]
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Batcher(MODEL, *sizes)
    with pytest.raises(ValueError, match="block_size"):
        Batcher(MODEL, 1, 1, 1, block_size=0)
    with pytest.raises(ValueError, match="at least 1"):
        Offloader(0)
    with pytest.raises(IndexError, match="3"):
        Offloader(3).done(3, 1.0)
    for time in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            Offloader(1).assign([time])
