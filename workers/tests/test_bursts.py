"""Several iterations in one go: what a router hears, and what the pool holds, is what single iterations would have come to."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb
from scls_worker.engine import TOLD_US, Interrupt
from scls_worker.mock import MockRunner, next_token
from scls_worker.rows import Chunk
from worker_harness import VOCAB, Router, of, start


class Bursting(MockRunner):
    """Ends its bursts after as many passes as it is told to, if nothing else ends them; `beyond` a row's stop like a device
    that hears of it late.
    """

    def __init__(self, lengths: Sequence[int] = (1 << 30,), beyond: bool = False) -> None:
        super().__init__(VOCAB)
        self.lengths, self.beyond = list(lengths), beyond
        self.bursts: list[int] = []

    def burst(self, chunks: Sequence[Chunk], most: int, interrupt: Interrupt) -> list[list[int]]:
        assert all(chunk.size == 1 and chunk.draws and chunk.row.plain for chunk in chunks)
        most = min(most, self.lengths[len(self.bursts) % len(self.lengths)])
        last = [int(chunk.row.tokens[chunk.row.known - 1]) for chunk in chunks]
        passes: list[list[int]] = []
        while len(passes) < most:
            at = [chunk.row.known - 1 + len(passes) for chunk in chunks]
            # It has blocks for every position that it computes.
            assert all(place // 4 < len(chunk.row.blocks) for place, chunk in zip(at, chunks, strict=True))
            last = [next_token(token, place, VOCAB) for token, place in zip(last, at, strict=True)]
            passes.append(last)
            stopped = any(token in chunk.row.stops for token, chunk in zip(last, chunks, strict=True))
            if interrupt or (stopped and not self.beyond):
                break
        self.bursts.append(len(passes))
        return passes


def talk(runner: MockRunner, rows: Sequence[pb.RowStart], steps: int) -> Router:
    """All rows to their ends, in slices of `steps`."""
    router = Router(runner, blocks=400)
    router.plan(1, steps=steps, add=rows)
    while router.engine.rows:
        if router.engine.batch is None:
            last = router.engine.base.number
            keys = [key.id() for key in router.engine.rows]
            router.plan(last + 1, last, steps=steps, keep=pb.Plan.KEEP_LIST, keep_rows=keys)
        router.run()
    return router


ROWS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(1, 90), st.lists(st.integers(1, 20), min_size=1, max_size=5), st.booleans())
def test_property_a_burst_is_single_iterations(
    rows: list[tuple[int, int, bool]], steps: int, lengths: list[int], beyond: bool
) -> None:
    def starts() -> list[pb.RowStart]:
        made = [start(i, prompt, most) for i, (prompt, most, _) in enumerate(rows)]
        for row, (_, _, stops) in zip(made, rows, strict=True):
            if stops:  # early, late or never
                row.limits.stop_token_ids.extend(range(10, VOCAB, 37))
        return made

    one, other = talk(MockRunner(VOCAB), starts(), steps), talk(Bursting(lengths, beyond), starts(), steps)
    assert other.outputs == one.outputs and other.finishes == one.finishes
    for alone, together in zip(
        of(one.session.sent, "slice_report"), of(other.session.sent, "slice_report"), strict=True
    ):
        # Passes made for nobody were made all the same.
        assert (
            together.steps == alone.steps or (beyond and together.steps > alone.steps)
        ) and together.end == alone.end
        assert list(together.rows) == list(alone.rows)
    # What was computed is found again, to the last full block.
    assert sorted(other.pool.names()) == sorted(one.pool.names())
    assert other.pool.running == other.pool.held == 0


def test_a_row_s_tokens_of_a_burst_come_in_one_message() -> None:
    runner = Bursting([3])
    router = Router(runner)
    router.plan(1, steps=8, add=[start(1, 5, 20)])
    steps = of(router.run(), "step")
    assert [(step.step, len(step.rows[0].ids), step.rows[0].first_index) for step in steps] == [
        (1, 1, 0),
        (2, 1, 1),  # nobody knows yet how long a step takes
        (5, 3, 2),
        (8, 3, 5),
    ]


def test_a_slow_step_is_told_alone() -> None:
    runner = Bursting()
    router = Router(runner)
    router.engine.step_us = TOLD_US // 2 + 1
    router.plan(1, steps=3, add=[start(1, 5, 20)])
    router.engine.step()
    router.engine.step_us = TOLD_US // 2 + 1
    assert router.engine._most(router.engine.batch) == 1
    router.engine.step_us = TOLD_US // 2
    assert router.engine._most(router.engine.batch) == 2


def test_a_batch_s_first_step_is_alone_however_fast_the_last_batch_was() -> None:
    runner = Bursting()
    router = Router(runner, max_rows=64)
    router.plan(1, steps=30, add=[start(1, 5, 60)])
    router.run()
    before = len(runner.bursts)
    router.plan(2, 1, steps=2, add=[start(2, 4, 60)])
    router.run()
    assert runner.bursts[before:] == []  # its prompt, and one step


def test_what_a_burst_took_ahead_and_did_not_come_to_goes_back() -> None:
    """And so a plan fits that fits behind single iterations."""
    runner = Bursting([3])
    router = Router(runner, blocks=24)
    router.plan(1, steps=60, add=[start(1, 5, 59)])
    router.step(3)
    assert router.pool.running > 3
    router.say(cut=pb.Cut(batch=1))
    router.run()
    assert router.pool.held == -(-9 // 4)
    router.plan(2, 1, steps=1, keep=pb.Plan.KEEP_LIST, keep_rows=[], add=[start(2, 80, 1)])
    assert not of(router.take(), "refused")


def test_no_row_loses_its_kv_for_steps_that_may_never_come() -> None:
    runner = Bursting()
    router = Router(runner, blocks=16)
    router.plan(1, steps=3, add=[start(1, 39, 60)])
    router.run()
    assert router.pool.held == 10
    router.plan(2, 1, steps=30, keep=pb.Plan.KEEP_LIST, keep_rows=[], add=[start(2, 4, 40)])
    router.step(3)
    # What nobody held was room for some of them; the last were left to their own turn.
    assert router.pool.held == 10 and 1 < runner.bursts[0] < 29
    router.run()
    assert len(router.outputs[2, 0]) == 30


def test_more_passes_than_asked_for_fail_the_batch_and_not_the_engine() -> None:
    class Long(Bursting):
        def burst(self, chunks: Sequence[Chunk], most: int, interrupt: Interrupt) -> list[list[int]]:
            return [[5] * len(chunks)] * (most + 1)

    router = Router(Long())
    router.plan(1, steps=10, add=[start(1, 5, 20)])
    (report,) = of(router.run(), "slice_report")
    assert report.end == pb.SliceReport.END_ERROR and "more passes" in report.error


@pytest.mark.parametrize(
    "sampling",
    [
        common.Sampling(logprobs=0),
        common.Sampling(presence_penalty=0.5),
        common.Sampling(temperature=1.0, top_k=5),
        common.Sampling(temperature=1.0, top_p=0.5),
        common.Sampling(temperature=1.0, min_p=0.1),
        common.Sampling(logit_bias={5: 1.0}),
    ],
)
def test_a_row_that_is_not_plain_keeps_to_single_iterations(sampling: common.Sampling) -> None:
    runner = Bursting()
    router = Router(runner)
    odd = start(2, 5, 20)
    odd.sampling.CopyFrom(sampling)
    router.plan(1, steps=10, add=[start(1, 5, 20), odd])
    router.run()
    assert runner.bursts == [] and len(router.outputs[1, 0]) == 10


def test_a_burst_ends_where_a_cut_was_asked_for() -> None:
    runner = Bursting()
    router = Router(runner)
    router.plan(1, steps=100, add=[start(1, 5, 90)])
    router.engine.step()
    router.say(cut=pb.Cut(batch=1, after_step=7))
    (report,) = of(router.run(), "slice_report")
    assert report.steps == 7 and runner.bursts == [5]


def test_a_runner_that_draws_for_too_few_rows_fails_the_batch() -> None:
    class Short(Bursting):
        def burst(self, chunks: Sequence[Chunk], most: int, interrupt: Interrupt) -> list[list[int]]:
            return [[5] * (len(chunks) - 1)]

    router = Router(Short())
    router.plan(1, steps=10, add=[start(1, 5, 20), start(2, 5, 20)])
    (report,) = of(router.run(), "slice_report")
    assert report.end == pb.SliceReport.END_ERROR and "another number" in report.error
    assert router.pool.running == 0
