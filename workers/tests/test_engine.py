"""The Session contract on the mock runner: plans, membership, ends, reports, the session's own life."""

import math
import struct

import pytest
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb
from scls_worker.rows import Drawn
from worker_harness import (
    VOCAB,
    FailingRunner,
    FakeSession,
    Router,
    ids_of,
    kinds,
    mock_output,
    of,
    pack,
    row_id,
    start,
    unpack,
)

STOP, LENGTH = common.FINISH_REASON_STOP, common.FINISH_REASON_LENGTH
CANCELLED, ERROR = common.FINISH_REASON_CANCELLED, common.FINISH_REASON_ERROR
S = pb.SliceReport
INF, NAN = math.inf, math.nan


def test_hello_is_answered_with_a_snapshot() -> None:
    router = Router()
    assert kinds(router.session.sent) == ["snapshot"]
    assert router.session.sent[0].state_seq == 1


def test_one_row_runs_to_its_length() -> None:
    router = Router()
    row = start(1, 10, max_tokens=4)
    router.plan(1, add=[row])
    messages = router.run()
    assert router.outputs[1, 0] == mock_output(ids_of(row), 4)
    assert router.finishes[1, 0] == LENGTH
    (report,) = of(messages, "slice_report")
    assert (report.batch, report.end, report.steps, report.next_batch) == (1, S.END_ALL_DONE, 4, 0)
    (row_report,) = report.rows
    assert (row_report.computed, row_report.cached, row_report.emitted) == (13, 0, 4)
    assert (row_report.kv, row_report.prefill_left, row_report.blocks) == (pb.RowReport.KV_DROPPED, 0, 0)
    assert kinds(messages)[-2:] == ["slice_report", "load"]
    assert of(messages, "load")[0].cached_blocks == 3 and router.pool.running == 0


def test_output_does_not_depend_on_the_slice_length() -> None:
    row = start(1, 13, max_tokens=23)
    for steps in (1, 2, 7, 100):
        router = Router()
        router.plan(1, steps=steps, add=[row])
        number = 1
        router.run()
        while (1, 0) not in router.finishes:
            router.plan(number + 1, number, steps=steps)
            number += 1
            router.run()
        assert router.outputs[1, 0] == mock_output(ids_of(row), 23)


def test_output_ids_are_continued() -> None:
    router = Router()
    row = start(1, 9, max_tokens=6)
    output = mock_output(ids_of(row), 6)
    router.plan(1, add=[start(1, 9, max_tokens=6, output=output[:2])])
    (step, *_) = of(router.run(), "step")
    assert step.rows[0].first_index == 2
    assert router.outputs[1, 0] == output[2:]


# ---------------------------------------------------------------- prefill


def test_chunk_budget_is_shared_in_order() -> None:
    router = Router(chunk_tokens=16)
    router.plan(1, add=[start(1, 10, 2), start(2, 10, 2), start(3, 10, 2)])
    router.step()
    assert [row.computed for row in router.engine.batch.rows] == [10, 6, 0]
    router.step()
    # Row 1 decodes, row 2 has four left, row 3 begins with what remains of 16.
    assert [row.computed for row in router.engine.batch.rows if not row.finish] == [10, 10]
    router.run()
    assert {key[0] for key in router.finishes} == {1, 2, 3}


def test_a_rows_prefill_budget_holds_while_another_row_decodes() -> None:
    router = Router(chunk_tokens=16)
    router.plan(1, steps=3, add=[start(1, 5, 5), start(2, 30, 2, prefill_budget=3)])
    router.step()
    # Nobody decodes yet: row 2 takes what row 1 leaves of 16.
    one, two = router.engine.batch.rows
    assert (one.computed, two.computed) == (5, 11)
    router.step(2)
    assert (one.computed, two.computed) == (7, 17)
    # Alone, it has the whole chunk; and 0 is the worker's chunk beside anybody.
    router.plan(2, 1, leave=[row_id(1)], steps=1)
    router.run()
    assert two.computed == 30
    router.plan(3, 2, keep=pb.Plan.KEEP_LIST, keep_rows=[row_id(1)], steps=2, add=[start(3, 30, 2)])
    router.step()
    assert router.engine.batch.rows[1].computed == 16


def test_a_prefill_budget_is_of_each_row_and_within_the_chunk() -> None:
    router = Router(chunk_tokens=16)
    router.plan(1, steps=1, add=[start(1, 5, 9)])
    rows = [start(2, 30, 2, prefill_budget=10), start(3, 30, 2, prefill_budget=10), start(4, 30, 2, prefill_budget=10)]
    router.plan(2, 1, add=rows)
    router.step(2)
    assert [row.computed for row in router.engine.batch.rows] == [6, 10, 6, 0]


def test_prefill_may_outlast_the_slice() -> None:
    router = Router(chunk_tokens=4)
    row = start(1, 10, 2)
    router.plan(1, steps=2, add=[row])
    (report,) = of(router.run(), "slice_report")
    assert (report.end, report.rows[0].prefill_left, report.rows[0].kv) == (S.END_STEPS, 2, pb.RowReport.KV_HELD)
    assert not of(router.session.sent, "step")
    router.plan(2, 1)
    router.run()
    assert router.outputs[1, 0] == mock_output(ids_of(row), 2)


def test_a_row_finds_what_an_earlier_row_of_its_batch_computes() -> None:
    router = Router(chunk_tokens=64)
    prompt = list(range(10, 30))  # five whole blocks: four may be taken
    router.plan(1, add=[start(1, prompt, 2), start(2, prompt, 2), start(3, prompt, 2, root=5)])
    (step, *_) = of(router.run(), "step")
    assert [row.cached_tokens for row in step.rows] == [0, 16, 0]
    assert router.outputs[1, 0] == router.outputs[2, 0]


def test_a_row_looks_up_before_every_chunk() -> None:
    """Two rows of one prompt, prefilled side by side, each find what the other has computed."""
    router = Router(chunk_tokens=8)
    prompt = list(range(10, 43))
    router.plan(1, steps=1, add=[start(9, 3, 20)])
    router.plan(2, 1, add=[start(i, prompt, 3, prefill_budget=4) for i in (1, 2)])
    report = of(router.run(), "slice_report")[-1]
    report.rows.pop(0)
    assert [row.computed + row.cached for row in report.rows] == [35, 35]
    assert sum(row.computed for row in report.rows) == 32 + 2 * 3
    assert router.outputs[1, 0] == router.outputs[2, 0] == mock_output(prompt, 3)


def test_cached_counts_of_a_later_request() -> None:
    router = Router()
    first = start(1, 10, 6)
    router.plan(1, add=[first])
    router.run()
    prompt = ids_of(first) + mock_output(ids_of(first), 6)
    router.plan(2, 1, add=[start(2, [*prompt, 500, 501, 502], 2)])
    messages = router.run()
    # 15 of the 16 positions were computed: three whole blocks.
    assert of(messages, "step")[0].rows[0].cached_tokens == 12
    assert of(messages, "slice_report")[0].rows[0].cached == 12


# ---------------------------------------------------------------- ends of rows


def test_stop_ids_eos_and_min_tokens() -> None:
    prompt = list(range(20, 29))
    output = mock_output(prompt, 6)
    cases = [
        (dict(stop_token_ids=[output[2]]), output[:3], STOP),
        (dict(stop_token_ids=[output[2]], min_tokens=2), output[:3], STOP),
        (dict(stop_token_ids=[output[2]], min_tokens=3), output, LENGTH),
        (dict(stop_token_ids=[output[5]]), output, STOP),
    ]
    for limits, expected, finish in cases:
        router = Router()
        router.plan(1, add=[start(1, prompt, 6, **limits)])
        router.run()
        assert (router.outputs[1, 0], router.finishes[1, 0]) == (expected, finish), limits


@pytest.mark.parametrize("ignore", [False, True])
def test_eos(ignore: bool) -> None:
    prompt = list(range(20, 29))
    output = mock_output(prompt, 6)
    router = Router(eos_token_ids=[output[1]])
    router.plan(1, add=[start(1, prompt, 6, ignore_eos=ignore)])
    router.run()
    assert router.finishes[1, 0] == (LENGTH if ignore else STOP)
    assert router.outputs[1, 0] == (output if ignore else output[:2])


def test_drop_of_a_running_row() -> None:
    router = Router()
    router.plan(1, add=[start(1, 5, 50), start(2, 5, 3)])
    router.step()
    router.say(drop=pb.Drop(rows=[row_id(1), row_id(9)]))
    messages = router.run()
    second = of(messages, "step")[1]
    assert [(r.row.request, list(r.ids), r.finish) for r in second.rows if r.row.request == 1] == [(1, [], CANCELLED)]
    (report,) = of(messages, "slice_report")
    assert {r.row.request: r.finish for r in report.rows} == {1: CANCELLED, 2: LENGTH}
    # Its whole block stays cached.
    assert router.pool.free + router.pool.cached == router.pool.blocks and router.pool.cached


def test_drop_of_the_last_running_row_ends_the_batch() -> None:
    router = Router()
    router.plan(1, add=[start(1, 5, 50)])
    router.step()
    router.say(drop=pb.Drop(rows=[row_id(1)]))
    (report,) = of(router.take(), "slice_report")
    assert (report.end, report.rows[0].finish) == (S.END_ALL_DONE, CANCELLED)
    assert router.engine.batch is None


def test_drop_of_held_and_planned_rows() -> None:
    router = Router()
    router.plan(1, steps=2, add=[start(1, 5, 50), start(2, 5, 50)])
    router.plan(
        2, 1, keep=pb.Plan.KEEP_LIST, keep_rows=[row_id(1), row_id(2)], add=[start(3, 5, 2), start(4, 5, 2)], steps=2
    )
    router.say(drop=pb.Drop(rows=[row_id(2), row_id(3)]))
    messages = router.run()
    first, second = of(messages, "slice_report")
    assert [r.row.request for r in second.rows] == [1, 4] and first.next_batch == 2
    router.say(drop=pb.Drop(rows=[row_id(1)]))
    assert router.engine.rows == {} and router.pool.held == 0


# ---------------------------------------------------------------- ends of batches


def test_cut() -> None:
    router = Router()
    router.plan(1, add=[start(1, 5, 50)])
    router.step(3)
    router.say(cut=pb.Cut(batch=7))
    assert router.engine.ready
    router.say(cut=pb.Cut(batch=1))
    (report,) = of(router.take(), "slice_report")
    assert (report.end, report.steps, report.rows[0].emitted) == (S.END_CUT, 3, 3)
    assert not router.engine.ready


def test_cut_after_a_step() -> None:
    router = Router()
    router.plan(1, add=[start(1, 5, 50)])
    router.say(cut=pb.Cut(batch=1, after_step=4))
    (report,) = of(router.run(), "slice_report")
    assert (report.end, report.steps) == (S.END_CUT, 4)
    router.plan(2, 1)
    router.step(6)
    router.say(cut=pb.Cut(batch=2, after_step=4))
    assert of(router.take(), "slice_report")[0].steps == 6


def test_backpressure_ends_the_slice_and_nothing_runs_before_there_is_room() -> None:
    router = Router()
    router.plan(1, add=[start(1, 5, 50)])
    router.plan(2, 1)
    router.step(2)
    router.session.full = True
    router.engine.step()
    (report,) = of(router.take(), "slice_report")
    assert (report.end, report.steps, report.next_batch) == (S.END_BACKPRESSURE, 3, 2)
    assert not router.engine.ready and router.engine.batch.number == 2
    router.session.full = False
    router.run()
    assert len(router.outputs[1, 0]) == 50


def test_a_failing_pass_ends_its_batch_only() -> None:
    router = Router(FailingRunner(1000))
    good = start(2, 10, 3)
    router.plan(1, add=[start(1, [*range(20, 30), 999], 5), start(3, 10, 3)])
    router.plan(2, 1, add=[good])
    messages = router.run()
    bad, fine = of(messages, "slice_report")
    assert (bad.end, bad.next_batch) == (S.END_ERROR, 2) and "out of luck" in bad.error
    assert [r.finish for r in bad.rows] == [ERROR, ERROR]
    assert router.finishes == {(1, 0): ERROR, (3, 0): ERROR, (2, 0): LENGTH}
    assert fine.end == S.END_ALL_DONE and router.outputs[2, 0] == mock_output(ids_of(good), 3)
    # What the pass should have computed is not found later.
    router.plan(3, 2, add=[start(4, list(range(20, 30)), 2)])
    assert of(router.run(), "step")[0].rows[0].cached_tokens == 0
    router.take()
    assert router.hashes == set(router.pool.names())


def test_a_runner_that_draws_too_little_is_an_error() -> None:
    class Lazy:
        def run(self, chunks: object) -> list[Drawn]:
            return []

    router = Router(Lazy())
    router.plan(1, add=[start(1, 5, 5)])
    assert of(router.run(), "slice_report")[0].end == S.END_ERROR


# ---------------------------------------------------------------- plans


def test_survivors_are_kept_and_newcomers_join() -> None:
    router = Router()
    router.plan(1, steps=3, add=[start(1, 5, 2), start(2, 5, 9)])
    router.plan(2, 1, steps=2, add=[start(3, 5, 9)])
    first, second = of(router.run(), "slice_report")
    assert (first.end, first.next_batch, second.next_batch) == (S.END_STEPS, 2, 0)
    assert [r.row.request for r in second.rows] == [2, 3]
    # The survivor's first slice is told in full, though its second has begun by then.
    assert (first.rows[1].computed, first.rows[1].emitted) == (7, 3)
    # The survivor computed one token an iteration; nothing of it was prefilled again.
    assert (second.rows[0].computed, second.rows[0].cached) == (2, 0)


def test_keep_none_keep_list_and_leave() -> None:
    router = Router()
    router.plan(1, steps=3, add=[start(1, 5, 30), start(2, 5, 30), start(3, 5, 2)])
    router.plan(2, 1, keep=pb.Plan.KEEP_NONE, steps=2, add=[start(4, 5, 30)])
    router.plan(3, 1, keep=pb.Plan.KEEP_LIST, keep_rows=[row_id(2), row_id(3)], steps=2, add=[start(4, 5, 30)])
    router.run()
    assert router.engine.base.number == 3  # it replaced plan 2
    assert [row.key.request for row in router.engine.base.rows] == [2, 4]  # row 3 had finished
    router.plan(4, 3, keep=pb.Plan.KEEP_LIST, keep_rows=[row_id(1), row_id(4)], steps=2)
    (report,) = of(router.run(), "slice_report")
    assert [r.row.request for r in report.rows] == [1, 4] and report.rows[0].computed == 2
    router.plan(5, 4, leave=[row_id(1)], steps=2)
    (report,) = of(router.run(), "slice_report")
    assert [r.row.request for r in report.rows] == [4]
    assert len(router.engine.rows) == 3
    router.plan(6, 5, keep=pb.Plan.KEEP_NONE)
    (report,) = of(router.run(), "slice_report")
    assert (report.batch, report.end, report.steps, list(report.rows)) == (6, S.END_ALL_DONE, 0, [])
    router.plan(7, 6, keep=pb.Plan.KEEP_LIST, keep_rows=[row_id(i) for i in (1, 2, 4)])
    router.run()
    assert {key[0] for key, reason in router.finishes.items() if reason == LENGTH} == {1, 2, 3, 4}
    assert all(len(router.outputs[i, 0]) == 30 for i in (1, 2, 4))


def test_a_standing_plan_without_rows_ends_at_once() -> None:
    router = Router()
    router.plan(1, add=[start(1, 5, 2)])
    router.plan(2, 1)
    messages = router.run()
    first, second = of(messages, "slice_report")
    assert (first.next_batch, second.batch, second.steps, second.end) == (2, 2, 0, S.END_ALL_DONE)
    assert kinds(messages)[-4:] == ["slice_report", "load", "slice_report", "load"]
    router.plan(3, 2, add=[start(2, 5, 2)])
    assert router.engine.ready


def refusal(router: Router) -> pb.Refused:
    (refused,) = of(router.take(), "refused")
    return refused


def test_stale_plans() -> None:
    router = Router()
    router.plan(1, base=4, add=[start(1, 5, 5)])
    assert refusal(router).reason == pb.Refused.REASON_STALE
    router.plan(1, add=[start(1, 5, 5)])
    router.plan(2, 0, add=[start(2, 5, 5)])
    assert refusal(router).reason == pb.Refused.REASON_STALE
    router.plan(3, 1, add=[start(2, 5, 5)])
    router.plan(2, 1, add=[start(3, 5, 5)])
    assert (refusal(router).plan_no, router.engine.standing.number) == (2, 3)
    router.run()
    router.plan(4, 1, add=[start(2, 5, 5)])
    assert refusal(router).reason == pb.Refused.REASON_STALE
    router.plan(4, 3, add=[start(3, 5, 5)])
    assert router.engine.ready


def test_unknown_rows_are_refused_when_the_plan_starts() -> None:
    router = Router()
    router.plan(1, steps=2, add=[start(1, 5, 5)])
    router.plan(2, 1, keep=pb.Plan.KEEP_LIST, keep_rows=[row_id(1), row_id(8)], add=[start(2, 5, 5)])
    assert not of(router.take(), "refused")
    messages = router.run()
    (refused,) = of(messages, "refused")
    assert refused.reason == pb.Refused.REASON_UNKNOWN_ROW and [row.request for row in refused.rows] == [8]
    assert of(messages, "slice_report")[0].next_batch == 0
    assert [key.request for key in router.engine.rows] == [1]
    # The base is still the last that ended.
    router.plan(3, 1, add=[start(2, 5, 5)])
    router.run()
    assert len(router.finishes) == 2


def test_rows_dropped_since_are_skipped_in_a_list() -> None:
    router = Router()
    router.plan(1, steps=2, add=[start(1, 5, 5), start(2, 5, 5)])
    router.run()
    router.say(drop=pb.Drop(rows=[row_id(1)]))
    router.plan(2, 1, keep=pb.Plan.KEEP_LIST, keep_rows=[row_id(1), row_id(2)], steps=1)
    (report,) = of(router.run(), "slice_report")
    assert [row.row.request for row in report.rows] == [2]
    router.plan(3, 2, keep=pb.Plan.KEEP_LIST, keep_rows=[row_id(1)], steps=1)
    assert refusal(router).reason == pb.Refused.REASON_UNKNOWN_ROW


def test_a_row_is_not_added_twice() -> None:
    router = Router()
    router.plan(1, add=[start(1, 5, 5), start(1, 5, 5)])
    assert refusal(router).reason == pb.Refused.REASON_INVALID
    router.plan(1, steps=1, add=[start(1, 5, 5)])
    router.run()
    router.plan(2, 1, add=[start(1, 5, 5)])
    assert refusal(router).reason == pb.Refused.REASON_INVALID
    router.plan(2, 1, add=[start(1, 5, 5, attempt=1)])
    router.run()
    assert set(router.finishes) == {(1, 0), (1, 1)}


def test_too_many_rows() -> None:
    router = Router(max_rows=2)
    router.plan(1, steps=1, add=[start(i, 5, 5) for i in range(3)])
    assert refusal(router).reason == pb.Refused.REASON_TOO_MANY_ROWS
    router.plan(1, steps=1, add=[start(i, 5, 5) for i in range(2)])
    router.plan(2, 1, add=[start(2, 5, 5)])
    assert of(router.run(), "refused")[0].reason == pb.Refused.REASON_TOO_MANY_ROWS


def change(row: pb.RowStart, **fields: object) -> pb.RowStart:
    for name, value in fields.items():
        part, _, field = name.partition("__")
        target = getattr(row, part) if field else row
        if isinstance(value, common.TokenIds):
            getattr(row, part).CopyFrom(value)
        elif isinstance(value, dict):
            getattr(target, field).update(value)
        else:
            setattr(target, field or part, value)
    return row


UNSUPPORTED = [
    dict(model="other"),
    dict(adapter="a"),
    dict(deadline_ms_left=5),
    dict(limits__max_tokens=200000),
    dict(limits__min_tokens=50),
    dict(prompt_ids=pack([5, 1000])),
]


@pytest.mark.parametrize("fields", UNSUPPORTED, ids=lambda fields: next(iter(fields)))
def test_what_is_not_served_is_named(fields: dict[str, object]) -> None:
    router = Router()
    router.plan(1, add=[start(2, 5, 5), change(start(1, 5, 5), **fields)])
    answer = refusal(router)
    assert answer.reason == pb.Refused.REASON_UNSUPPORTED
    assert answer.detail.startswith(next(iter(fields)).split("__")[-1])
    assert [row.request for row in answer.rows] == [1]
    assert router.engine.rows == {} and not router.engine.ready


def test_every_sampling_field_is_served() -> None:
    row = change(start(1, 5, 5), sampling__top_k=2**32 - 1, sampling__top_p=1e-6, sampling__min_p=1.0)
    change(row, sampling__repetition_penalty=1e-6, sampling__presence_penalty=-1e6, sampling__frequency_penalty=1e6)
    change(row, sampling__logprobs=20, sampling__temperature=1e6)
    row.sampling.logit_bias.update({0: -1e30, VOCAB - 1: 1e30})
    router = Router()
    router.plan(1, add=[row])
    assert router.engine.batch.rows[0].draw.logit_bias == ((0, pytest.approx(-1e30)), (VOCAB - 1, pytest.approx(1e30)))
    off = change(start(2, 5, 5), sampling__top_p=1.0, sampling__min_p=0.0, sampling__repetition_penalty=1.0)
    change(off, sampling__presence_penalty=0.0, sampling__frequency_penalty=0.0)
    router.plan(2, 1, add=[off])
    router.run()
    assert not of(router.session.sent, "refused") and len(router.finishes) == 2


@pytest.mark.parametrize("vocab", [VOCAB, 7])
def test_logprobs_of_the_mock(vocab: int) -> None:
    router = Router(vocab_size=vocab)
    prompt = [3, 4, 5]
    rows = [start(1, prompt, 3), *(change(start(i, prompt, 3), sampling__logprobs=k) for i, k in ((2, 0), (3, 9)))]
    router.plan(1, add=rows)
    parts = [part for step in of(router.run(), "step") for part in step.rows]
    assert all(len(part.ids) == 1 and len(part.logprobs) == (part.row.request > 1) for part in parts)
    for part in (part for part in parts if part.logprobs):
        (told,) = part.logprobs
        ranks = range(min(9, vocab) if part.row.request == 3 else 0)
        assert told.chosen == pytest.approx(-math.log(2))
        assert list(told.top_ids) == [(part.ids[0] + rank) % vocab for rank in ranks]
        assert list(told.top) == pytest.approx([-(rank + 1) * math.log(2) for rank in ranks])
    assert router.outputs[1, 0] == router.outputs[2, 0] == router.outputs[3, 0] == mock_output(prompt, 3, vocab)


INVALID = [
    dict(prompt_ids=common.TokenIds()),
    dict(prompt_ids=common.TokenIds(le_u32=b"abcde")),
    dict(output_ids=common.TokenIds(le_u32=b"ab")),
    dict(limits__max_tokens=0),
    *(dict(sampling__temperature=bad) for bad in (-1.0, NAN, INF)),
    *(dict(sampling__top_p=bad) for bad in (0.0, -0.5, 1.5, NAN)),
    *(dict(sampling__min_p=bad) for bad in (-0.1, 1.5, NAN)),
    *(dict(sampling__repetition_penalty=bad) for bad in (0.0, -1.0, NAN, INF)),
    *(dict(sampling__presence_penalty=bad) for bad in (NAN, INF)),
    *(dict(sampling__frequency_penalty=bad) for bad in (NAN, -INF)),
    *(dict(sampling__logit_bias=bad) for bad in ({5: NAN}, {5: -INF}, {VOCAB: 1.0}, {5: 0.0, 2**32 - 1: 0.0})),
    *(dict(sampling__logprobs=bad) for bad in (21, 2**32 - 1)),
]


@pytest.mark.parametrize("fields", INVALID, ids=lambda fields: next(iter(fields)))
def test_what_is_malformed_is_refused(fields: dict[str, object]) -> None:
    router = Router()
    router.plan(1, add=[start(2, 5, 5), change(start(1, 5, 5), **fields)])
    answer = refusal(router)
    assert answer.reason == pb.Refused.REASON_INVALID
    assert answer.detail.startswith(next(iter(fields)).split("__")[-1])
    assert [row.request for row in answer.rows] == [1]
    assert router.engine.rows == {} and not router.engine.ready


def test_plans_without_steps_or_keep_are_refused() -> None:
    router = Router()
    router.plan(1, steps=0, add=[start(1, 5, 5)])
    assert refusal(router).detail == "steps"
    router.plan(1, keep=pb.Plan.KEEP_UNSPECIFIED, add=[start(1, 5, 5)])
    assert refusal(router).detail == "keep"


def test_a_plan_refused_on_arrival_leaves_the_standing_one() -> None:
    router = Router()
    router.plan(1, add=[start(1, 5, 2)])
    router.plan(2, 1, add=[start(2, 5, 2)])
    router.plan(3, 1, add=[start(3, 5, 2, model="other")])
    router.run()
    assert (2, 0) in router.finishes


def test_an_empty_message_and_an_empty_plan_change_nothing() -> None:
    router = Router()
    router.say()
    router.say(plan=pb.Plan())
    assert of(router.take(), "refused")[0].reason == pb.Refused.REASON_STALE


# ---------------------------------------------------------------- times


def test_times_of_a_slice() -> None:
    router = Router()

    class Slow:
        def __init__(self, inner: object) -> None:
            self.inner = inner

        def run(self, chunks: object) -> list[Drawn]:
            router.now_us += 10
            return self.inner.run(chunks)

    router.engine.runner = Slow(router.engine.runner)
    router.now_us = 100
    router.plan(1, steps=3, add=[start(1, 5, 9)])
    router.now_us = 104
    (report,) = of(router.run(), "slice_report")
    assert (report.prefill_us, report.decode_us, report.queue_us, report.idle_us) == (10, 20, 0, 0)
    router.now_us += 50
    router.plan(2, 1, steps=3)
    (report,) = of(router.run(), "slice_report")
    assert (report.prefill_us, report.decode_us, report.queue_us, report.idle_us) == (0, 30, 0, 50)


# ---------------------------------------------------------------- sessions


def test_a_higher_epoch_takes_the_worker_over() -> None:
    router = Router(owner_epoch=3)
    router.plan(1, add=[start(1, 9, 50)])
    router.step(2)
    other = FakeSession()
    router.say(other, hello=pb.Hello(owner_epoch=3))
    assert of(other.sent, "refused")[0].reason == pb.Refused.REASON_NOT_OWNER and other.is_closed
    assert other.sent[0].state_seq == 1
    new = FakeSession()
    router.say(new, hello=pb.Hello(owner_epoch=4))
    assert kinds(router.take())[-1] == "goodbye" and router.session.is_closed
    assert kinds(new.sent) == ["snapshot"] and len(unpack(new.sent[0].snapshot.hashes_le_u64)) == 2
    assert router.engine.rows == {} and not router.engine.ready and router.pool.cached == 2
    router.engine.closed(router.session)
    # The new owner's batches are its own.
    router.say(new, plan=pb.Plan(plan_no=1, keep=pb.Plan.KEEP_NONE, steps=9, add=[start(1, 9, 2)]))
    assert router.engine.ready


def test_the_first_message_is_a_hello_and_the_only_one() -> None:
    router = Router()
    stranger = FakeSession()
    router.say(stranger, ping=pb.Ping(nonce=1))
    assert of(stranger.sent, "refused")[0].reason == pb.Refused.REASON_INVALID and stranger.is_closed
    router.say(hello=pb.Hello(owner_epoch=9))
    assert refusal(router).reason == pb.Refused.REASON_INVALID and router.engine.owner.session is router.session


def test_rows_outlive_their_session_for_the_lease() -> None:
    router = Router()
    router.plan(1, add=[start(1, 9, 50)])
    router.plan(2, 1)
    router.step(2)
    router.engine.closed(router.session)
    assert not router.engine.ready and router.engine.standing is None
    assert router.pool.held == 3 and router.pool.running == 0
    router.now_us += 9_999_999
    router.engine.tick()
    assert len(router.engine.rows) == 1 and router.engine.patience_s() == pytest.approx(1e-6)
    router.now_us += 1
    router.engine.tick()
    assert router.engine.rows == {} and router.engine.patience_s() is None
    assert router.pool.held == 0 and router.pool.cached == 2


def test_a_hello_within_the_lease_drops_the_rows() -> None:
    router = Router()
    router.plan(1, add=[start(1, 9, 50)])
    router.step(2)
    router.engine.closed(router.session)
    new = FakeSession()
    router.say(new, hello=pb.Hello(owner_epoch=1))
    assert of(new.sent, "refused")
    new = FakeSession()
    router.say(new, hello=pb.Hello(owner_epoch=2))
    assert router.engine.rows == {} and router.engine.lease_ends_us is None


def test_resync_and_ping() -> None:
    router = Router()
    router.plan(1, add=[start(1, 9, 50)])
    router.step(2)
    router.say(resync=pb.Resync())
    router.say(ping=pb.Ping(nonce=42))
    messages = router.take()
    assert kinds(messages)[-2:] == ["snapshot", "pong"] and messages[-1].pong.nonce == 42
    assert router.hashes == set(router.pool.names()) and len(router.hashes) == 2


def test_goodbye() -> None:
    router = Router()
    router.plan(1, add=[start(1, 9, 50)])
    router.step(2)
    router.engine.say_goodbye("bye")
    assert kinds(router.take())[-1] == "goodbye" and router.session.is_closed and not router.engine.ready


def test_ids_travel_as_little_endian() -> None:
    assert pack([1, 256]).le_u32 == struct.pack("<II", 1, 256)
