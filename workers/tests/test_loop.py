"""The engine's thread: messages are taken between any two iterations, and what goes wrong in one stays in it."""

import time
from collections.abc import Sequence

import pytest
from scls_router.proto import worker_pb2 as pb
from scls_worker.loop import EngineThread
from scls_worker.mock import MockRunner
from scls_worker.rows import Chunk, Drawn
from worker_harness import Router, kinds, of, start


class Interrupting(MockRunner):
    """While it computes an iteration, messages arrive: those that the test has set for its number."""

    thread: EngineThread
    router: Router

    def __init__(self, padded: bool) -> None:
        super().__init__(1000, padded=padded)
        self.iteration = 0
        self.arrive: dict[int, list[pb.RouterMessage]] = {}

    def run(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        self.iteration += 1
        for message in self.arrive.get(self.iteration, []):
            self.thread.handle(self.router.session, message)
        return super().run(chunks)


# 1: in the pass over the prompt; 2: in the midst of a prefill in chunks where the layout has them; 9: in a decode step.
@pytest.mark.parametrize("at", [1, 2, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cut_is_honoured_at_the_end_of_the_iteration_it_arrives_in(at: int, padded: bool) -> None:
    runner = Interrupting(padded)
    router = Router(runner, padded=padded, chunk_tokens=16)
    thread = runner.thread = EngineThread(router.engine)
    runner.router = router
    cut = pb.RouterMessage(cut=pb.Cut(batch=1))
    # What came just before it does not hold it up, and a row added in the same breath is in the very next iteration.
    pings = [pb.RouterMessage(ping=pb.Ping(nonce=n)) for n in range(50)]
    joins = pb.Plan(plan_no=2, base_batch=1, keep=pb.Plan.KEEP_SURVIVORS, steps=3, add=[start(2, 5, 2)])
    runner.arrive = {at: [*pings, pb.RouterMessage(plan=joins), cut]}
    router.plan(1, steps=200, add=[start(1, 40, 150)])
    thread.start()
    while len(of(list(router.session.sent), "slice_report")) < 2 and not thread.done.done():
        time.sleep(0.001)
    thread.stop()
    thread.done.result(timeout=10)
    first, second = of(router.take(), "slice_report")
    assert (first.end, first.steps, first.next_batch) == (pb.SliceReport.END_CUT, at, 2)
    assert second.steps == 3 and runner.iteration == at + 3
    assert {row.row.request for row in second.rows} == {1, 2}


def test_a_message_that_fails_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()

    def burst(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    thread = EngineThread(router.engine)
    thread.start()
    monkeypatch.setattr("scls_worker.engine.read_plan", burst)
    bad = pb.Plan(plan_no=1, keep=pb.Plan.KEEP_NONE, steps=4, add=[start(1, 5, 5)])
    thread.handle(router.session, pb.RouterMessage(plan=bad))
    thread.handle(router.session, pb.RouterMessage(ping=pb.Ping(nonce=1)))
    thread.stop()
    thread.done.result(timeout=10)
    messages = router.take()
    assert kinds(messages) == ["refused", "pong", "goodbye"]
    assert of(messages, "refused")[0].detail == "internal: ZeroDivisionError"


def test_a_bug_in_the_loop_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    monkeypatch.setattr(router.engine, "step", lambda: 1 / 0)
    router.plan(1, add=[start(1, 5, 5)])
    thread = EngineThread(router.engine)
    thread.start()
    with pytest.raises(ZeroDivisionError):
        thread.done.result(timeout=10)
