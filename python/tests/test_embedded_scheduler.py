"""The in-process scheduler, driven with the worker of docs/scheduler.md: whatever happens, answers are exact."""

from __future__ import annotations

import contextlib
import pickle
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scls_router import (
    CostModel,
    NoWorker,
    RequestExists,
    Scheduler,
    UnknownPolicy,
    UnknownScheduler,
    UnknownWorker,
    WorkerExists,
    hash_blocks,
    scheduling,
)
from scls_router.scheduling import (
    Cut,
    Drop,
    Finish,
    Plan,
    Quarantine,
    Reject,
    Resync,
    RowId,
    RowKey,
    RowReport,
    RowTokens,
    SliceReport,
    Tokens,
    WakeAt,
)

PAGE = (Path(__file__).parents[2] / "docs" / "scheduler.md").read_text()
STEP = 0.01


def toy() -> dict[str, Any]:
    """The page's first block: its worker."""
    found = re.search(r"^```python\n(.*?)^```", PAGE, flags=re.S | re.M)
    assert found
    names: dict[str, Any] = {"__name__": "builtins"}
    exec(compile(found[1], "scheduler.md", "exec"), names)
    return names


WORKER = toy()["Worker"]


def answer(prompt: list[int], tokens: int) -> list[int]:
    """What the page's worker draws."""
    known = list(prompt)
    for _ in range(tokens):
        known.append(sum(known) % 100)
    return known[len(prompt) :]


class Fleet:
    """Workers, a clock, and what clients have."""

    def __init__(self, **options: Any) -> None:
        self.scheduler = Scheduler(**options)
        self.workers: dict[str, Any] = {}
        self.now = 0.0
        self.answers: dict[RowId, list[int]] = {}
        self.ends: dict[RowId, Finish] = {}
        self.rejected: list[Reject] = []
        self.wakes: list[float] = []

    def join(self, name: str, **options: Any) -> None:
        self.workers[name] = WORKER(name, self.scheduler)
        options = {"blocks": 10_000, "max_rows": 4, "max_context": 1000} | options
        self.do(self.scheduler.join(name, now=self.now, **options))
        self.do(self.scheduler.snapshot(name, [], now=self.now))

    def do(self, actions: Iterable[scheduling.Action]) -> None:
        for action in actions:
            match action:
                case Plan() | Cut() | Drop():
                    if action.worker in self.workers:
                        self.workers[action.worker].do(action)
                case Tokens(row, first_index, ids):
                    answer = self.answers.setdefault(row, [])
                    assert first_index == len(answer) and row not in self.ends
                    answer.extend(ids)
                case Finish(row=row):
                    assert row not in self.ends
                    self.ends[row] = action
                case Reject():
                    self.rejected.append(action)
                case WakeAt(at):
                    self.wakes.append(at)
                case Quarantine() | Resync():
                    raise AssertionError(action)

    def step(self) -> None:
        self.now += STEP
        if self.wakes and not any(worker.plan for worker in self.workers.values()):
            self.now = max(self.now, min(self.wakes))  # nothing happens before
        for name, worker in list(self.workers.items()):
            if worker.plan and self.workers.get(name) is worker:
                self.do(worker.iterate(self.now))
        if self.wakes and min(self.wakes) <= self.now:
            self.wakes = [at for at in self.wakes if at > self.now]
            self.do(self.scheduler.tick(now=self.now))


happenings = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "arrive", "step", "step", "cancel", "lose", "drain", "join"]),
        st.integers(0, 5),
        st.integers(1, 12),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(happenings, st.sampled_from([None, 1, 3, 8]), st.sampled_from(["slice", "ils", "scls", "sls"]))
def test_answers_are_exact_whatever_happens(
    happenings: list[tuple[str, int, int]], slice_len: int | None, mode: str
) -> None:
    fleet = Fleet(slice_len=slice_len, scheduler=mode)
    asked: dict[int, tuple[list[int], int, int]] = {}
    cancelled: set[int] = set()
    lost = False
    fleet.join("0")
    for what, which, size in happenings:
        name = str(which % 3)
        if what == "arrive":
            asked[len(asked)] = prompt, most, rows = [which, size, 7], size, 1 + which // 4
            arrived = fleet.scheduler.arrive(
                len(asked) - 1, prompt, max_tokens=most, n=rows, urgent=size == 1, now=fleet.now
            )
            fleet.do(arrived)
        elif what == "step":
            for _ in range(size):
                fleet.step()
        elif what == "cancel" and asked:
            cancelled.add(which % len(asked))
            fleet.do(fleet.scheduler.cancel(which % len(asked), now=fleet.now))
        elif what == "lose" and name in fleet.workers:
            lost = True
            del fleet.workers[name]
            fleet.do(fleet.scheduler.lost(name, now=fleet.now))
        elif what == "drain" and name in fleet.workers:
            fleet.do(fleet.scheduler.drain(name, now=fleet.now))
        elif what == "join" and name not in fleet.workers:
            fleet.join(name)
    if "end" not in fleet.workers:
        fleet.join("end")
    for _ in range(2000):
        if not fleet.scheduler.rows:
            break
        fleet.step()

    refused = {reject.request for reject in fleet.rejected}
    for request, (prompt, most, rows) in asked.items():
        for row in (RowId(request, choice) for choice in range(rows)):
            if request in refused:
                assert row not in fleet.ends and row not in fleet.answers
                continue
            end, got = fleet.ends[row], fleet.answers.get(row, [])
            assert got == answer(prompt, len(got)) and end.emitted == len(got) and end.prompt == 3
            allowed = {"length"} | ({"cancelled"} if request in cancelled else set()) | ({"error"} if lost else set())
            assert end.reason in allowed
            assert (end.reason == "length") == (len(got) == most) or end.reason == "cancelled"
            assert (end.error is None) == (end.reason != "error")
    for load in fleet.scheduler.workers():
        assert (load.queued_tokens, load.batch_size, load.work, load.held_rows) == (0, 0, 0.0, 0)
    assert all(d.worker in {c.worker for c in d.candidates} for d in fleet.scheduler.decisions())
    for record in fleet.scheduler.batches():
        assert record.band.lo <= record.band.hi


def test_a_request_in_four_slices() -> None:
    fleet = Fleet(slice_len=3)
    fleet.join("a")
    fleet.do(fleet.scheduler.arrive(9, np.array([1, 2]), max_tokens=10, now=0.0))
    while fleet.scheduler.rows:
        fleet.step()
    row = RowId(9, 0)
    assert fleet.answers == {row: answer([1, 2], 10)}
    end = fleet.ends[row]
    assert (end.reason, end.prompt, end.emitted, end.slices, end.worker) == ("length", 2, 10, 4, "a")
    assert fleet.scheduler.slice_len == 3
    assert repr(fleet.scheduler) == 'Scheduler(policy="product_anticipating", scheduler="slice", workers=1, rows=0)'


def test_the_time_of_a_batch_is_known_before_it_runs() -> None:
    exact = CostModel.paged(
        prefill_constant=0.0,
        prefill_per_token=0.0,
        prefill_per_pair=0.0,
        step_constant=STEP,
        step_per_row=0.0,
        step_per_context=0.0,
    )
    fleet = Fleet(slice_len=4)
    fleet.join("a", cost_model=exact)
    for request in range(30):
        fleet.do(fleet.scheduler.arrive(request, [request], max_tokens=1 + request, now=fleet.now))
        fleet.step()
    while fleet.scheduler.rows:
        fleet.step()
    records = fleet.scheduler.batches()
    outcomes = [record.outcome for record in records if record.outcome is not None]
    assert len(outcomes) > 30 and all(record.worker == "a" for record in records)
    assert all(outcome.time == pytest.approx(outcome.steps * STEP) for outcome in outcomes)
    assert all(outcome.covered for outcome in outcomes)
    assert all(outcome.peak <= record.ceiling for record, outcome in zip(records, outcomes, strict=False))
    assert pickle.loads(pickle.dumps(records)) == records


def test_what_is_cached_is_found() -> None:
    scheduler = Scheduler(block_size=4, hash_root=5)
    ids = list(range(17))
    for name in ("a", "b"):
        scheduler.join(name, blocks=100, max_rows=4, max_context=100, now=0.0)
        scheduler.snapshot(name, [], last=False, now=0.0)
        scheduler.snapshot(name, hash_blocks(5, ids[:8], 4) if name == "b" else [], now=0.0)

    def new_tokens() -> dict[str, int]:
        return {c.worker: c.new_tokens for c in scheduler.route(ids, now=0.0).candidates}

    assert new_tokens() == {"a": 17, "b": 9}
    scheduler.kv_delta("a", stored=hash_blocks(5, ids, 4), now=0.1)
    assert new_tokens() == {"a": 1, "b": 9}
    scheduler.kv_delta("a", removed=hash_blocks(5, ids, 4)[1:], now=0.1)
    assert new_tokens() == {"a": 13, "b": 9}
    decision = scheduler.route(ids, now=0.2)
    assert (decision.worker, decision.row, decision.at, decision.policy) == ("b", None, 0.2, "product_anticipating")
    assert scheduler.decisions() == [], "it was only asked"
    scheduler.arrive(1, ids, max_tokens=4, now=0.3)
    (made,) = scheduler.decisions()
    assert made.worker == "b" and made.row == RowId(1, 0) and pickle.loads(pickle.dumps(made)) == made


def test_a_name_in_a_record_is_who_it_was() -> None:
    fleet = Fleet()
    fleet.join("old")
    fleet.do(fleet.scheduler.arrive(1, [1], max_tokens=1, now=0.0))
    fleet.now = 1.0
    fleet.do(fleet.scheduler.lost("old", now=1.0))
    fleet.now = 2.0
    fleet.join("new")
    fleet.do(fleet.scheduler.arrive(2, [1], max_tokens=1, now=2.0))
    assert [load.name for load in fleet.scheduler.workers()] == ["new"]
    assert {d.row.request: d.worker for d in fleet.scheduler.decisions() if d.row}[2] == "new"
    assert fleet.scheduler.decisions()[0].worker == "old"


def test_an_id_is_free_when_its_rows_have_ended() -> None:
    fleet = Fleet(max_rows=2)
    assert fleet.scheduler.arrive(1, [1], max_tokens=1, now=0.0) == [Reject(1, "no_worker", "no worker is ready", None)]
    fleet.join("a")
    fleet.do(fleet.scheduler.arrive(1, [1], max_tokens=5, n=2, now=0.0))
    with pytest.raises(RequestExists, match="1"):
        fleet.scheduler.arrive(1, [1], max_tokens=1, now=0.0)
    (reject,) = fleet.scheduler.arrive(2, [1], max_tokens=1, now=0.0)
    assert isinstance(reject, Reject)
    assert reject.reason == "overloaded" and reject.retry_after is not None and reject.retry_after >= 0
    fleet.do(fleet.scheduler.cancel(1, choice=0, now=0.0))
    with pytest.raises(RequestExists):
        fleet.scheduler.arrive(1, [1], max_tokens=1, now=0.0)
    fleet.do(fleet.scheduler.cancel(1, now=0.0))
    assert {end.reason for end in fleet.ends.values()} == {"cancelled"} and fleet.scheduler.rows == 0
    assert fleet.scheduler.cancel(1, now=0.0) == []
    reasons = [
        fleet.scheduler.arrive(3, prompt, max_tokens=most, n=n, now=0.0)
        for prompt, most, n in (([], 1, 1), ([1], 0, 1), ([1], 1, 0), ([1], 1000, 1))
    ]
    assert [reject.reason for (reject,) in reasons] == ["empty", "empty", "empty", "never_fits"]  # type: ignore[union-attr]


def test_what_cannot_be_true_is_quarantine() -> None:
    scheduler = Scheduler(vocab=100)
    scheduler.join("a", blocks=10, max_rows=4, max_context=100, now=0.0)
    scheduler.snapshot("a", [], now=0.0)
    (found,) = scheduler.slice_reported("a", SliceReport(7, "steps", 1, ()), now=0.0)
    assert isinstance(found, Quarantine) and found.worker == "a" and "7" in found.why
    actions = scheduler.arrive(1, [1], max_tokens=4, now=0.0)
    plan = next(action for action in actions if isinstance(action, Plan))
    (found,) = scheduler.steps("a", plan.no, [RowTokens(plan.add[0].key, 0, (100,))], now=0.0)
    assert isinstance(found, Quarantine) and "vocabulary" in found.why
    assert any(isinstance(action, WakeAt) for action in scheduler.lost("a", now=0.5)), "its row waits for another"


def test_a_refusal_for_memory_ends_a_row_that_is_alone() -> None:
    scheduler = Scheduler()
    scheduler.join("a", blocks=10, max_rows=4, max_context=100, now=0.0)
    scheduler.snapshot("a", [], now=0.0)
    plan = next(a for a in scheduler.arrive(1, [1], max_tokens=4, now=0.0) if isinstance(a, Plan))
    key = plan.add[0].key
    actions = scheduler.refused("a", plan.no, "no_memory", rows=[key], detail="none is left", now=0.1)
    (end,) = (action for action in actions if isinstance(action, Finish))
    assert end.reason == "error" and end.error is not None and "none is left" in end.error


def test_workers_come_and_go_by_name() -> None:
    scheduler = Scheduler()
    size: dict[str, Any] = {"blocks": 10, "max_rows": 4, "max_context": 100, "now": 0.0}
    with pytest.raises(NoWorker):
        scheduler.route([1], now=0.0)
    scheduler.join("a", **size)
    with pytest.raises(WorkerExists, match="a"):
        scheduler.join("a", **size)
    assert not scheduler.workers()[0].ready, "its snapshot is to come"
    scheduler.snapshot("a", [], now=0.0)
    assert scheduler.workers()[0].ready
    scheduler.drain("a", now=0.0)
    assert not scheduler.workers()[0].ready
    scheduler.lost("a", now=0.0)
    assert scheduler.workers() == []
    calls = [
        lambda: scheduler.lost("a", now=0.0),
        lambda: scheduler.drain("a", now=0.0),
        lambda: scheduler.snapshot("a", [], now=0.0),
        lambda: scheduler.kv_delta("a", now=0.0),
        lambda: scheduler.steps("a", 1, [], now=0.0),
        lambda: scheduler.slice_reported("a", SliceReport(1, "steps", 1, ()), now=0.0),
        lambda: scheduler.refused("a", 1, "stale", now=0.0),
    ]
    for call in calls:
        with pytest.raises(UnknownWorker, match="no such worker: a"):
            call()


def test_what_makes_no_sense_is_an_error() -> None:
    scheduler = Scheduler()
    size: dict[str, Any] = {"blocks": 10, "max_rows": 4, "max_context": 100, "now": 0.0}
    with pytest.raises(UnknownPolicy, match="round_robin"):
        Scheduler("prodcut")
    with pytest.raises(UnknownScheduler, match="slice, scls, sls, ils"):
        Scheduler(scheduler="slices")
    for options in ({"block_size": 0}, {"slice_len": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Scheduler(**options)  # type: ignore[arg-type]
    for what in ("blocks", "max_rows", "max_context", "chunk_tokens"):
        with pytest.raises(ValueError, match=f"{what} must be at least 1"):
            scheduler.join("a", **size | {what: 0})
    padded = CostModel.padded(prefill=(0, 0, 0, 1), step=(1, 0, 0, 0))
    with pytest.raises(ValueError, match="layout"):
        scheduler.join("a", **size, layout="paged", cost_model=padded)
    with pytest.raises(ValueError, match="no such layout"):
        scheduler.join("a", **size, layout="flat")
    for now in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="now is in seconds"):
            scheduler.tick(now=now)
    assert scheduler.workers() == []
    scheduler.join("a", **size, cost_model=padded)
    key = RowKey(1, 0, 0)
    with pytest.raises(ValueError, match="no such finish reason: done"):
        scheduler.steps("a", 1, [RowTokens(key, 0, (1,), finish="done")], now=0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4294967296 at index 0"):
        scheduler.steps("a", 1, [RowTokens(key, 0, (2**32,))], now=0.0)
    with pytest.raises(ValueError, match="no such end of a batch: over"):
        scheduler.slice_reported("a", SliceReport(1, "over", 1, ()), now=0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decode is in seconds"):
        scheduler.slice_reported("a", SliceReport(1, "steps", 1, (), decode=-1.0), now=0.0)
    with pytest.raises(ValueError, match="no such reason of a refusal: why"):
        scheduler.refused("a", 1, "why", now=0.0)  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        scheduler.snapshot("a", [2**64], now=0.0)
    with pytest.raises(TypeError, match="str"):
        scheduler.arrive(1, "text", max_tokens=1, now=0.0)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="key"):
        scheduler.steps("a", 1, [3], now=0.0)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="now"):
        scheduler.tick()  # type: ignore[call-arg]


def test_values_are_frozen_and_pickle() -> None:
    report = SliceReport(1, "cut", 3, (RowReport(RowKey(1, 0, 0), computed=3, emitted=3),), next=2)
    for value in (report, RowTokens(RowKey(1, 0, 2), 0, (5,), "stop"), Cut("a", 1), WakeAt(1.5)):
        assert pickle.loads(pickle.dumps(value)) == value
        with pytest.raises(AttributeError):
            setattr(value, type(value).__match_args__[0], 7)
    for name in scheduling.__all__:
        assert hasattr(scheduling, name)


def test_clocks_that_jump_do_no_harm() -> None:
    fleet = Fleet(slice_len=2)
    fleet.join("a")
    fleet.do(fleet.scheduler.arrive(1, [1], max_tokens=9, now=1e9))
    for now in (5.0, 1e12, 0.0, 1e300, 3.0, 2.0, 1.0, 0.5, 0.1):
        fleet.do(fleet.workers["a"].iterate(now))
    assert fleet.answers == {RowId(1, 0): answer([1], 9)}


def test_threads_lose_nothing() -> None:
    scheduler = Scheduler(max_rows=10_000)
    for name in "abcd":
        scheduler.join(name, blocks=10_000, max_rows=8, max_context=1000, now=0.0)
        scheduler.snapshot(name, [], now=0.0)

    def serve(first: int) -> None:
        for request in range(first, first + 200):
            scheduler.arrive(request, [request], max_tokens=3, now=0.0)
            scheduler.workers()
        for request in range(first, first + 200):
            scheduler.cancel(request, now=1.0)

    threads = [threading.Thread(target=serve, args=(at * 1000,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scheduler.rows == 0 and len(scheduler.decisions()) == 800
    assert all((load.batch_size, load.queued_tokens) == (0, 0) for load in scheduler.workers())


number = st.one_of(st.integers(0, 6), st.sampled_from([2**31, 2**32 - 1]))
large = st.one_of(number, st.sampled_from([2**63, 2**64 - 1]))
key = st.builds(RowKey, st.integers(0, 3), st.integers(0, 2), st.integers(0, 2))
reason = st.sampled_from([None, "stop", "length", "cancelled", "error"])
drawn = st.builds(RowTokens, key, number, st.lists(number, max_size=3).map(tuple), reason, st.none() | large)
seconds = st.sampled_from([0.0, 1e-6, 0.01, 5.0, 1e12, 1e300])
row_report = st.builds(RowReport, key, large, large, large, reason, st.booleans(), large)
report = st.builds(
    SliceReport,
    large,
    st.sampled_from(["steps", "all_done", "cut", "backpressure", "error"]),
    number,
    st.lists(row_report, max_size=3).map(tuple),
    st.none() | large,
    *[seconds, seconds, large, seconds, large, large],
)
sizes = st.sampled_from([1, 2, 100, 2**32 - 1])
worker = st.sampled_from("ab")
model = st.sampled_from(
    [
        None,
        CostModel.padded(prefill=(0, 0, 0, 86_399), step=(0, 0, 0, 86_399)),
        CostModel.padded(prefill=(0, 0, 0, 0), step=(0, 0, 0, 0)),
    ]
)
said = st.one_of(
    st.tuples(
        st.just("join"),
        worker,
        st.fixed_dictionaries(
            {"blocks": sizes, "max_rows": sizes, "max_context": sizes, "chunk_tokens": sizes, "cost_model": model}
        ),
    ),
    st.tuples(st.sampled_from(["lost", "drain"]), worker),
    st.tuples(st.just("snapshot"), worker, st.lists(large, max_size=3), st.fixed_dictionaries({"last": st.booleans()})),
    st.tuples(st.just("kv_delta"), worker, st.fixed_dictionaries({"stored": st.lists(large, max_size=3)})),
    st.tuples(
        st.just("arrive"),
        st.integers(0, 3),
        st.lists(number, max_size=40),
        st.fixed_dictionaries({"max_tokens": large, "n": st.integers(0, 3), "urgent": st.booleans()}),
    ),
    st.tuples(st.just("cancel"), st.integers(0, 3), st.fixed_dictionaries({"choice": st.none() | number})),
    st.tuples(st.just("steps"), worker, large, st.lists(drawn, max_size=3)),
    st.tuples(st.just("slice_reported"), worker, report),
    st.tuples(
        st.just("refused"),
        worker,
        large,
        st.sampled_from(["stale", "no_memory", "too_many_rows", "unknown_row", "unsupported"]),
        st.fixed_dictionaries({"rows": st.lists(key, max_size=3)}),
    ),
    st.tuples(st.just("tick")),
    st.tuples(st.just("route"), st.lists(number, min_size=1, max_size=40)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["slice", "ils", "scls", "sls", "so", "pm", "ab", "lb"]),
    st.sampled_from(["product", "product_anticipating", "product_time", "round_robin", "random", "least_requests"]),
    st.none() | sizes,
    st.lists(st.tuples(seconds, said), max_size=40),
)
def test_whatever_is_said_nothing_panics(
    mode: str, policy: str, slice_len: int | None, said: list[tuple[float, tuple[Any, ...]]]
) -> None:
    scheduler = Scheduler(policy, mode, slice_len=slice_len, block_size=2)
    scheduler.join("a", blocks=50, max_rows=4, max_context=2**64 - 1, now=0.0)
    scheduler.snapshot("a", [], now=0.0)
    for now, (name, *arguments) in said:
        options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        # what is refused is refused by name; a panic of the core would be no Exception
        with contextlib.suppress(ValueError, LookupError, NoWorker):
            getattr(scheduler, name)(*arguments, **options, now=now)
    ends = {"workers": scheduler.workers(), "decisions": scheduler.decisions(), "batches": scheduler.batches()}
    assert pickle.loads(pickle.dumps(ends)) == ends
