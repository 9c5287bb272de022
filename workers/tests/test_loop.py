"""The engine's thread: what goes wrong in a message stays in that message."""

import pytest
from scls_router.proto import worker_pb2 as pb
from scls_worker.loop import EngineThread
from worker_harness import Router, kinds, of, start


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
