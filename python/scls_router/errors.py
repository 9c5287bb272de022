"""What a call to a router can fail with. Knows gRPC's status names, not gRPC.

Every error has the attributes of `SclsError`; catch that for "whatever went wrong with the call", a class below it to
act on one kind. All of them pickle.
"""

from __future__ import annotations

from collections.abc import Mapping


class SclsError(Exception):
    """A call failed. The base of all errors of the clients.

    Attributes:
        message: what was wrong, for people; also `str(error)`.
        status: name of the gRPC status, such as `"UNAVAILABLE"`.
        reason: the router's machine-readable code, such as `"context_length_exceeded"`; None where it gave none.
        field: the argument at fault, such as `"top_p"`; None where it is not one argument.
        retry_after: seconds after which the router suggests to try again; None where it does not.
    """

    def __init__(
        self,
        message: str,
        status: str = "UNKNOWN",
        reason: str | None = None,
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        # All of them are `args`, so that copies and pickles are whole.
        super().__init__(message, status, reason, field, retry_after)
        self.message = message
        self.status = status
        self.reason = reason
        self.field = field
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message


class InvalidRequest(SclsError):
    """The request cannot be served as it is; `field` names what is at fault. Sending it again gives the same."""


class Unauthenticated(SclsError):
    """The API key is missing or wrong."""


class NotFound(SclsError):
    """What was asked for does not exist."""


class ModelNotFound(NotFound):
    """No workers of that model name are known to the router."""


class Overloaded(SclsError):
    """Too much is waiting; `retry_after` says when to come again."""


class Unavailable(SclsError):
    """The router cannot be reached, is about to end, or has no worker that is ready."""


class WorkerFailed(SclsError):
    """A worker gave up on the request, and no other could take it over."""


class DeadlineExceeded(SclsError):
    """The call did not end in time, here or at the router. Its rows are freed."""


class Cancelled(SclsError):
    """The call was cancelled, or not made: its client was closed."""


class InternalError(SclsError):
    """A bug of the router, or an answer that cannot be read."""


# Beside the gRPC status: codes of the router that mean something narrower.
_BY_REASON: dict[str, type[SclsError]] = {"model_not_found": ModelNotFound, "worker_failed": WorkerFailed}

_BY_STATUS: dict[str, type[SclsError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    # What tonic says of a message over its limit.
    "OUT_OF_RANGE": InvalidRequest,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": Unauthenticated,
    "NOT_FOUND": NotFound,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "INTERNAL": InternalError,
    "DATA_LOSS": InternalError,
}


def from_status(status: str, message: str, metadata: Mapping[str, str | bytes]) -> SclsError:
    """The error that a gRPC status and its trailing metadata stand for.

    Reads `scls-code`, `scls-field` and gRPC's own `grpc-retry-pushback-ms`.
    """
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    reason = texts.get("scls-code")
    try:
        retry_after = max(0.0, int(texts["grpc-retry-pushback-ms"]) / 1000)
    except (KeyError, ValueError):
        retry_after = None
    kind = _BY_REASON.get(reason or "") or _BY_STATUS.get(status, SclsError)
    return kind(message or status, status, reason, _argument(texts.get("scls-field")), retry_after)


def _argument(field: str | None) -> str | None:
    """The message nests what the clients take flat: `sampling.top_p` is `top_p`, `prompt.ids` is `prompt`."""
    return field and field.removeprefix("sampling.").removeprefix("limits.").partition(".")[0]
