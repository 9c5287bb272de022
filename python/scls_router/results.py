"""What the clients give back: plain values, frozen, hashable, picklable, without gRPC in them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


class _Shown:
    """A repr in which no prompt-sized value hides the others."""

    __slots__ = ()

    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        shown = ", ".join(f"{name}={_clipped(value)}" for name, value in values)
        return f"{type(self).__name__}({shown})"


def _clipped(value: object) -> str:
    if isinstance(value, str) and len(value) > 80:
        return f"{value[:77]!r}… ({len(value)} characters)"
    if isinstance(value, tuple) and len(value) > 8:
        return f"({', '.join(map(repr, value[:6]))}, … {len(value)} in all)"
    return repr(value)


@dataclass(frozen=True, slots=True, repr=False)
class TokenLogprobs(_Shown):
    """Natural-log probabilities of one token under the model itself, before penalties, bias, temperature and filters.

    Attributes:
        chosen: of the token that was drawn.
        top: the most likely tokens as (id, logprob), best first; as many as were asked for.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Usage(_Shown):
    """What a request took.

    Attributes:
        prompt_tokens: tokens of the prompt, counted once.
        completion_tokens: tokens generated, over all choices.
        cached_tokens: prompt tokens whose KV the worker held already.
        slices: slices the request ran in.
        worker_id: the worker that had it last.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    slices: int
    worker_id: str

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, repr=False)
class Piece(_Shown):
    """What came next of a running generation.

    Attributes:
        choice: index of the choice it belongs to, below `n`.
        text: text that is decided now; often empty, as a character may take several tokens.
        ids: token ids that were drawn, of one iteration.
        first_index: index in the choice's output of the first of `ids`.
        finish_reason: set on the last piece of a choice.
        logprobs: one for each of `ids`, if asked for.
        usage: set on the last piece of the request.
        request_id: the request's name, yours or the router's.
        eta_ms: with the first piece of the request, if the router says: milliseconds from the placing of its last row
            until the whole answer is there, as loads were then: no less than the first, and no more than the second if
            all its tokens are drawn.
    """

    choice: int
    text: str
    ids: tuple[int, ...]
    first_index: int
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...]
    usage: Usage | None
    request_id: str
    eta_ms: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Choice(_Shown):
    """One finished output sequence.

    Attributes:
        index: which of the `n`.
        text: the text, without the stop string that ended it; empty if the model has no tokenizer.
        ids: all ids that were drawn, a stop token included.
        finish_reason: `"stop"` (an eos or stop token, or a stop string) or `"length"`.
        logprobs: one for each of `ids`, or None if they were not asked for.
    """

    index: int
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True, slots=True, repr=False)
class Completion(_Shown):
    """A finished generation.

    Attributes:
        choices: the output sequences, in the order of their index.
        usage: what it took.
        request_id: the request's name, yours or the router's.
        eta_ms: what was foreseen at its first piece; see `Piece`.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    request_id: str
    eta_ms: tuple[int, int] | None = None

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of the first choice."""
        return self.choices[0].ids


@dataclass(frozen=True, slots=True, repr=False)
class Candidate(_Shown):
    """A worker as a decision saw it. The smallest score wins.

    Attributes:
        worker_id: its name.
        score: what the policy gave it.
        new_tokens: tokens it would have to prefill, at least 1.
        queued_tokens: prefill tokens that wait there already.
        batch_size: rows assigned to it and not finished.
        work_us: committed work in microseconds.
        free_blocks: KV blocks that are free.
    """

    worker_id: str
    score: int
    new_tokens: int
    queued_tokens: int
    batch_size: int
    work_us: int
    free_blocks: int


@dataclass(frozen=True, slots=True, repr=False)
class RouteDecision(_Shown):
    """Where a prompt would go, and all that this was decided from.

    Attributes:
        worker_id: the worker that was chosen.
        policy: the rule that chose it.
        prompt_tokens: tokens of the prompt.
        turn: where the rotation of equals started.
        candidates: all workers that could have taken it.
    """

    worker_id: str
    policy: str
    prompt_tokens: int
    turn: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, repr=False)
class WorkerStatus(_Shown):
    """What the router knows of one worker.

    Attributes:
        worker_id: its name; empty before it was reached.
        url: where it is dialled.
        state: `"connecting"`, `"ready"`, `"draining"` or `"refused"`.
        detail: why, where that is not plain.
        models: names it serves.
        block_size, blocks, max_rows, max_context: tokens a block, KV blocks, rows of a batch, tokens of a row.
        queued_tokens: prefill tokens that wait.
        batch_size: rows assigned and not finished; of those `running_rows` are in its batch, `held_rows` wait.
        running_blocks, held_blocks: KV blocks of those rows.
        indexed_blocks: cached blocks that the router's index has for it.
        work_us: committed work in microseconds.
    """

    worker_id: str
    url: str
    state: Literal["connecting", "ready", "draining", "refused"]
    detail: str
    models: tuple[str, ...]
    block_size: int
    blocks: int
    max_rows: int
    max_context: int
    queued_tokens: int
    batch_size: int
    running_rows: int
    held_rows: int
    running_blocks: int
    held_blocks: int
    indexed_blocks: int
    work_us: int
