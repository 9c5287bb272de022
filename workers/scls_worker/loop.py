"""The engine's thread: takes messages from a queue, hands them to the engine between iterations, and iterates.

Does not know gRPC: the server puts messages in, sessions take them out.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from scls_router.proto import worker_pb2 as pb

from .engine import Engine
from .owner import Session
from .plans import Refusal

log = logging.getLogger(__name__)


class EngineThread:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stopping = False
        # Set when the thread has ended; holds the error if it did not end by `stop`.
        self.done: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="scls-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def backlog(self) -> int:
        return self._inbox.qsize()

    def handle(self, session: Session, message: pb.RouterMessage) -> None:
        self._put(lambda: self._handle(session, message))

    def closed(self, session: Session) -> None:
        self._put(lambda: self._engine.closed(session))

    def wake(self) -> None:
        """A session has room again."""
        self._put(lambda: None)

    def stop(self) -> None:
        """Ends the thread after the present iteration, with a goodbye to the owner."""
        self._put(self._stop)

    def _put(self, said: Callable[[], None]) -> None:
        self._inbox.put(said)
        self._engine.interrupt.set()

    def _handle(self, session: Session, message: pb.RouterMessage) -> None:
        try:
            self._engine.handle(session, message)
        except Exception as error:
            # The message, not the worker, is to end here. Its content stays out of the log.
            log.exception("a message failed: %s", message.WhichOneof("body"))
            self._engine.refuse(
                message.plan.plan_no, Refusal(pb.Refused.REASON_INVALID, f"internal: {type(error).__name__}")
            )

    def _stop(self) -> None:
        self._stopping = True
        self._engine.say_goodbye("the worker stops")

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_messages()
                if self._engine.ready and not self._stopping:
                    self._engine.step()
        except BaseException as error:
            log.exception("the engine's thread failed")
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    def _take_messages(self) -> None:
        """All that have come. Waits for one if there is nothing to run, but not past the lease."""
        self._engine.interrupt.clear()  # before it looks: what comes meanwhile sets it again
        try:
            if self._engine.ready:
                self._inbox.get_nowait()()
            else:
                self._inbox.get(timeout=self._engine.patience_s())()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            self._engine.tick()
