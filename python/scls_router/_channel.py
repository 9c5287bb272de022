"""How a client's channel is set up, and its errors read. The same for both clients."""

from __future__ import annotations

from typing import Any

from scls_router._request import MOST_MESSAGE
from scls_router.errors import Cancelled, SclsError, from_status

OPTIONS: list[tuple[str, int]] = [
    # Finds out within half a minute that the other end is gone, even while it has nothing to say for long.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MOST_MESSAGE),
    # The retries are ours. They should not wait for a connection that gRPC does not try.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


def address(target: str) -> str:
    """`host:port`, with or without `grpc://`."""
    if target.startswith(("http://", "https://")):
        raise ValueError(
            f"the router's gRPC address is host:port: {target}\nits gRPC port is another than its HTTP port"
        )
    return target.removeprefix("grpc://")


def metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call. Raises ValueError for a key that no header can hold, without showing it."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key has characters that no header holds: a line break at its end, perhaps")
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def closed() -> Cancelled:
    """The error of a call that the closing of its client ended, or came before."""
    return Cancelled("the client is closed", "CANCELLED")


def error_of(error: Any) -> SclsError:
    """The error that a `grpc.RpcError` stands for, of `grpc` and `grpc.aio` alike."""
    message = error.details() or ""
    if message.startswith("Received http2 header with status"):
        message += "\nno gRPC is served there: is this the router's HTTP port?"
    return from_status(error.code().name, message, dict(error.trailing_metadata() or ()))
