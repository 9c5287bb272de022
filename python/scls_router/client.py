"""The blocking client of a router."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

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


class Client:
    """A router over gRPC. One client serves any number of threads, over one connection; a forked process needs its own.

    Example:
        >>> from scls_router import Client
        >>> with Client("127.0.0.1:30001") as client:
        ...     done = client.generate("Where is my flight?", model="tiny", max_tokens=32)
        ...     text = "".join(piece.text for piece in client.stream(done.ids, model="tiny", max_tokens=8))
        >>> done.choices[0].finish_reason, done.usage.completion_tokens
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
        """Does not connect yet: the first call does.

        Args:
            target: the router's gRPC address, `host:port`.
            api_key: sent with every call as `authorization: Bearer`.
            timeout: longest a call may take, its retries included, in seconds; `math.inf` for no limit. The router
                honours it too.
            retry: how calls are tried again that failed before their first token; `RetryPolicy(attempts=1)` never.

        Raises:
            ValueError: `target` is the address of an HTTP server.
        """
        self._timeout = timeout
        self._policy = retry or RetryPolicy()
        self._budget = Budget(self._policy)
        self._metadata = metadata(api_key)
        self._closed = False
        self._channel = grpc.insecure_channel(address(target), options=OPTIONS)
        self._stub: Any = RouterStub(self._channel)  # type: ignore[no-untyped-call]

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Completion:
        """Generates and waits for the end.

        Args:
            prompt: a text, or token ids: a list of ints, or without a step per id a numpy array, a torch tensor, an
                `array("I")`, or little-endian u32 bytes.
            timeout: longest it may take, in seconds; by default the client's.
            model: name of the model. Required.
            max_tokens: most tokens to generate; by default what is left of the context.
            temperature: 0 is greedy, 1 (the default) the model's own distribution.
            top_k: draw among the k most likely tokens; 0 is off.
            top_p: draw among the fewest most likely tokens that together have this probability, in (0, 1].
            min_p: leave out tokens less likely than this times the likeliest, in [0, 1].
            repetition_penalty: divides the logits of tokens in prompt and output; 1 is off.
            presence_penalty, frequency_penalty: taken off the logits of tokens in the output, once, and per
                occurrence; 0 is off.
            seed: of the draw, any integer (taken modulo 2**64). The same seed gives the same tokens, whatever else
                runs. By default a random one.
            logit_bias: added to the logits, by token id; at most 1024 of them.
            logprobs: None for none; 0 for those of the drawn tokens; k for the k most likely too, at most 20.
            n: choices; choice i draws with seed + i.
            stop: strings that end the text, and are not part of it; at most 16.
            stop_token_ids: ids that end the output, beside the model's own; at most 1024.
            min_tokens: tokens before which nothing but the limit ends the output.
            ignore_eos: go on past the model's end token.
            request_id: names the request in logs and answers; by default the router makes one up.
            urgent: a running slice is cut for this request at once: a shorter time to its first token, at the price of a
                slice start.

        Raises:
            InvalidRequest: a value is out of range, or prompt and limit pass the context; `field` says which.
            ModelNotFound: no such model.
            Overloaded, Unavailable, WorkerFailed: also after the retries.
            Cancelled: the client is closed, or was meanwhile.
            DeadlineExceeded: it took longer than `timeout`. The router has ended it too.
            TypeError: an argument of the wrong type, or that does not exist.
            ValueError: `timeout` is not above 0.
        """
        request = _request.generate_request(prompt, **options)
        collector = _answers.collector(request)
        with closing(self._pieces(request, timeout)) as pieces:
            for piece in pieces:
                collector.add(piece)
        return collector.completion()

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Generator[Piece, None, None]:
        """Generates and gives the pieces as they come; arguments and errors are those of `generate`.

        The request starts with the first `next`. Leaving the loop, or closing the generator, cancels it: its rows are
        free at the worker's next step. Nothing is tried again once a piece has come.

        Example:
            >>> with Client("127.0.0.1:30001") as client:
            ...     for piece in client.stream("Hello", model="tiny", max_tokens=3):
            ...         print(piece.first_index, len(piece.ids), piece.finish_reason)
            0 1 None
            1 1 None
            2 1 None
            3 0 length
        """
        return self._pieces(_request.generate_request(prompt, **options), timeout)

    def route(self, prompt: Prompt, *, model: str, timeout: float | None = None) -> RouteDecision:
        """Where the prompt would go now. Nothing is reserved, nothing runs.

        Args:
            prompt: text or token ids, as for `generate`.
            model: name of the model.
            timeout: longest it may take, in seconds; by default the client's.

        Raises:
            InvalidRequest, ModelNotFound, Overloaded, Unavailable, DeadlineExceeded: as for `generate`.

        Example:
            >>> import array
            >>> with Client("127.0.0.1:30001") as client:
            ...     decision = client.route(array.array("I", range(100, 200)), model="tiny")
            >>> best = min(decision.candidates, key=lambda candidate: candidate.score)
            >>> decision.prompt_tokens, best.worker_id == decision.worker_id
            (100, True)
        """
        request = _request.route_request(prompt, model=model)
        return _answers.decision(self._call(self._stub.Route, request, timeout))

    def workers(self, *, timeout: float | None = None) -> list[WorkerStatus]:
        """All workers the router knows, in the order it was told of them.

        Raises:
            Unavailable, DeadlineExceeded: the router cannot be reached, or not in time.

        Example:
            >>> with Client("127.0.0.1:30001") as client:
            ...     {worker.state for worker in client.workers()}
            {'ready'}
        """
        return _answers.workers(self._call(self._stub.ListWorkers, pb.ListWorkersRequest(), timeout))

    def close(self) -> None:
        """Closes the connection; what still runs, or is asked later, fails with `Cancelled`."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self._policy, self._budget, self._timeout if timeout is None else timeout)

    def _begin(self, method: Callable[..., T], request: object, attempts: Attempts) -> T:
        try:
            return method(request, timeout=attempts.left(), metadata=self._metadata)
        except ValueError:  # gRPC's, of a closed channel
            if self._closed:
                raise closed() from None
            raise

    def _pieces(self, request: pb.GenerateRequest, timeout: float | None) -> Generator[Piece, None, None]:
        attempts = self._attempts(timeout)
        while True:
            call = self._begin(self._stub.Generate, request, attempts)
            came = False
            try:
                for answer in call:
                    came = True
                    yield _answers.piece(answer)
                return attempts.succeeded()
            except grpc.RpcError as error:
                failure = error_of(error)
            finally:
                # Also of a caller who left the loop. Of a call that ended it changes nothing.
                call.cancel()
            if came:
                raise failure
            time.sleep(attempts.pause(failure))

    def _call(self, method: Callable[..., T], request: object, timeout: float | None) -> T:
        attempts = self._attempts(timeout)
        while True:
            try:
                answer = self._begin(method, request, attempts)
            except grpc.RpcError as error:
                failure = error_of(error)
            else:
                attempts.succeeded()
                return answer
            time.sleep(attempts.pause(failure))
