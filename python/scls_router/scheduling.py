"""What a `Scheduler` is told and what it says: plain values, frozen, comparable, picklable.

Actions come out of a `Scheduler`; carry them out in order. Reports are what a worker gives back. Records are what was
known and decided. Times are seconds: an instant on the clock whose time you pass as ``now``, or a duration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

__all__ = [
    "Action",
    "Band",
    "Batch",
    "BatchEnd",
    "BatchOutcome",
    "BatchRecord",
    "Candidate",
    "Cut",
    "Decision",
    "Drop",
    "Finish",
    "FinishReason",
    "Hotspot",
    "Placed",
    "Plan",
    "Quarantine",
    "Refusal",
    "Reject",
    "Rejection",
    "ReleaseKv",
    "Resync",
    "RowId",
    "RowKey",
    "RowReport",
    "RowStart",
    "RowTokens",
    "SliceReport",
    "Tokens",
    "WakeAt",
    "WorkerLoad",
]

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]
BatchEnd: TypeAlias = Literal["steps", "all_done", "cut", "backpressure", "error"]
Refusal: TypeAlias = Literal["stale", "no_memory", "too_many_rows", "unknown_row", "unsupported"]
Rejection: TypeAlias = Literal["no_worker", "never_fits", "overloaded", "empty"]


class RowId(NamedTuple):
    """One output sequence of a request.

    Attributes:
        request: the request's id.
        choice: which of its ``n``, from 0.
    """

    request: int
    choice: int


class RowKey(NamedTuple):
    """A row at one dispatch; what a worker says of an older attempt changes nothing.

    >>> RowKey(7, 0, attempt=1).row
    RowId(request=7, choice=0)

    Attributes:
        request: the request's id.
        choice: which of its ``n``, from 0.
        attempt: grows whenever the row goes to another worker.
    """

    request: int
    choice: int
    attempt: int

    @property
    def row(self) -> RowId:
        """The row, whatever the attempt."""
        return RowId(self.request, self.choice)


class Band(NamedTuple):
    """Between these a time falls.

    Attributes:
        lo: no sooner, in seconds.
        hi: no later, in seconds.
    """

    lo: float
    hi: float


class Batch(NamedTuple):
    """Rows that a `Batcher` puts together.

    Attributes:
        rows: their indices in the lengths that were split.
        longest: tokens of the longest.
        seconds: time of a slice with them, if none ends.
        ceiling: tokens of KV memory it cannot pass.
    """

    rows: tuple[int, ...]
    longest: int
    seconds: float
    ceiling: int


@dataclass(frozen=True, slots=True)
class RowStart:
    """A row that a worker does not know yet.

    Attributes:
        key: its name in all that is said of it.
        slice_no: its slice, from 0 at its first dispatch.
        hash_root: u64 at the start of its chain of block hashes.
        prompt: token ids.
        output: ids that were drawn so far, elsewhere or before; they are prefilled with the prompt.
        max_tokens: most output tokens, those of ``output`` included.
        hold_rank: how well its KV is protected while it is held: higher is evicted later.
        prefill_budget: most of its prefill tokens in an iteration in which another row decodes; 0: the worker's chunk.
    """

    key: RowKey
    slice_no: int
    hash_root: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    max_tokens: int
    hold_rank: int
    prefill_budget: int


# Actions


@dataclass(frozen=True, slots=True)
class Plan:
    """The batch that ``worker`` runs after ``base``. It stands until the base ends; one with a higher number replaces it.

    Attributes:
        worker: who runs it.
        no: its name, and that of the batch it forms.
        base: the batch it follows; 0 before the first. If that batch has ended it starts at once.
        keep: rows the worker knows that run, less those that ended; None: all of the base that did not end, less ``leave``.
        leave: rows of the base that are left out; their KV stays held.
        add: rows that are new to the worker.
        steps: most iterations (S).
        ceiling: KV blocks it cannot pass, counted without sharing.
        ranks: how well held KV of rows left out is protected: higher is evicted later.
    """

    worker: str
    no: int
    base: int
    keep: tuple[RowKey, ...] | None
    leave: tuple[RowKey, ...]
    add: tuple[RowStart, ...]
    steps: int
    ceiling: int
    ranks: tuple[tuple[RowKey, int], ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """End this batch at the next step boundary; the plan sent last starts then.

    Attributes:
        worker: who runs it.
        batch: its plan's number.
    """

    worker: str
    batch: int


@dataclass(frozen=True, slots=True)
class Drop:
    """End these rows at the worker.

    Attributes:
        worker: who has them.
        rows: which.
    """

    worker: str
    rows: tuple[RowKey, ...]


@dataclass(frozen=True, slots=True)
class ReleaseKv:
    """Free the KV of these rows, which do not run.

    Attributes:
        worker: who has them.
        rows: which.
    """

    worker: str
    rows: tuple[RowKey, ...]


@dataclass(frozen=True, slots=True)
class Resync:
    """Ask for a snapshot.

    Attributes:
        worker: whom.
    """

    worker: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    """What the worker says cannot be true: end its session and say ``lost``.

    Attributes:
        worker: who.
        why: for people.
    """

    worker: str
    why: str


@dataclass(frozen=True, slots=True)
class Placed:
    """A row was given a worker.

    Attributes:
        row: which.
        worker: where it runs now.
        eta: seconds from now until its whole answer is there, as loads are: no less than the first, and no more than the
            second if it draws all its tokens.
    """

    row: RowId
    worker: str
    eta: Band


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens for the client: each index once, in order.

    Attributes:
        row: whose.
        first_index: index in the row's output of the first of ``ids``.
        ids: token ids.
    """

    row: RowId
    first_index: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The row ended; exactly once a row.

    Attributes:
        row: which.
        reason: how.
        error: why, where ``reason`` is ``"error"``.
        prompt: prompt tokens.
        cached: of these, found in the cache by the first dispatch that drew a token.
        emitted: output tokens.
        slices: slices it ran in.
        worker: who had it last; None if nobody did.
    """

    row: RowId
    reason: FinishReason
    error: str | None
    prompt: int
    cached: int
    emitted: int
    slices: int
    worker: str | None


@dataclass(frozen=True, slots=True)
class Reject:
    """The request was not accepted; nothing of it runs.

    Attributes:
        request: its id, free to be used again.
        reason: a word to act on.
        detail: for people.
        retry_after: seconds until the first worker has done what it has, where ``reason`` is ``"overloaded"``.
    """

    request: int
    reason: Rejection
    detail: str
    retry_after: float | None


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call ``tick`` at or after this time.

    Attributes:
        at: on your clock.
    """

    at: float


Action: TypeAlias = Plan | Cut | Drop | ReleaseKv | Resync | Quarantine | Placed | Tokens | Finish | Reject | WakeAt


# Reports


@dataclass(frozen=True, slots=True)
class RowTokens:
    """What one iteration drew of a row.

    Attributes:
        key: the row, as its `RowStart` named it.
        first_index: index in the row's output of the first of ``ids``.
        ids: what was drawn.
        finish: set when the row ended: an end token, or its limit.
        cached: prompt tokens found in the cache; with the first token.
    """

    key: RowKey
    first_index: int
    ids: tuple[int, ...]
    finish: FinishReason | None = None
    cached: int | None = None


@dataclass(frozen=True, slots=True)
class RowReport:
    """A row at the end of a batch.

    Attributes:
        key: the row.
        computed: tokens whose KV was computed in this batch.
        emitted: tokens drawn in this batch.
        cached: tokens found in the cache, where it was prefilled in this batch.
        finish: set when it ended in this batch.
        held: whether its KV is still there.
        prefill_left: tokens that still want prefill.
    """

    key: RowKey
    computed: int
    emitted: int
    cached: int = 0
    finish: FinishReason | None = None
    held: bool = True
    prefill_left: int = 0


@dataclass(frozen=True, slots=True)
class SliceReport:
    """The end of a batch.

    Attributes:
        batch: its plan's number.
        end: why it ended.
        steps: iterations that ran.
        rows: its rows.
        next: number of the plan that starts now; None if none stands.
        prefill: seconds of iterations with prefill in them.
        decode: seconds of the others.
        peak: most KV blocks in use at once.
        idle: seconds in which there was nothing to run before it although a plan could have been there.
        pad: cells of a rectangle computed for no token; 0 where nothing is padded.
        invalid: tokens computed for rows after their end, because a rectangle goes on.
    """

    batch: int
    end: BatchEnd
    steps: int
    rows: tuple[RowReport, ...]
    next: int | None = None
    prefill: float = 0.0
    decode: float = 0.0
    peak: int = 0
    idle: float = 0.0
    pad: int = 0
    invalid: int = 0


# Records


class Candidate(NamedTuple):
    """A worker as the scheduler saw it at a decision.

    Attributes:
        worker: its name.
        new_tokens: tokens it would have to prefill for the row, at least 1.
        queued_tokens: prefill tokens assigned to it and not computed.
        batch_size: rows assigned to it and not finished.
        work: its committed work in seconds.
        joined: seconds of one slice there with this row in it; 0 where the policy does not ask.
        free_blocks: KV blocks that its running batch cannot need.
        filtered: the hotspot guard keeps the row from it, whatever its score.
    """

    worker: str
    new_tokens: int
    queued_tokens: int
    batch_size: int
    work: float
    joined: float
    free_blocks: int
    filtered: bool = False


class Hotspot(NamedTuple):
    """A decision as the hotspot guard saw it: its prompt begins with a prefix that many of the latest requests have.

    The prefix is safe while ``requests / window * workers <= holders``: then its holders get no more than their part.

    Attributes:
        blocks: its depth.
        requests: those of the window that begin with it.
        window: the latest requests, 16 for each worker.
        workers: those that could have the row.
        holders: those of them that hold the prefix.
        alarm: it is not safe.
        preferred: without the guard a holder would have the row.
        filtered: it went elsewhere, because holders were filtered.
    """

    blocks: int
    requests: int
    window: int
    workers: int
    holders: int
    alarm: bool
    preferred: bool
    filtered: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """Why a row went where it went.

    Attributes:
        id: its name.
        at: when.
        row: for which row; None if it was only asked for.
        tokens: known tokens of the row.
        policy: name of the policy.
        seed: of the ``random`` policy.
        turn: decisions before this one: where ties begin to be broken.
        worker: who got it.
        scores: of each candidate; the smallest wins.
        candidates: who could have it.
        anticipation: what ``product_anticipating`` expects: arrivals a second at each worker, and seconds of prefill a
            token; zeros for other policies.
        hotspot: what the hotspot guard made of the prompt; None if it is of no class.
    """

    id: int
    at: float
    row: RowId | None
    tokens: int
    policy: str
    seed: int
    turn: int
    worker: str
    scores: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    anticipation: tuple[float, float] = (0.0, 0.0)
    hotspot: Hotspot | None = None


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """How a batch went.

    Attributes:
        end: why it ended.
        steps: k, the iterations that ran.
        time: their seconds by the worker's clock.
        expected: seconds they were expected to take before they ran; 0 where nothing was known.
        band: seconds that k iterations should take, fixed before they ran.
        peak: most KV blocks in use at once.
    """

    end: BatchEnd
    steps: int
    time: float
    expected: float
    band: Band
    peak: int

    @property
    def covered(self) -> bool:
        """The time fell into the band."""
        return self.band.lo <= self.time <= self.band.hi


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What was known of a batch before it ran, beside what happened.

    Attributes:
        worker: where it ran.
        batch: its plan's number.
        at: when it started, as far as the scheduler knows.
        rows: how many.
        steps: S, the most iterations.
        band: seconds it should take if all of them run; ``band.hi`` is the bound.
        ceiling: KV blocks it cannot pass.
        outcome: what happened; None while it runs.
    """

    worker: str
    batch: int
    at: float
    rows: int
    steps: int
    band: Band
    ceiling: int
    outcome: BatchOutcome | None


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What the scheduler believes of a worker.

    Attributes:
        name: its name.
        ready: it takes new rows: its snapshot is complete and it does not drain.
        blocks: its KV blocks.
        queued_tokens: prefill tokens assigned and not computed.
        batch_size: rows assigned and not finished.
        work: committed work in seconds.
        running_rows: rows of the running batch.
        held_rows: rows it knows that do not run.
        running_blocks: ceiling of the running batch.
        held_blocks: KV blocks of held rows, at most.
        indexed_blocks: cached blocks that the prefix index has for it.
    """

    name: str
    ready: bool
    blocks: int
    queued_tokens: int
    batch_size: int
    work: float
    running_rows: int
    held_rows: int
    running_blocks: int
    held_blocks: int
    indexed_blocks: int
