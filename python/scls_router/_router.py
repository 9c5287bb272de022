"""Values of the in-process router; errors of all that runs in process."""

from __future__ import annotations

from typing import NamedTuple


class Candidate(NamedTuple):
    """A worker as the router saw it at a decision.

    >>> Candidate("a", new_tokens=16, queued_tokens=0, batch_size=2)
    Candidate(worker='a', new_tokens=16, queued_tokens=0, batch_size=2)

    Attributes:
        worker: its name.
        new_tokens: tokens of the prompt that it would have to compute: at least 1, because an engine computes the last
            token of a prompt even where all of it is cached.
        queued_tokens: new tokens of decisions for it that are not prefilled yet.
        batch_size: decisions for it that have not ended.
    """

    worker: str
    new_tokens: int
    queued_tokens: int
    batch_size: int


class View(NamedTuple):
    """What a policy written in Python is asked with: it gives one int for each candidate, and the smallest wins.

    Ties go to the first from a start that rotates with ``turn``.

    >>> def product(view: View) -> list[int]:
    ...     return [(c.queued_tokens + c.new_tokens) * (c.batch_size + 1) for c in view.candidates]
    >>> product(View(32, 0, (Candidate("a", 32, 0, 0), Candidate("b", 16, 8, 2))))
    [32, 72]

    Attributes:
        tokens: of the prompt.
        turn: decisions made before this one.
        candidates: all workers, at least one.
    """

    tokens: int
    turn: int
    candidates: tuple[Candidate, ...]


class WorkerLoad(NamedTuple):
    """What the router believes of a worker.

    Attributes:
        name: its name.
        queued_tokens: new tokens of decisions for it that are not prefilled yet.
        batch_size: decisions for it that have not ended.
        indexed_blocks: blocks it is believed to hold: stored or predicted, and those on their way.
        blocks: its capacity where what it holds is predicted; None where its engine reports.
    """

    name: str
    queued_tokens: int
    batch_size: int
    indexed_blocks: int
    blocks: int | None


class UnknownPolicy(ValueError):
    """There is no policy of this name; the message has those there are."""


class NoWorker(RuntimeError):
    """There is no worker to route to."""


class UnknownWorker(LookupError):
    """There is no worker of this name."""


class WorkerExists(ValueError):
    """There is a worker of this name already."""


class UnknownScheduler(ValueError):
    """There is no scheduler of this name; the message has those there are."""


class RequestExists(ValueError):
    """A request of this id has not ended."""


class CostError(ValueError):
    """No worker can have this cost model; the message names the coefficient."""


class FitError(ValueError):
    """No cost model can be fitted to these samples; the message says why."""


class RowTooLong(ValueError):
    """A row that fits no batch, not even alone; the message names it."""
