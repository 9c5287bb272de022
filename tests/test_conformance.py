"""The Session contract (ARCHITECTURE.md), one suite for the real worker and both mocks, paged and padded."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from harness import MODEL, Process, RustMock, Worker
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb
from session import Row, Session

KINDS = ["real", "real-padded", "python-mock", "python-mock-padded", "rust-mock", "rust-mock-padded"]
BLOCKS = 64
# What is about KV that outlives a batch, of which a padded worker has none (workers/tests/test_padded.py has its own).
PAGED_ONLY = {
    "test_a_row_runs_over_slices_and_ends_at_its_limit": "counts what held KV saves, and whole blocks stay cached",
    "test_the_same_tokens_for_every_slicing_batch_and_cache_state": "finds a prefix",
    "test_held_rows_wait_and_come_back": "holds KV",
    "test_under_pressure_the_lowest_rank_loses_its_kv_and_still_ends_right": "holds KV",
    "test_a_prefill_budget_holds_beside_rows_that_decode": "has prompts in chunks",
    "test_resync_and_ping": "knows blocks by name",
}
_requests = itertools.count(1)


@pytest.fixture(scope="module", params=KINDS)
def worker(request: pytest.FixtureRequest) -> Iterator[Process]:
    kind: str = request.param
    size = ["--blocks", str(BLOCKS), "--max-rows", "8"]
    if kind.endswith("padded"):
        size += ["--layout", "padded"]
    if kind.startswith("real"):
        process: Process = Worker("--model", str(MODEL), "--dtype", "float32", *size)
    elif kind.startswith("python-mock"):
        process = Worker("--mock", "--vocab", "1000", "--max-context", "4096", "--step-us", "1000", *size)
    else:
        process = RustMock("--vocab", "1000", "--max-context", "4096", "--step-us", "1000", *size)
    with process:
        yield process


@pytest.fixture
def session(request: pytest.FixtureRequest, worker: Process) -> Iterator[Session]:
    with Session(worker.url) as session:  # type: ignore[attr-defined]
        reason = PAGED_ONLY.get(request.function.__name__)
        if reason and session.info.cost_shape == common.COST_SHAPE_PADDED:
            pytest.skip(reason)
        session.snapshot()
        yield session


def row(length: int = 40, max_tokens: int = 20, **more: object) -> Row:
    number = next(_requests)
    # a root of its own, so that no test finds another's blocks
    prompt = [3 + (number * 31 + i * 7) % 900 for i in range(length)]
    return Row(prompt, max_tokens, number, hash_root=more.pop("hash_root", 1000 + number), **more)  # type: ignore[arg-type]


def test_info_health_and_reflection(session: Session) -> None:
    info = session.info
    assert info.worker_id and info.worker_epoch and info.model_digest and info.served_names
    assert (info.block_size, info.blocks, info.max_rows) == (16, BLOCKS, 8)
    assert info.vocab_size > 3 and info.max_context >= 4096 and info.chunk_tokens > 0
    health = health_pb2_grpc.HealthStub(session.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(session.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    names = [
        s.name for s in next(iter(stub.ServerReflectionInfo(iter([ask]), timeout=5))).list_services_response.service
    ]
    assert "scls.v1.Worker" in names


def test_a_row_runs_over_slices_and_ends_at_its_limit(session: Session) -> None:
    a = row(max_tokens=20)
    first = session.run(add=[a], steps=8)
    assert (first.end, first.steps, len(a.output)) == (pb.SliceReport.END_STEPS, 8, 8)
    assert first.rows[0].kv == pb.RowReport.KV_HELD and first.rows[0].computed == 40 + 7
    assert a.cached == 0
    second = session.run(keep="survivors", steps=8)
    assert len(a.output) == 16 and second.rows[0].computed == 8
    third = session.run(keep=[a], steps=8)
    assert (third.end, third.steps, len(a.output)) == (pb.SliceReport.END_ALL_DONE, 4, 20)
    assert a.finish == common.FINISH_REASON_LENGTH
    assert set(session.chain(a)) <= session.blocks, "prompt and output blocks stay cached"
    assert session.load and session.load.running_rows == session.load.held_rows == 0
    assert session.load.running_blocks == session.load.held_blocks == 0


def test_the_same_tokens_for_every_slicing_batch_and_cache_state(session: Session) -> None:
    alone = row(max_tokens=12)
    session.run(add=[alone], steps=100)
    for steps in (1, 5):
        a = Row(alone.prompt, 12, next(_requests), hash_root=alone.hash_root)
        b, c = row(17, 30), row(200, 30)
        session.run(add=[b, a, c], steps=steps)
        while not a.finish:
            session.run(keep="survivors", steps=steps)
        assert a.output == alone.output
        assert a.cached == 32, "whole blocks of the first 39 tokens"
        session.send(drop=pb.Drop(rows=[b.id, c.id]))


def test_moved_with_its_output_a_row_goes_on(session: Session) -> None:
    alone = row(max_tokens=12)
    session.run(add=[alone], steps=100)
    moved = Row(alone.prompt, 12, next(_requests), attempt=1, output=alone.output[:5], hash_root=99)
    session.run(add=[moved], steps=100)
    assert moved.output == alone.output


def test_held_rows_wait_and_come_back(session: Session) -> None:
    a, b = row(), row()
    session.run(add=[a, b], steps=4)
    session.run(keep="survivors", leave=[b], steps=4)
    assert (len(a.output), len(b.output)) == (8, 4)
    assert session.load and session.load.held_rows == 2
    again = session.run(keep=[b], steps=4)
    assert len(b.output) == 8 and again.rows[0].computed == 4, "held KV is not computed again"
    session.send(release_kv=pb.ReleaseKv(rows=[b.id]))
    again = session.run(keep=[b], steps=4)
    assert len(b.output) == 12 and again.rows[0].cached == 32, "released KV comes back from the cache"
    assert again.rows[0].computed == 40 + 8 - 32 + 3
    session.send(drop=pb.Drop(rows=[a.id, b.id]))


def test_the_standing_plan_starts_at_once_and_the_newest_wins(session: Session) -> None:
    a, b, c = row(max_tokens=60), row(), row()
    first = session.plan(add=[a], steps=40)  # at least 40 ms in which the others arrive
    session.plan(base=first, keep="survivors", add=[b], steps=3)
    newest = session.plan(base=first, keep="survivors", add=[c], steps=3)
    report = session.report()
    assert (report.batch, report.next_batch) == (first, newest)
    report = session.report()
    assert report.batch == newest and report.next_batch == 0
    assert (len(a.output), len(b.output), len(c.output)) == (43, 0, 3)
    stale = session.plan(base=first, keep=[a], steps=3)
    refused = session.until("refused").refused
    assert (refused.plan_no, refused.reason) == (stale, pb.Refused.REASON_STALE)
    session.send(drop=pb.Drop(rows=[a.id, c.id]))


def test_a_standing_plan_without_rows_ends_at_once(session: Session) -> None:
    a = row(max_tokens=5)
    first = session.plan(add=[a], steps=8)
    second = session.plan(base=first, keep="survivors", steps=8)
    assert session.report().next_batch in (0, second)
    report = session.report()
    assert (report.batch, report.steps, report.end) == (second, 0, pb.SliceReport.END_ALL_DONE)


def test_rows_that_ended_are_skipped_in_a_list_and_unknown_ones_refused(session: Session) -> None:
    a, b, never = row(max_tokens=4), row(max_tokens=30), row()
    first = session.plan(add=[a, b], steps=6)
    second = session.plan(base=first, keep=[a, b], steps=2)
    assert session.report().next_batch in (0, second)  # 0: it ended before the plan came, which then started at once
    assert session.report().batch == second and len(b.output) == 8
    session.rows[never.key] = never
    plan = session.plan(keep=[b, never], steps=2)
    refused = session.until("refused").refused
    assert (refused.plan_no, refused.reason) == (plan, pb.Refused.REASON_UNKNOWN_ROW)
    assert [r.request for r in refused.rows] == [never.request]
    session.run(keep=[b], steps=2)
    session.send(drop=pb.Drop(rows=[b.id]))


def test_memory_is_refused_before_anything_runs(session: Session) -> None:
    most = BLOCKS * 16 + 1
    fits, over, small = row(most - 30, 30), row(most - 29, 30), row(20, 4)
    session.plan(add=[over], steps=64)
    refused = session.until("refused").refused
    assert refused.reason == pb.Refused.REASON_NO_MEMORY
    report = session.run(add=[fits], steps=64)
    assert len(fits.output) == 30 and report.peak_blocks == BLOCKS
    session.plan(add=[small], steps=4, ceiling=1)
    assert session.until("refused").refused.reason == pb.Refused.REASON_NO_MEMORY
    session.plan(add=[row(8, 4) for _ in range(9)], steps=4)
    assert session.until("refused").refused.reason == pb.Refused.REASON_TOO_MANY_ROWS


def test_under_pressure_the_lowest_rank_loses_its_kv_and_still_ends_right(session: Session) -> None:
    low, high, big = row(300, 20), row(300, 20), row(600, 10)
    session.run(add=[low, high], steps=4)
    session.run(keep=None, add=[big], steps=20, ranks={low.key: 1, high.key: 9})
    assert len(big.output) == 10
    report = session.run(keep=[high], steps=4)
    assert report.rows[0].computed == 4, "the higher rank kept its KV"
    report = session.run(keep=[low], steps=4)
    assert report.rows[0].computed > 4
    reference = Row(low.prompt, 20, next(_requests), hash_root=5)
    session.send(drop=pb.Drop(rows=[low.id, high.id]))
    session.run(add=[reference], steps=8)
    assert reference.output == low.output
    session.send(drop=pb.Drop(rows=[reference.id]))


def test_a_prefill_budget_holds_beside_rows_that_decode(session: Session) -> None:
    a, b, alone = row(max_tokens=60), row(200, 4, prefill_budget=50), row(200, 4, prefill_budget=50)
    session.run(add=[a], steps=2)
    session.run(keep="survivors", add=[b], steps=6)
    assert (len(a.output), len(b.output)) == (8, 3), "four chunks, the last of which draws"
    session.run(add=[alone], steps=2)
    assert len(alone.output) == 2, "nobody waits for its chunk"
    session.send(drop=pb.Drop(rows=[a.id, b.id, alone.id]))


def test_slices_of_a_rectangle(worker: Process, session: Session) -> None:
    """What a padded worker does in place of the tests it skips: prefills again, and draws alike."""
    if session.info.cost_shape != common.COST_SHAPE_PADDED:
        pytest.skip("the padded layout's own")
    whole = row(max_tokens=20)
    session.run(add=[whole], steps=100)
    for steps in (1, 5, 8):
        a, b = Row(whole.prompt, 20, next(_requests), hash_root=whole.hash_root), row(17, 30)
        report = session.run(add=[b, a], steps=steps)
        assert (report.pad_tokens, report.invalid_tokens, report.steps) == (40 - 17, 0, steps)
        assert [r.kv for r in report.rows] == [pb.RowReport.KV_DROPPED] * 2
        assert [r.prefill_left for r in report.rows] == [17 + steps, 40 + steps]
        assert report.peak_blocks == 2 * -(-(40 + steps - 1) // 16)
        while not a.finish:
            report = session.run(keep="survivors", steps=steps)
        assert a.output == whole.output and a.cached == 0
        assert report.invalid_tokens == -20 % steps, "steps of the last slice that only the other row wanted"
        session.send(drop=pb.Drop(rows=[b.id]))
    assert session.blocks == set() and session.load and session.load.free_blocks == BLOCKS


def test_cut_ends_the_batch_and_drop_ends_rows(session: Session) -> None:
    a, b = row(max_tokens=400), row(max_tokens=400)
    first = session.plan(add=[a, b], steps=400)
    while len(a.output) < 3:
        session.until("step")
    session.send(drop=pb.Drop(rows=[b.id]))
    session.send(cut=pb.Cut(batch=first, after_step=50))
    report = session.report()
    assert (report.end, report.steps) == (pb.SliceReport.END_CUT, 50) and len(a.output) == 50
    assert len(b.output) < 50 and {r.row.request for r in report.rows} == {a.request, b.request}
    second = session.plan(keep="survivors", steps=300)
    session.until("step")
    session.send(cut=pb.Cut(batch=second))
    assert session.report().end == pb.SliceReport.END_CUT
    session.send(drop=pb.Drop(rows=[a.id]))
    session.until("load")


def test_stop_ids_and_min_tokens(session: Session) -> None:
    free = row(max_tokens=16)
    session.run(add=[free], steps=16)
    # a token that comes early, and when it comes first after index 0
    stop = free.output[4]
    at = free.output.index(stop)
    stopped = Row(free.prompt, 16, next(_requests), stops=(stop,), hash_root=5)
    session.run(add=[stopped], steps=16)
    assert stopped.finish == common.FINISH_REASON_STOP and stopped.output == free.output[: at + 1]


INF, NAN = math.inf, math.nan
VOCAB = -1  # stands for the worker's
OUT_OF_RANGE: list[tuple[str, object]] = [
    *(("temperature", bad) for bad in (-1.0, NAN, INF)),
    *(("top_p", bad) for bad in (0.0, 1.5, NAN)),
    *(("min_p", bad) for bad in (-0.5, 1.5, NAN)),
    *(("repetition_penalty", bad) for bad in (0.0, -1.0, NAN, INF)),
    *(("presence_penalty", bad) for bad in (NAN, INF)),
    *(("frequency_penalty", bad) for bad in (NAN, -INF)),
    *(("logit_bias", bad) for bad in ({5: NAN}, {5: INF}, {5: 0.0, VOCAB: 0.0})),
    ("logprobs", 21),
]


def test_what_is_out_of_range_or_not_served_is_refused_by_name(session: Session) -> None:
    def refused(field: str, start: pb.RowStart) -> None:
        good = row().start(session.info.served_names[0])
        session.plan_no += 1
        session.send(
            plan=pb.Plan(
                plan_no=session.plan_no,
                base_batch=session.last_batch,
                keep=pb.Plan.KEEP_NONE,
                add=[good, start],
                steps=4,
                ceiling_blocks=99,
            )
        )
        answer = session.until("refused").refused
        assert answer.reason in (pb.Refused.REASON_UNSUPPORTED, pb.Refused.REASON_INVALID)
        assert answer.detail.startswith(field), f"{field}: {answer.detail}"
        assert [r.request for r in answer.rows] == [start.row.request]

    for field, value in OUT_OF_RANGE:
        start = row().start(session.info.served_names[0])
        if isinstance(value, dict):
            start.sampling.logit_bias.update(
                {session.info.vocab_size if k == VOCAB else k: v for k, v in value.items()}
            )
        else:
            setattr(start.sampling, field, value)
        refused(field, start)
    for field, value in (("adapter", "a"), ("deadline_ms_left", 5)):
        start = row().start(session.info.served_names[0])
        setattr(start, field, value)
        refused(field, start)
    ok = row(max_tokens=2)
    assert len(session.run(add=[ok], steps=4).rows) == 1, "nothing of a refused plan is left"


def test_every_sampling_field_is_served_alike_for_every_slicing(session: Session) -> None:
    bias = {3: 1.5, session.info.vocab_size - 1: -100.0}
    fields: dict[str, object] = dict(
        top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.5
    )
    whole = row(max_tokens=12, temperature=0.8, seed=2**64 - 1, sampling={**fields, "logit_bias": bias, "logprobs": 3})
    session.run(add=[whole], steps=16)
    sliced = dataclasses.replace(whole, request=next(_requests), output=[], logprobs=[], finish=0)
    beside = row(max_tokens=30)
    session.run(add=[beside, sliced], steps=5)
    while not sliced.finish:
        session.run(keep="survivors", steps=1)
    session.send(drop=pb.Drop(rows=[beside.id]))
    assert sliced.output == whole.output
    assert [list(told.top_ids) for told in sliced.logprobs] == [list(told.top_ids) for told in whole.logprobs]


def test_logprobs_of_rows_that_ask(session: Session) -> None:
    vocab = session.info.vocab_size
    chosen, some, most = (row(max_tokens=5, sampling={"logprobs": k}) for k in (0, 2, 20))
    session.run(add=[chosen, row(max_tokens=5), some, most], steps=8)
    for asked, count in ((chosen, 0), (some, 2), (most, 20)):
        assert len(asked.logprobs) == 5
        for token, told in zip(asked.output, asked.logprobs, strict=True):
            assert told.chosen <= 0 and len(told.top_ids) == len(told.top) == count
            assert list(told.top) == sorted(told.top, reverse=True) and sum(map(math.exp, told.top)) <= 1 + 1e-5
            assert len(set(told.top_ids)) == count and all(id_ < vocab for id_ in told.top_ids)
            # Greedy, and nothing was changed: what was drawn is what is most likely.
            assert not count or (told.top_ids[0], told.top[0]) == (token, told.chosen)


def test_a_bad_token_id_or_length_is_refused(session: Session) -> None:
    for bad in (row(max_tokens=0), row(session.info.max_context, 5)):
        session.plan(add=[bad], steps=4)
        assert session.until("refused").refused.reason in (pb.Refused.REASON_UNSUPPORTED, pb.Refused.REASON_INVALID)
    out_of_range = row()
    out_of_range.prompt[3] = session.info.vocab_size
    session.plan(add=[out_of_range], steps=4)
    assert session.until("refused").refused.reason in (pb.Refused.REASON_UNSUPPORTED, pb.Refused.REASON_INVALID)


def test_resync_and_ping(session: Session) -> None:
    session.run(add=[row(64, 3)], steps=4)
    known = set(session.blocks)
    assert len(known) >= 4
    session.send(resync=pb.Resync())
    session.snapshot()
    assert session.blocks == known
    session.send(ping=pb.Ping(nonce=5))
    assert session.until("pong").pong.nonce == 5


def test_the_higher_owner_takes_the_worker_over(worker: Process, session: Session) -> None:
    a = row(max_tokens=300)
    session.plan(add=[a], steps=300)
    session.until("step")
    with Session(worker.url, session.owner_epoch) as equal:  # type: ignore[attr-defined]
        refused = equal.until("refused").refused
        assert refused.reason == pb.Refused.REASON_NOT_OWNER
        assert equal.receive() is None
    with Session(worker.url) as higher:  # type: ignore[attr-defined]
        higher.snapshot()
        assert session.until("goodbye")
        b = row(max_tokens=3)
        higher.run(add=[b], steps=4)
        assert len(b.output) == 3
        assert higher.load and higher.load.held_rows == 0, "the old owner's rows are gone"
