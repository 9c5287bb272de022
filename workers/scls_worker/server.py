"""The worker's gRPC face: Worker, health and reflection on one port. Converts, hands over, replies; decides nothing."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb
from scls_router.proto import worker_pb2_grpc

from .errors import StartupError
from .info import read_pieces
from .loop import EngineThread
from .session import StreamSession

log = logging.getLogger(__name__)

SERVICE = "scls.v1.Worker"
MAX_MESSAGE = 16 << 20
# Messages a router may be ahead of the engine.
MAX_BACKLOG = 1024
BUSY_S = 0.005
# An iteration that takes longer is not waited for.
STOP_S = 20.0

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerService(worker_pb2_grpc.WorkerServicer):
    def __init__(self, info: common.WorkerInfo, tokenizer: list[Path], engine: EngineThread, ring: int) -> None:
        self._info, self._tokenizer, self._engine, self._ring = info, tokenizer, engine, ring

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> common.WorkerInfo:
        return self._info

    async def GetTokenizer(self, request: pb.GetTokenizerRequest, context: Context) -> AsyncIterator[pb.FileChunk]:
        for path in self._tokenizer:
            held = b""
            for piece in read_pieces(path):
                if held:
                    yield pb.FileChunk(name=path.name, data=held)
                held = piece
            yield pb.FileChunk(name=path.name, data=held, last_of_file=True)

    async def Session(
        self, request_iterator: AsyncIterator[pb.RouterMessage], context: Context
    ) -> AsyncIterator[pb.WorkerMessage]:
        session = StreamSession(self._ring, self._engine.wake)
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            async for message in session.outgoing():
                yield message
            if reader.done() and reader.exception():
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a message that cannot be read")
        finally:
            reader.cancel()
            session.close()
            self._engine.closed(session)

    async def _read(self, session: StreamSession, messages: AsyncIterator[pb.RouterMessage]) -> None:
        try:
            async for message in messages:
                self._engine.handle(session, message)
                while session.overflowing or self._engine.backlog > MAX_BACKLOG:
                    await asyncio.sleep(BUSY_S)
        except (grpc.RpcError, asyncio.CancelledError):
            pass
        finally:
            # The router's half is closed: so is the session. What was sent before still goes out.
            session.close()
            self._engine.closed(session)


def check_address(host: str, port: int) -> None:
    """Asks the system first: gRPC would write its own long story to stderr."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartupError(f"cannot listen on {host}:{port}: {reason}") from None


async def serve(
    info: common.WorkerInfo,
    tokenizer: list[Path],
    engine: EngineThread,
    *,
    host: str,
    port: int,
    ring: int,
    on_serving: Callable[[int], None],
    stop: asyncio.Event,
) -> None:
    """Serves until `stop` is set, then ends the session with a goodbye and returns. Raises if the engine's thread
    failed.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            # Two workers on one port would each get some of the router's calls.
            ("grpc.so_reuseport", 0),
        ]
    )
    worker_pb2_grpc.add_WorkerServicer_to_server(  # type: ignore[no-untyped-call]
        WorkerService(info, tokenizer, engine, ring), server
    )
    health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    check_address(host, port)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error}") from None
    await server.start()
    for name in ("", SERVICE):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    engine.start()
    on_serving(bound)
    done: asyncio.Future[Any] = asyncio.wrap_future(engine.done)
    stopping: asyncio.Future[Any] = asyncio.create_task(stop.wait())
    await asyncio.wait({done, stopping}, return_when=asyncio.FIRST_COMPLETED)
    await health_servicer.enter_graceful_shutdown()
    engine.stop()
    # A goodbye ends the session; the grace is for a router that does not read it.
    await asyncio.wait({done}, timeout=STOP_S)
    await server.stop(grace=1.0)
    stopping.cancel()
    if done.done():
        done.result()
