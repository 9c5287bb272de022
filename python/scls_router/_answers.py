"""From the contract's answers to results. What the clients have in common; knows protobuf, not gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from scls_router.errors import InternalError
from scls_router.proto import common_pb2 as common
from scls_router.proto import router_pb2 as pb
from scls_router.results import (
    Candidate,
    Choice,
    Completion,
    Piece,
    RouteDecision,
    TokenLogprobs,
    Usage,
    WorkerStatus,
)

if TYPE_CHECKING:
    from typing import Literal

    from scls_router.results import FinishReason

FINISH: dict[int, FinishReason] = {
    common.FINISH_REASON_STOP: "stop",
    common.FINISH_REASON_LENGTH: "length",
    common.FINISH_REASON_CANCELLED: "cancelled",
    common.FINISH_REASON_ERROR: "error",
}


def piece(answer: pb.GenerateResponse) -> Piece:
    """One message of a generation."""
    usage = None
    if answer.HasField("usage"):
        u = answer.usage
        usage = Usage(u.prompt_tokens, u.completion_tokens, u.cached_tokens, u.slices, u.worker_id)
    eta = (answer.eta.lo_ms, answer.eta.hi_ms) if answer.HasField("eta") else None
    return Piece(
        choice=answer.choice,
        text=answer.text,
        ids=tuple(answer.ids),
        first_index=answer.first_index,
        finish_reason=FINISH.get(answer.finish),
        logprobs=tuple(_logprobs(of_token) for of_token in answer.logprobs),
        usage=usage,
        request_id=answer.request_id,
        eta_ms=eta,
    )


def _logprobs(of_token: common.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(of_token.chosen, tuple(zip(of_token.top_ids, of_token.top, strict=False)))


class Collector:
    """Puts the pieces of a generation together."""

    def __init__(self, *, choices: int, logprobs: bool) -> None:
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._ids: list[list[int]] = [[] for _ in range(choices)]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in range(choices)]
        self._ends: list[FinishReason | None] = [None] * choices
        self._wants_logprobs = logprobs
        self._usage: Usage | None = None
        self._request_id = ""
        self._eta_ms: tuple[int, int] | None = None

    def add(self, piece: Piece) -> None:
        """The next piece."""
        if piece.choice >= len(self._ends) or piece.first_index > len(self._ids[piece.choice]):
            raise InternalError(f"a piece that does not belong here: {piece}", "INTERNAL")
        self._texts[piece.choice].append(piece.text)
        self._ids[piece.choice].extend(piece.ids)
        self._logprobs[piece.choice].extend(piece.logprobs)
        self._ends[piece.choice] = piece.finish_reason or self._ends[piece.choice]
        self._usage = piece.usage or self._usage
        self._request_id = piece.request_id
        self._eta_ms = self._eta_ms or piece.eta_ms

    def completion(self) -> Completion:
        """All of it. Raises `InternalError` if the stream ended before the generation did."""
        ends = [end for end in self._ends if end is not None]
        if self._usage is None or len(ends) < len(self._ends):
            raise InternalError("the stream ended before the generation did", "INTERNAL")
        choices = (
            Choice(index, "".join(text), tuple(ids), end, tuple(logprobs) if self._wants_logprobs else None)
            for index, (text, ids, end, logprobs) in enumerate(
                zip(self._texts, self._ids, ends, self._logprobs, strict=True)
            )
        )
        return Completion(tuple(choices), self._usage, self._request_id, self._eta_ms)


def collector(request: pb.GenerateRequest) -> Collector:
    """For the answers to this request."""
    return Collector(choices=request.n, logprobs=request.sampling.HasField("logprobs"))


def decision(answer: pb.Decision) -> RouteDecision:
    """A decision."""
    candidates = (
        Candidate(
            worker_id=c.worker_id,
            score=c.score_high << 64 | c.score_low,
            new_tokens=c.new_tokens,
            queued_tokens=c.queued_tokens,
            batch_size=c.batch_size,
            work_us=c.work_us,
            free_blocks=c.free_blocks,
        )
        for c in answer.candidates
    )
    return RouteDecision(answer.worker_id, answer.policy, answer.prompt_tokens, answer.turn, tuple(candidates))


def workers(answer: pb.ListWorkersResponse) -> list[WorkerStatus]:
    """All workers."""
    return [_worker(status) for status in answer.workers]


def _worker(w: pb.WorkerStatus) -> WorkerStatus:
    state = pb.WorkerStatus.State.Name(w.state).removeprefix("STATE_").lower()
    return WorkerStatus(
        worker_id=w.info.worker_id,
        url=w.url,
        state=cast("Literal['connecting', 'ready', 'draining', 'refused']", state),
        detail=w.detail,
        models=tuple(w.info.served_names),
        block_size=w.info.block_size,
        blocks=w.info.blocks,
        max_rows=w.info.max_rows,
        max_context=w.info.max_context,
        queued_tokens=w.queued_tokens,
        batch_size=w.batch_size,
        running_rows=w.running_rows,
        held_rows=w.held_rows,
        running_blocks=w.running_blocks,
        held_blocks=w.held_blocks,
        indexed_blocks=w.indexed_blocks,
        work_us=w.work_us,
    )
