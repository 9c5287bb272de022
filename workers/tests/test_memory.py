"""Memory of the engine: promises, eviction of held rows, ceilings, what is found again; and a random router against all
of it.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scls_router.proto import worker_pb2 as pb
from worker_harness import Router, ids_of, kinds, mock_output, of, row_id, start, unpack

LIST, NONE = pb.Plan.KEEP_LIST, pb.Plan.KEEP_NONE


def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    router = Router(blocks=8)
    # 20 + 13 - 1 = 32 positions are eight blocks; one token more is one block more.
    router.plan(1, add=[start(1, 20, 14)])
    (refused,) = of(router.take(), "refused")
    assert (refused.reason, refused.free_blocks) == (pb.Refused.REASON_NO_MEMORY, 8)
    assert router.engine.rows == {} and router.pool.reserved == 0
    router.plan(1, add=[start(1, 20, 13)])
    router.run()
    assert len(router.outputs[1, 0]) == 13 and of(router.session.sent, "slice_report")[0].peak_blocks == 8


def test_steps_bound_what_a_row_reserves() -> None:
    router = Router(blocks=8)
    router.plan(1, steps=13, add=[start(1, 20, 1000)])
    assert router.engine.ready and router.pool.reserved == 8


def test_ceiling_blocks_count_without_sharing() -> None:
    prompt = list(range(10, 30))
    router = Router(blocks=64)
    router.plan(1, ceiling_blocks=11, add=[start(1, prompt, 4), start(2, prompt, 4)])
    assert of(router.take(), "refused")[0].reason == pb.Refused.REASON_NO_MEMORY
    router.plan(1, ceiling_blocks=12, add=[start(1, prompt, 4), start(2, prompt, 4)])
    (report,) = of(router.run(), "slice_report")
    assert report.peak_blocks == 7  # five shared


def test_held_rows_are_evicted_lowest_rank_first() -> None:
    router = Router(blocks=16, chunk_tokens=64)
    rows = [start(i, 15, 30, hold_rank=rank) for i, rank in ((1, 30), (2, 10), (3, 20))]
    router.plan(1, steps=1, add=rows)
    router.run()
    assert router.pool.held == 12 and router.pool.free == 4
    # Eight blocks wanted, four free: row 2 goes. Its three whole blocks turn cached and are evicted from their end.
    router.plan(2, 1, keep=NONE, steps=5, add=[start(4, 28, 5)])
    router.run()
    held = {key.request: len(row.blocks) for key, row in router.engine.rows.items()}
    assert held == {1: 4, 2: 0, 3: 4}
    # It is prefilled anew when planned, and draws on as if nothing had been.
    router.plan(3, 2, keep=LIST, keep_rows=[row_id(2)], steps=100)
    messages = router.run()
    assert router.outputs[2, 0] == mock_output(ids_of(rows[1]), 30)
    (row,) = of(messages, "slice_report")[0].rows
    assert row.cached % 4 == 0 and row.computed + row.cached == 15 + 29


def test_a_held_row_keeps_its_kv_while_nobody_takes_it() -> None:
    """What a batch could need is promised; what it does need is taken."""
    router = Router(blocks=16, chunk_tokens=64)
    router.plan(1, steps=1, add=[start(1, 15, 30)])
    router.run()
    stop = mock_output(ids_of(start(2, 15, 40)), 3)[2]
    router.plan(2, 1, keep=NONE, add=[start(2, 15, 40, stop_token_ids=[stop])])
    assert router.pool.reserved == 14
    router.run()
    assert len(router.outputs[2, 0]) == 3 and router.pool.held == 4


def test_hold_ranks_of_the_plan_itself_count() -> None:
    router = Router(blocks=16, chunk_tokens=64)
    router.plan(1, steps=1, add=[start(i, 15, 30, hold_rank=i) for i in (1, 2, 3)])
    router.run()
    ranks = [pb.HoldRank(row=row_id(1), rank=9), pb.HoldRank(row=row_id(7), rank=9)]
    router.plan(2, 1, keep=NONE, steps=5, add=[start(4, 28, 5)], hold_ranks=ranks)
    router.run()
    assert {key.request for key, row in router.engine.rows.items() if row.blocks} == {1, 3}
    assert {key.request: row.hold_rank for key, row in router.engine.rows.items()} == {1: 9, 2: 2, 3: 3}


def test_no_row_loses_its_kv_for_a_plan_that_cannot_fit() -> None:
    router = Router(blocks=16, chunk_tokens=64)
    router.plan(1, steps=1, add=[start(i, 15, 30) for i in (1, 2, 3)])
    router.run()
    router.plan(2, 1, keep=LIST, keep_rows=[row_id(1)], steps=5, add=[start(4, 44, 5)])
    assert of(router.take(), "refused")[0].held_blocks == 12
    assert all(len(row.blocks) == 4 for row in router.engine.rows.values())
    # Without the kept row it does.
    router.plan(2, 1, keep=NONE, steps=5, add=[start(4, 44, 5)])
    assert router.engine.ready


def test_a_standing_plan_that_does_not_fit_is_refused_at_the_base_end() -> None:
    router = Router(blocks=8)
    router.plan(1, steps=2, add=[start(1, 15, 30)])
    router.plan(2, 1, steps=20, add=[start(2, 15, 30)])
    messages = router.run()
    assert kinds(messages)[-3:] == ["refused", "slice_report", "load"]
    assert of(messages, "slice_report")[0].next_batch == 0 and of(messages, "refused")[0].plan_no == 2
    assert router.pool.held == 4 and router.pool.reserved == 0
    router.plan(3, 1, steps=5)
    router.run()
    assert len(router.outputs[1, 0]) == 7


def test_release_kv() -> None:
    router = Router()
    row = start(1, 15, 10)
    router.plan(1, steps=2, add=[row, start(2, 15, 10)])
    router.plan(2, 1, leave=[row_id(1)], steps=2)
    router.say(release_kv=pb.ReleaseKv(rows=[row_id(1)]))  # running: ignored
    router.run()
    assert router.pool.held == 9
    router.say(release_kv=pb.ReleaseKv(rows=[row_id(1), row_id(5)]))
    assert router.pool.held == 5 and len(router.engine.rows) == 2
    router.plan(3, 2, keep=LIST, keep_rows=[row_id(1)])
    messages = router.run()
    assert router.outputs[1, 0] == mock_output(ids_of(row), 10)
    report = of(messages, "slice_report")[0].rows[0]
    assert (report.cached, report.computed) == (16, 8)


def test_hashes_are_told_before_the_report_and_evictions_too() -> None:
    router = Router(blocks=8)
    router.plan(1, add=[start(1, 16, 3)])
    messages = router.run()
    assert kinds(messages) == ["kv_delta", "step", "step", "step", "slice_report", "load"]
    assert len(router.hashes) == 4
    router.plan(2, 1, add=[start(2, 28, 2)])
    messages = router.run()
    removed = [hash_ for delta in of(messages, "kv_delta") for hash_ in unpack(delta.removed_le_u64)]
    assert len(removed) == 4 and router.hashes == set(router.pool.names())
    assert kinds(messages).index("slice_report") > max(
        i for i, kind in enumerate(kinds(messages)) if kind == "kv_delta"
    )


def test_equal_blocks_that_rows_decode_apart_become_one() -> None:
    prompt = list(range(10, 16))  # one and a half blocks
    router = Router()
    router.plan(1, add=[start(1, prompt, 20), start(2, prompt, 20)])
    router.step(8)
    one, two = router.engine.batch.rows
    assert list(one.blocks)[:3] == list(two.blocks)[:3]
    router.run()
    assert router.outputs[1, 0] == router.outputs[2, 0]
    assert router.pool.cached == 6 and router.pool.free == router.pool.blocks - 6


def test_a_colliding_hash_is_a_miss_and_its_row_stays_unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "scls_worker.rows.hash_blocks", lambda root, ids, size: [root + 1 + i for i in range(len(ids) // size)]
    )
    router = Router()
    first, second = start(1, 10, 6), start(2, 10, 6)
    router.plan(1, add=[first])
    router.run()
    router.plan(2, 1, add=[second])
    (step, *_) = of(router.run(), "step")
    assert step.rows[0].cached_tokens == 0
    assert router.outputs[2, 0] == mock_output(ids_of(second), 6)
    assert len(router.pool.names()) == 3


# ---------------------------------------------------------------- a random router

ROW = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 24),
        "max_tokens": st.integers(1, 20),
        "family": st.integers(0, 3),  # rows of one family share what they can of their prompts
        "hold_rank": st.integers(0, 3),
    }
)
ACT = st.one_of(
    st.tuples(st.just("plan"), st.lists(ROW, max_size=3), st.integers(1, 12), st.integers(0, 2**16)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cut"), st.integers(0, 8)),
    st.tuples(st.just("drop"), st.integers(0, 30)),
    st.tuples(st.just("release"), st.integers(0, 30)),
    st.tuples(st.just("resync")),
)


@settings(max_examples=150, deadline=None)
@given(acts=st.lists(ACT, max_size=40), blocks=st.integers(12, 40), chunk=st.sampled_from([3, 8, 64]))
def test_a_random_router(acts: list[tuple], blocks: int, chunk: int) -> None:
    router = Router(blocks=blocks, chunk_tokens=chunk)
    starts: dict[int, pb.RowStart] = {}
    next_plan = 1
    for kind, *values in acts:
        running = router.engine.batch or router.engine.base
        if kind == "plan":
            rows, steps, bits = values
            add = []
            for row in rows:
                request = len(starts) + 1
                prompt = [10 + 50 * row["family"] + i for i in range(row["prompt"])]
                starts[request] = start(request, prompt, row["max_tokens"], hold_rank=row["hold_rank"])
                add.append(starts[request])
            known = [key.id() for key in router.engine.rows]
            some = [key for i, key in enumerate(known) if bits >> i & 1]
            keep = [pb.Plan.KEEP_SURVIVORS, NONE, LIST][bits % 3]
            router.plan(
                next_plan,
                running.number if running else 0,
                steps=steps,
                keep=keep,
                keep_rows=some if keep == LIST else [],
                leave=known[: bits % 2],
                add=add,
            )
            next_plan += 1
        elif kind == "step":
            for _ in range(values[0]):
                if router.engine.ready:
                    router.step()
        elif kind == "cut" and running:
            router.say(cut=pb.Cut(batch=running.number, after_step=values[0]))
        elif kind == "drop":
            router.say(drop=pb.Drop(rows=[row_id(values[0])]))
        elif kind == "release":
            router.say(release_kv=pb.ReleaseKv(rows=[row_id(values[0])]))
        elif kind == "resync":
            router.say(resync=pb.Resync())
        router.take()
        assert router.hashes == set(router.pool.names())
    router.run()
    for (request, _), output in router.outputs.items():
        row = starts[request]
        assert output == mock_output(ids_of(row), len(output))
    for report in of(router.session.sent, "slice_report"):
        assert report.end != pb.SliceReport.END_ERROR, report.error
    promised = sum(row.promised for row in router.engine.rows.values())
    assert promised == router.pool.reserved == 0
    router.say(drop=pb.Drop(rows=[key.id() for key in router.engine.rows]))
    assert router.pool.running == router.pool.held == 0
