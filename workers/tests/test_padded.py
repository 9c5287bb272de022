"""The padded layout on the mock runner: one rectangle a batch, what it wastes, what it needs, and what it leaves."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb
from scls_worker.mock import MockRunner
from scls_worker.rows import Chunk, Drawn
from worker_harness import FailingRunner, Router, ids_of, kinds, mock_output, of, row_id, start

S = pb.SliceReport
NONE = pb.Plan.KEEP_NONE
STOP, CANCELLED, ERROR = common.FINISH_REASON_STOP, common.FINISH_REASON_CANCELLED, common.FINISH_REASON_ERROR


class Watched(MockRunner):
    """Remembers the (start, size, draws) of every row of every pass."""

    def __init__(self, vocab: int = 1000) -> None:
        super().__init__(vocab, padded=True)
        self.passes: list[list[tuple[int, int, bool]]] = []

    def run(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        self.passes.append([(chunk.start, chunk.size, chunk.draws) for chunk in chunks])
        return super().run(chunks)


def padded(runner: Any = None, **fields: Any) -> Router:
    return Router(runner or Watched(), padded=True, **fields)


def test_all_prompts_in_one_pass_and_then_a_token_of_each_row() -> None:
    router = padded(chunk_tokens=4)  # of no account here
    rows = [start(1, 10, 3), start(2, 4, 5), start(3, 7, 5)]
    router.plan(1, steps=4, add=rows)
    messages = router.run()
    assert router.engine.runner.passes == [
        [(0, 10, True), (0, 4, True), (0, 7, True)],
        [(10, 1, True), (4, 1, True), (7, 1, True)],
        [(11, 1, True), (5, 1, True), (8, 1, True)],
        # Row 1 ended and stays: what it computed last it computes again, into its own place.
        [(11, 1, False), (6, 1, True), (9, 1, True)],
    ]
    (report,) = of(messages, "slice_report")
    assert (report.end, report.steps) == (S.END_STEPS, 4)
    assert (report.pad_tokens, report.invalid_tokens) == (3 * 10 - 21, 1)
    for row, count in zip(rows, (3, 4, 4), strict=True):
        assert router.outputs[row.row.request, 0] == mock_output(ids_of(row), count)
    # Nothing is left of it: what did not end is prefilled again, prompt and output.
    assert [(r.computed, r.cached, r.emitted) for r in report.rows] == [(12, 0, 3), (7, 0, 4), (10, 0, 4)]
    assert [(r.kv, r.prefill_left, r.blocks) for r in report.rows] == [
        (pb.RowReport.KV_DROPPED, left, 0) for left in (0, 8, 11)
    ]
    assert router.pool.free == router.pool.blocks
    assert "kv_delta" not in kinds(router.session.sent)


def test_the_next_batch_prefills_again_and_goes_on_alike() -> None:
    router = padded()
    rows = [start(1, 10, 9), start(2, 4, 20)]
    router.plan(1, steps=4, add=rows)
    router.plan(2, 1, steps=6, add=[start(3, 5, 6)])
    router.run()
    assert router.engine.runner.passes[4] == [(0, 14, True), (0, 8, True), (0, 5, True)]
    router.plan(3, 2)
    router.run()
    assert {key[0]: len(output) for key, output in router.outputs.items()} == {1: 9, 2: 20, 3: 6}
    for row in rows:
        assert router.outputs[row.row.request, 0] == mock_output(ids_of(row), row.limits.max_tokens)


def test_a_batch_ends_when_all_its_rows_have() -> None:
    router = padded()
    stop = mock_output(ids_of(start(2, 4)), 3)[2]
    router.plan(1, steps=100, add=[start(1, 10, 6), start(2, 4, 50, stop_token_ids=[stop])])
    (report,) = of(router.run(), "slice_report")
    assert (report.end, report.steps, report.invalid_tokens) == (S.END_ALL_DONE, 6, 3)
    assert router.finishes[2, 0] == STOP


def test_a_row_that_ends_with_its_first_token() -> None:
    router = padded()
    router.plan(1, add=[start(1, 1, 1), start(2, 1, 3)])
    (report,) = of(router.run(), "slice_report")
    assert router.engine.runner.passes == [[(0, 1, True)] * 2, *[[(0, 1, False), (i, 1, True)] for i in (1, 2)]]
    assert (report.pad_tokens, report.invalid_tokens) == (0, 2)


def test_the_rectangle_is_what_is_promised() -> None:
    # Blocks of 4: the widest row comes to 12 + 5 - 1 = 16 positions, so two rows want eight blocks.
    for blocks, ceiling, fits in ((8, 8, True), (7, 0, False), (64, 7, False)):
        router = padded(blocks=blocks)
        router.plan(1, steps=5, ceiling_blocks=ceiling, add=[start(1, 12, 20), start(2, 1, 2)])
        messages = router.take()
        if fits:
            assert router.pool.reserved == 8
            (report,) = of(router.run(), "slice_report")
            assert report.peak_blocks == 8
        else:
            assert of(messages, "refused")[0].reason == pb.Refused.REASON_NO_MEMORY
            assert router.engine.rows == {} and router.pool.reserved == 0


def test_the_widest_row_need_not_be_the_longest() -> None:
    router = padded(blocks=8)
    router.plan(1, steps=9, add=[start(1, 12, 2), start(2, 8, 9)])  # 13 and 16 positions
    (report,) = of(router.run(), "slice_report")
    assert report.peak_blocks == 8 and {len(output) for output in router.outputs.values()} == {2, 9}


def test_a_dropped_row_keeps_its_place() -> None:
    router = padded()
    router.plan(1, steps=9, add=[start(1, 10, 9), start(2, 4, 9), start(3, 5, 9)])
    router.say(drop=pb.Drop(rows=[row_id(3)]))  # before the rectangle is made: it has none
    router.step(2)
    router.say(drop=pb.Drop(rows=[row_id(2)]))
    (report,) = of(router.run(), "slice_report")
    assert {len(chunks) for chunks in router.engine.runner.passes} == {2}
    assert router.engine.runner.passes[2] == [(11, 1, True), (4, 1, False)]
    assert (report.pad_tokens, report.invalid_tokens) == (6, 7)
    assert {r.row.request: r.finish for r in report.rows}[2] == CANCELLED
    assert router.pool.free == router.pool.blocks


def test_a_cut_a_lost_session_and_a_failure_drop_the_kv() -> None:
    router = padded()
    router.plan(1, add=[start(1, 10, 50), start(2, 4, 50)])
    router.step(3)
    router.say(cut=pb.Cut(batch=1))
    (report,) = of(router.take(), "slice_report")
    assert (report.end, report.steps, report.rows[0].prefill_left) == (S.END_CUT, 3, 13)
    assert router.pool.free == router.pool.blocks
    router.plan(2, 1)
    router.step(2)
    router.engine.closed(router.session)
    assert len(router.engine.rows) == 2 and router.pool.free == router.pool.blocks

    router = padded(FailingRunner(1000, padded=True))
    router.plan(1, add=[start(1, [20, 30, 999], 5), start(3, 10, 3)])
    assert of(router.run(), "slice_report")[0].end == S.END_ERROR
    assert set(router.finishes.values()) == {ERROR} and router.pool.free == router.pool.blocks


def test_a_prefix_is_found_nowhere() -> None:
    router = padded()
    prompt = list(range(10, 40))
    router.plan(1, add=[start(1, prompt, 2), start(2, prompt, 2)])
    router.plan(2, 1, add=[start(3, prompt, 2)])
    steps = of(router.run(), "step")
    assert [row.cached_tokens for s in steps for row in s.rows if row.HasField("cached_tokens")] == [0, 0, 0]
    router.say(resync=pb.Resync())
    assert of(router.take(), "snapshot")[0].hashes_le_u64 == b"" and router.hashes == set()


@pytest.mark.parametrize("is_padded", [False, True])
def test_the_mock_takes_the_time_of_its_layout(is_padded: bool) -> None:
    slept: list[float] = []
    runner = MockRunner(1000, 100, 10.0, slept.append, is_padded)
    router = Router(runner, padded=is_padded, chunk_tokens=64)
    router.plan(1, add=[start(1, 10, 2), start(2, 1, 3)])
    router.run()
    cells = 20 if is_padded else 11
    assert [round(seconds * 1e6) for seconds in slept] == [100 + 10 * cells, 100, 100]


ROW = st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 3))  # prompt, max_tokens, which token stops it
BATCH = st.tuples(st.integers(1, 9), st.lists(ROW, max_size=3), st.integers(0, 6), st.integers(0, 7))


@settings(max_examples=200, deadline=None)
@given(st.lists(BATCH, min_size=1, max_size=8))
def test_a_random_router(batches: list[tuple[int, list[tuple[int, int, int]], int, int]]) -> None:
    """Any plans, cuts and drops: tokens are the mock's own, the rectangle never passes what was promised, the count of
    its cells is right, and nothing is left over."""
    router = padded(blocks=48, max_rows=6)
    starts: dict[int, pb.RowStart] = {}
    for number, (steps, rows, cut, drop) in enumerate(batches, 1):
        base = router.engine.base.number if router.engine.base else 0
        add = []
        for prompt, max_tokens, stop in rows:
            request = len(starts) + 1
            row = start(request, prompt, max_tokens)
            if stop:
                row.limits.stop_token_ids.append(mock_output(ids_of(row), stop)[-1])
            starts[request] = row
            add.append(row)
        router.plan(number, base, steps=steps, add=add, keep=NONE if number % 3 == 0 else pb.Plan.KEEP_SURVIVORS)
        began = len(router.engine.runner.passes)
        if cut and router.engine.batch:
            router.say(cut=pb.Cut(batch=number, after_step=cut))
        if router.engine.ready:
            router.step()
            router.say(drop=pb.Drop(rows=[row_id(drop)]))
        for report in of(router.run(), "slice_report"):
            passes = router.engine.runner.passes[began:]
            cells = sum(len(chunks) * max(size for _, size, _ in chunks) for chunks in passes)
            used = sum(r.computed for r in report.rows)
            assert cells == used + report.pad_tokens + report.invalid_tokens
            assert len(passes) == report.steps
            assert router.pool.free == router.pool.blocks and router.pool.reserved == 0
            assert not any(row.blocks for row in router.engine.rows.values())
    for (request, _), output in router.outputs.items():
        assert output == mock_output(ids_of(starts[request]), len(output))
