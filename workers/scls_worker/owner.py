"""The session that owns the worker: who it is, and the numbers on what it is told. Knows no rows and no plans."""

from typing import Protocol

from scls_router.proto import worker_pb2 as pb


class Session(Protocol):
    """One router's stream as the engine sees it."""

    def send(self, message: pb.WorkerMessage) -> None: ...

    def close(self) -> None:
        """Ends the stream after what was sent."""

    @property
    def full(self) -> bool:
        """So much is unsent that no slice should run."""


class Owner:
    """The owner, or nobody: then what is said is said to no one."""

    def __init__(self, worker_epoch: int) -> None:
        self.worker_epoch = worker_epoch
        self.epoch = -1  # of the last owner; survives it
        self.session: Session | None = None
        self._state_seq = 0

    def enter(self, session: Session, epoch: int) -> None:
        self.session, self.epoch, self._state_seq = session, epoch, 0

    def leave(self) -> None:
        if self.session is not None:
            self.session.close()
        self.session = None

    @property
    def listens(self) -> bool:
        return self.session is not None and not self.session.full

    @property
    def full(self) -> bool:
        return self.session is not None and self.session.full

    def send(self, **body: object) -> None:
        if self.session is not None:
            self._state_seq += 1
            self.session.send(self.message(self._state_seq, **body))

    def turn_away(self, session: Session, **body: object) -> None:
        """The only word to a session that does not own the worker."""
        session.send(self.message(1, **body))
        session.close()

    def message(self, state_seq: int, **body: object) -> pb.WorkerMessage:
        return pb.WorkerMessage(worker_epoch=self.worker_epoch, state_seq=state_seq, **body)  # type: ignore[arg-type]
