"""The asyncio client of a router: `client.py` with `await` in front."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from scls_router import _answers, _request
from scls_router._channel import OPTIONS, address, closed, error_of, metadata
from scls_router._retry import Attempts, Budget, RetryPolicy
from scls_router.proto import router_pb2 as pb
from scls_router.proto.router_pb2_grpc import RouterStub
from scls_router.results import Completion, Piece, RouteDecision, WorkerStatus

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from scls_router._request import Options, Prompt

T = TypeVar("T")


class AsyncClient:
    """A router over gRPC, for asyncio. Of one event loop; any number of its tasks may call at once.

    Example:
        >>> import asyncio
        >>> from scls_router import AsyncClient
        >>> async def main():
        ...     async with AsyncClient("127.0.0.1:30001") as client:
        ...         done = await client.generate("Where is my flight?", model="tiny", max_tokens=32)
        ...         return done.choices[0].finish_reason, done.usage.completion_tokens
        >>> asyncio.run(main())
        ('length', 32)
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Does not connect yet: the first call does. The arguments are those of `Client`."""
        self._target = address(target)
        self._timeout = timeout
        self._policy = retry or RetryPolicy()
        self._budget = Budget(self._policy)
        self._metadata = metadata(api_key)
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Completion:
        """Generates and waits for the end. Arguments and errors are those of `Client.generate`.

        Cancelling the task that waits cancels the request.
        """
        request = _request.generate_request(prompt, **options)
        collector = _answers.collector(request)
        async with aclosing(self._pieces(request, timeout)) as pieces:
            async for piece in pieces:
                collector.add(piece)
        return collector.completion()

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Piece, None]:
        """Generates and gives the pieces as they come; arguments and errors are those of `Client.generate`.

        The request starts with the first `anext`. Closing the generator cancels it: its rows are free at the worker's
        next step. The event loop closes it soon after a loop over it was left; `contextlib.aclosing` does at once.

        Example:
            >>> import asyncio
            >>> async def main():
            ...     async with AsyncClient("127.0.0.1:30001") as client:
            ...         async for piece in client.stream("Hello", model="tiny", max_tokens=2):
            ...             print(piece.first_index, len(piece.ids), piece.finish_reason)
            >>> asyncio.run(main())
            0 1 None
            1 1 None
            2 0 length
        """
        return self._pieces(_request.generate_request(prompt, **options), timeout)

    async def route(self, prompt: Prompt, *, model: str, timeout: float | None = None) -> RouteDecision:
        """Where the prompt would go now; see `Client.route`."""
        request = _request.route_request(prompt, model=model)
        return _answers.decision(await self._call(self._stub.Route, request, timeout))

    async def workers(self, *, timeout: float | None = None) -> list[WorkerStatus]:
        """All workers the router knows; see `Client.workers`."""
        return _answers.workers(await self._call(self._stub.ListWorkers, pb.ListWorkersRequest(), timeout))

    async def close(self) -> None:
        """Closes the connection; what still runs, or is asked later, fails with `Cancelled`."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @cached_property
    def _stub(self) -> Any:
        if self._closed:
            raise closed()
        # Not in the constructor: a channel belongs to the loop that runs when it is made.
        self._channel = grpc.aio.insecure_channel(self._target, options=OPTIONS)
        return RouterStub(self._channel)  # type: ignore[no-untyped-call]

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self._policy, self._budget, self._timeout if timeout is None else timeout)

    def _begin(self, method: Callable[..., T], request: object, attempts: Attempts) -> T:
        if self._closed:
            raise closed()
        return method(request, timeout=attempts.left(), metadata=self._metadata)

    def _was_closed(self) -> bool:
        """Whether a call was cancelled by `close` and not with its task, which before Python 3.11 cannot tell."""
        task: Any = asyncio.current_task()
        return self._closed and not (hasattr(task, "cancelling") and task.cancelling())

    async def _pieces(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncGenerator[Piece, None]:
        attempts = self._attempts(timeout)
        while True:
            call = self._begin(self._stub.Generate, request, attempts)
            came = False
            try:
                async for answer in call:
                    came = True
                    yield _answers.piece(answer)
                attempts.succeeded()
                return
            except grpc.RpcError as error:
                failure = error_of(error)
            except (asyncio.CancelledError, grpc.aio.UsageError):
                if self._was_closed():
                    raise closed() from None
                raise
            finally:
                # Also of a caller who left the loop. Of a call that ended it changes nothing.
                call.cancel()
            if came:
                raise failure
            await asyncio.sleep(attempts.pause(failure))

    async def _call(self, method: Callable[..., Awaitable[T]], request: object, timeout: float | None) -> T:
        attempts = self._attempts(timeout)
        while True:
            try:
                answer = await self._begin(method, request, attempts)
            except grpc.RpcError as error:
                failure = error_of(error)
            except (asyncio.CancelledError, grpc.aio.UsageError):
                if self._was_closed():
                    raise closed() from None
                raise
            else:
                attempts.succeeded()
                return answer
            await asyncio.sleep(attempts.pause(failure))
