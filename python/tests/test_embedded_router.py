"""The in-process router beside one in plain Python that keeps lists, and what a user of it meets."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import scls_router
from hypothesis import given, settings
from hypothesis import strategies as st
from scls_router import Decision, NoWorker, Router, UnknownPolicy, UnknownWorker, View, WorkerExists, hash_blocks

MODEL = Path(__file__).parents[2] / "models" / "airline-tiny"
SIZE = 4


def conversation(which: int, length: int) -> list[int]:
    """Two conversations share their first nine ids, as prompts under one system prompt do."""
    return [which // 2 * 100 + i if i < 9 else which * 100 + i for i in range(length)]


@dataclass
class Flight:
    decision: Decision
    ids: list[int]
    prefilled: bool = False


@dataclass
class Naive:
    """(Q + u) * (b + 1) by the book: everything is counted anew."""

    stored: dict[str, set[int]] = field(default_factory=dict)
    flights: list[Flight] = field(default_factory=list)
    turn: int = 0

    def hit(self, worker: str, ids: list[int]) -> int:
        held = set(self.stored[worker])
        for flight in self.flights:
            if flight.decision.worker == worker:
                held.update(hash_blocks(0, flight.ids, SIZE))
        depth = 0
        for block in hash_blocks(0, ids, SIZE)[: (len(ids) - 1) // SIZE]:
            if block not in held:
                break
            depth += 1
        return depth

    def loads(self, worker: str) -> tuple[int, int]:
        own = [flight for flight in self.flights if flight.decision.worker == worker]
        return sum(f.decision.new_tokens for f in own if not f.prefilled), len(own)

    def route(self, ids: list[int]) -> tuple[list[tuple[str, int, int, int]], list[int], str]:
        seen = [(name, len(ids) - self.hit(name, ids) * SIZE, *self.loads(name)) for name in self.stored]
        scores = [(queued + new) * (batch + 1) for _, new, queued, batch in seen]
        n = len(seen)
        best = min(range(n), key=lambda at: (scores[at], (at - self.turn) % n))
        return seen, scores, seen[best][0]


steps = st.lists(
    st.tuples(
        st.sampled_from(["route", "route", "ask", "prefilled", "finished", "take_back", "stored", "removed"]),
        st.integers(0, 3),
        st.integers(1, 40),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_it_routes_as_the_product_says(steps: list[tuple[str, int, int]]) -> None:
    router, naive = Router("product", block_size=SIZE), Naive()
    for name in "abc":
        router.add_worker(name)
        naive.stored[name] = set()
    for step, which, length in steps:
        ids = conversation(which, length)
        flight = naive.flights[length % len(naive.flights)] if naive.flights else None
        if step in ("route", "ask"):
            candidates, scores, worker = naive.route(ids)
            decision = router.route(ids, commit=step == "route")
            assert (decision.candidates, decision.scores, decision.worker) == (candidates, scores, worker)
            assert decision.recompute() == worker
            assert decision.cached_tokens + decision.new_tokens == decision.tokens == length
            if step == "route":
                naive.flights.append(Flight(decision, ids))
                naive.turn += 1
        elif step in ("stored", "removed"):
            hashes = hash_blocks(0, ids, SIZE)
            worker = "abc"[which % 3]
            router.report(worker, **{step: hashes})
            naive.stored[worker] = naive.stored[worker].union(hashes) - (set(hashes) if step == "removed" else set())
        elif flight:
            fresh = step != "prefilled" or not flight.prefilled
            assert getattr(router, step)(flight.decision) == fresh
            if step == "prefilled":
                flight.prefilled = True
            else:
                naive.flights.remove(flight)
        assert [(w.queued_tokens, w.batch_size) for w in router.workers()] == [naive.loads(name) for name in "abc"]
    for flight in naive.flights:
        assert router.finished(flight.decision)
    assert all((w.queued_tokens, w.batch_size) == (0, 0) for w in router.workers())
    assert [w.indexed_blocks for w in router.workers()] == [len(naive.stored[name]) for name in "abc"]


def test_predicted_residency_is_bounded_and_keeps_what_was_used_last() -> None:
    router = Router(block_size=SIZE)
    router.add_worker("a", blocks=6)
    old, new = conversation(0, 16), conversation(2, 16)
    for ids in (old, new):
        router.finished(router.route(ids))
    assert router.workers()[0].indexed_blocks == 6
    assert router.route([*new, 1], commit=False).cached_tokens == 16
    assert router.route([*old, 1], commit=False).cached_tokens == 8, "the end of the older chain went first"


def test_an_answer_is_predicted_but_for_its_last_id() -> None:
    router = Router(block_size=SIZE)
    router.add_worker("a", blocks=100)
    ids = conversation(0, 23)
    router.finished(router.route(ids[:6]), output=np.array(ids[6:12]))
    assert router.route(ids, commit=False).cached_tokens == 8, "11 of 12 ids are computed: two blocks"


def test_many_is_one_after_another() -> None:
    prompts = [conversation(i % 4, 5 + 3 * i) for i in range(12)]
    together, apart = Router(block_size=SIZE), Router(block_size=SIZE)
    for router in (together, apart):
        for name in "abc":
            router.add_worker(name)
    assert together.route_many(prompts) == [apart.route(prompt) for prompt in prompts]
    assert together.workers() == apart.workers()
    assert together.route_many([]) == []
    rows = np.arange(24).reshape(2, 12)
    assert [d.tokens for d in together.route_many(rows, commit=False)] == [12, 12]


def test_a_decision_is_a_value() -> None:
    router = Router("random", seed=5)
    for name in "abcd":
        router.add_worker(name)
    decisions = router.route_many([[i] for i in range(20)])
    assert pickle.loads(pickle.dumps(decisions)) == decisions
    assert decisions[0] != decisions[1]
    assert [d.id for d in decisions] == [d.turn for d in decisions] == list(range(20))
    assert all(d.recompute() == d.worker for d in decisions)
    assert len({d.worker for d in decisions}) == 4
    assert "worker=" in repr(decisions[0]) and "id=0" in repr(decisions[0])
    with pytest.raises(AttributeError):
        decisions[0].worker = "z"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(decisions[0].candidates)) == decisions[0].candidates
    with pytest.raises(ValueError, match="one of its candidates"):
        Decision(None, "product", 0, 0, 1, "z", [("a", 1, 0, 0)], [1])


def test_text_goes_through_the_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = "I want to change my flight to Boston. " * 20
    ids = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids
    for path in (MODEL, str(MODEL / "tokenizer.json")):
        router = Router(tokenizer=path)
        router.add_worker("a")
        assert router.hash_blocks(text) == hash_blocks(0, ids, 16)
        assert router.route(text).tokens == len(ids)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Router().route(text)
    with pytest.raises(FileNotFoundError, match="no/such"):
        Router(tokenizer="no/such/tokenizer.json")


def state(router: Router) -> tuple[object, ...]:
    asked = router.route([1], commit=False)
    return router.workers(), asked.turn, asked.candidates


@pytest.mark.parametrize(
    ("scores", "error", "match"),
    [
        (lambda view: 1 // 0, ZeroDivisionError, "zero"),
        (lambda view: [1], ValueError, "got 1 for 2"),
        (lambda view: [1, 2, 3], ValueError, "got 3 for 2"),
        (lambda view: [1, -1], ValueError, "worker b"),
        (lambda view: [0.5, 1], TypeError, "worker a"),
        (lambda view: None, TypeError, "iterable"),
    ],
)
def test_a_policy_that_fails_changes_nothing(
    scores: Callable[[View], list[int]], error: type[Exception], match: str
) -> None:
    failing = False
    router = Router(lambda view: scores(view) if failing and view.turn else [0, 0])
    router.add_worker("a", blocks=10)
    router.add_worker("b")
    before = state(router)
    failing = True
    with pytest.raises(error, match=match):
        router.route_many([list(range(40)), list(range(50))])
    failing = False
    assert state(router) == before


def test_a_policy_sees_what_there_is_and_decides() -> None:
    views: list[View] = []

    def last(view: View) -> list[int]:
        views.append(view)
        return [len(view.candidates) - at for at in range(len(view.candidates))]

    router = Router(last)
    for name in "ab":
        router.add_worker(name)
    first, second = router.route(range(32)), router.route(range(40))
    assert first.worker == second.worker == first.recompute() == "b"
    assert first.policy.startswith("callable:") and "last" in first.policy
    assert views == [
        View(32, 0, (("a", 32, 0, 0), ("b", 32, 0, 0))),
        View(40, 1, (("a", 40, 0, 0), ("b", 8, 32, 1))),
    ]
    assert pickle.loads(pickle.dumps(views)) == views


def test_a_policy_may_not_call_its_own_router() -> None:
    router = Router(lambda view: [len(router.workers())])
    router.add_worker("a")
    with pytest.raises(RuntimeError, match="its own router"):
        router.route([1])
    assert router.workers()[0].batch_size == 0


def test_a_router_in_a_cycle_is_collected() -> None:
    class Front:
        def __init__(self) -> None:
            self.router = Router(self.policy)

        def policy(self, view: View) -> list[int]:
            return [0 for _ in view.candidates]

    gone = weakref.ref(Front())
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("policy", ["product", lambda view: [c.batch_size for c in view.candidates]])
def test_threads_lose_nothing(policy: object) -> None:
    router = Router(policy)  # type: ignore[arg-type]
    for name in "abcd":
        router.add_worker(name, blocks=64)

    def serve(seed: int) -> None:
        for i in range(100):
            decision = router.route(np.arange(seed * 1000, seed * 1000 + 40 + i))
            router.prefilled(decision)
            router.finished(decision, output=[1, 2, 3])

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert router.route([1]).turn == 400
    loads = router.workers()
    assert sum(w.batch_size for w in loads) == 1 and sum(w.queued_tokens for w in loads) == 1
    assert all(w.indexed_blocks <= 64 for w in loads)


def test_workers_come_and_go() -> None:
    router = Router()
    with pytest.raises(NoWorker):
        router.route([1])
    router.add_worker("a")
    router.add_worker("b")
    with pytest.raises(WorkerExists, match="a"):
        router.add_worker("a")
    decision = router.route([1])
    router.remove(decision.worker)
    assert not router.finished(decision), "it ended with its worker"
    with pytest.raises(UnknownWorker, match="no such worker: z"):
        router.remove("z")
    router.add_worker("c")
    assert sorted(w.name for w in router.workers()) == sorted({"a", "b"} - {decision.worker} | {"c"})
    with pytest.raises(UnknownWorker):
        router.report("z", stored=[1])


def test_what_makes_no_sense_is_an_error() -> None:
    router = Router()
    router.add_worker("a", blocks=1)
    asked = router.route([1], commit=False)
    assert asked.id is None
    for end in (router.prefilled, router.finished, router.take_back):
        with pytest.raises(ValueError, match="commit=False"):
            end(asked)
    with pytest.raises(ValueError, match="predicted"):
        router.report("a", stored=[1])
    with pytest.raises(ValueError, match="no tokens"):
        router.route([])
    with pytest.raises(TypeError, match="several prompts"):
        router.route_many("text")
    with pytest.raises(UnknownPolicy, match="round_robin"):
        Router("prodcut")
    with pytest.raises(UnknownPolicy, match="Scheduler"):
        Router("product_time")
    with pytest.raises(TypeError, match="got int"):
        Router(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size"):
        Router(block_size=0)


def test_what_is_expected_is_in_the_record() -> None:
    router = Router("product_anticipating", block_size=4)
    for name in "ab":
        router.add_worker(name, blocks=100)
    decisions = [router.route([n] * 40) for n in range(30)]
    assert all(router.finished(decision) for decision in decisions)
    last = router.route(range(40))
    arrivals, seconds = last.anticipation
    # 29 after the first, in a second or more, at two workers; nothing was prefilled yet
    assert 0 < arrivals < 14.6 and seconds == pytest.approx(1e-4)
    assert last.score > 40 << 32 and last.recompute() == last.worker
    assert pickle.loads(pickle.dumps(last)) == last
    router.prefilled(last)
    assert router.route([1], commit=False).anticipation[1] != seconds
    with pytest.raises(UnknownPolicy, match="did you mean product_anticipating"):
        Router("product_anticipatin")


def test_a_hot_prefix_comes_to_be_held_by_more() -> None:
    router = Router(block_size=4)
    for name in "abcd":
        router.add_worker(name)
    hot = list(range(4000))
    router.report("a", stored=router.hash_blocks(hot))
    decisions = []
    for n in range(40):
        for prompt in ([*hot, 5000 + n], [6000 + n] * 50):
            decisions.append(router.route(prompt))
            router.prefilled(decisions[-1])
    kept = [decision for decision in decisions if decision.filtered]
    assert kept and kept[0].filtered == ["a"] and kept[0].worker != "a"
    assert min(kept[0].scores) < kept[0].score, "the holder's would have won"
    assert all(decision.recompute() == decision.worker for decision in decisions)
    assert pickle.loads(pickle.dumps(kept)) == kept
    assert not decisions[-1].filtered and not decisions[-2].filtered, "two of four hold it, and half of all want it"


def test_errors_pickle_and_are_what_their_bases_say() -> None:
    for error, base in (
        (UnknownPolicy, ValueError),
        (WorkerExists, ValueError),
        (UnknownWorker, LookupError),
        (NoWorker, RuntimeError),
    ):
        assert issubclass(error, base) and error.__module__ == "scls_router"
        assert type(pickle.loads(pickle.dumps(error("x")))) is error


def test_all_that_is_public_is_there() -> None:
    for name in scls_router.__all__:
        assert hasattr(scls_router, name)
