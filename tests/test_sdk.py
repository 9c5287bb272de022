"""The clients of `scls_router` over real processes: one table of cases for the blocking and the asyncio client."""

from __future__ import annotations

import asyncio
import doctest
import math
import pickle
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
import scls_router.aio
import scls_router.client
import torch
from harness import MODEL, Router, RustMock, Worker
from reference import differs, greedy
from scls_router import AsyncClient, Client, RetryPolicy, errors, hash_blocks, results
from scls_router._request import generate_request, packed_ids
from scls_router._retry import Attempts, Budget
from scls_router.proto import common_pb2 as common
from scls_router.proto import router_pb2 as pb
from scls_router.proto import router_pb2_grpc

MOCK = ["--served-name", "tiny", "--vocab", "2560", "--tokenizer", str(MODEL)]
ONCE = RetryPolicy(attempts=1)


class Blocking:
    """The asyncio client with the shape of the blocking one, so that one table serves both."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = AsyncClient(*args, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            answer = getattr(self.client, name)(*args, **options)
            return self.each(answer) if name == "stream" else self.loop.run_until_complete(answer)

        return call

    def each(self, pieces: AsyncIterator[results.Piece]) -> Iterator[results.Piece]:
        try:
            while (piece := self.loop.run_until_complete(anext(pieces, None))) is not None:
                yield piece
        finally:
            self.loop.run_until_complete(pieces.aclose())  # type: ignore[attr-defined]

    def __enter__(self) -> Blocking:
        self.loop.run_until_complete(self.client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run_until_complete(self.client.__aexit__(None, None, None))
        self.loop.close()


@pytest.fixture(params=[Client, Blocking], ids=["client", "async"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def mock() -> Iterator[Router]:
    """Of the Rust mock, 5 ms an iteration."""
    with RustMock(*MOCK, "--step-us", "5000", "--worker-id", "w0") as worker:
        with Router([worker.url]) as router:
            yield router


@pytest.fixture
def client(kind: Any, mock: Router) -> Iterator[Any]:
    with kind(mock.addresses["grpc"], timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def real() -> Iterator[Router]:
    with Worker("--model", str(MODEL), "--dtype", "float32", "--served-name", "tiny") as worker:
        with Router([worker.url], "--scheduler", "ils") as router:
            yield router


def test_generate(client: Any) -> None:
    done = client.generate([5, 6, 7], model="tiny", max_tokens=10, temperature=0, ignore_eos=True, request_id="mine")
    assert done.request_id == "mine" and len(done.choices) == 1
    choice = done.choices[0]
    assert (choice.index, len(choice.ids), choice.finish_reason, choice.logprobs) == (0, 10, "length", None)
    assert done.ids == choice.ids and done.text == choice.text
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 10, 13)
    assert done.usage.worker_id == "w0" and done.usage.slices >= 1
    again = client.generate(array("I", [5, 6, 7]), model="tiny", max_tokens=10, temperature=0, ignore_eos=True)
    assert again.ids == done.ids and again.request_id != "mine"


def test_a_real_worker_gives_what_transformers_gives(kind: Any, real: Router) -> None:
    prompt = list(range(10, 60))
    with kind(real.addresses["grpc"], timeout=60) as client:
        done = client.generate(torch.tensor(prompt), model="tiny", max_tokens=20, temperature=0)
        text = client.generate("I want to cancel my flight.", model="tiny", max_tokens=8, temperature=0)
    wrong = differs(list(done.ids), greedy(MODEL, prompt, 20))
    assert wrong is None or wrong.startswith("tie"), wrong
    assert text.text and text.usage.prompt_tokens > 3


def test_stream_is_generate_in_pieces(client: Any) -> None:
    options = {"model": "tiny", "max_tokens": 12, "seed": 3, "ignore_eos": True}
    pieces = list(client.stream("Hello", **options))
    done = client.generate("Hello", **options)
    assert tuple(i for p in pieces for i in p.ids) == done.ids and "".join(p.text for p in pieces) == done.text
    ids = 0
    for piece in pieces:
        assert piece.choice == 0 and (not piece.ids or piece.first_index == ids)
        ids += len(piece.ids)
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert [p.usage for p in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].usage == done.usage
    assert len({p.request_id for p in pieces}) == 1


def test_route_and_workers(client: Any, mock: Router) -> None:
    decision = client.route(np.arange(100, 200), model="tiny")
    assert (decision.worker_id, decision.policy, decision.prompt_tokens) == ("w0", "product_anticipating", 100)
    (candidate,) = decision.candidates
    assert candidate.worker_id == "w0" and candidate.score == candidate.new_tokens << 32 > 0
    (worker,) = client.workers()
    assert (worker.worker_id, worker.state, worker.models) == ("w0", "ready", ("tiny",))
    assert worker.block_size == 16 and worker.url.startswith("grpc://")


@pytest.mark.parametrize(
    ("options", "kind_of", "field"),
    [
        ({"model": "none"}, errors.ModelNotFound, "model"),
        ({"prompt": ""}, errors.InvalidRequest, "prompt"),
        ({"prompt": [3000]}, errors.InvalidRequest, "prompt"),
        ({"prompt": [-1]}, errors.InvalidRequest, "prompt"),
        ({"prompt": np.array([-1])}, errors.InvalidRequest, "prompt"),
        ({"prompt": b"abc"}, errors.InvalidRequest, "prompt"),
        ({"prompt": bytes(17 << 20)}, errors.InvalidRequest, "prompt"),
        ({"temperature": math.nan}, errors.InvalidRequest, "temperature"),
        ({"max_tokens": 0}, errors.InvalidRequest, "max_tokens"),
        ({"max_tokens": 10**6}, errors.InvalidRequest, "max_tokens"),
        ({"n": 0}, errors.InvalidRequest, "n"),
        ({"min_tokens": 9, "max_tokens": 8}, errors.InvalidRequest, "min_tokens"),
        ({"stop": ""}, errors.InvalidRequest, "stop"),
        ({"stop_token_ids": [2560]}, errors.InvalidRequest, "stop_token_ids"),
        # What the message itself cannot hold.
        ({"top_k": -1}, errors.InvalidRequest, "top_k"),
        ({"logprobs": -1}, errors.InvalidRequest, "logprobs"),
        ({"max_tokens": 2**40}, errors.InvalidRequest, "max_tokens"),
        ({"n": 2**40}, errors.InvalidRequest, "n"),
        ({"stop_token_ids": [-1]}, errors.InvalidRequest, "stop_token_ids"),
        ({"logit_bias": {-1: 1.0}}, errors.InvalidRequest, "logit_bias"),
        ({"prompt": "\ud800"}, errors.InvalidRequest, "prompt"),
        ({"max_token": 3}, TypeError, None),
        ({"prompt": [1.5]}, TypeError, None),
        ({"prompt": np.zeros(3)}, TypeError, None),
        ({"timeout": -1}, ValueError, None),
    ],
)
def test_what_is_wrong_is_named(
    client: Any, options: dict[str, Any], kind_of: type[Exception], field: str | None
) -> None:
    with pytest.raises(kind_of) as error:
        client.generate(**{"prompt": [5], "model": "tiny", "max_tokens": 2, **options})
    if isinstance(error.value, errors.SclsError):
        assert error.value.field == field and str(error.value)
        assert error.value.retry_after is None


def test_the_reason_is_the_one_of_http(client: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as error:
        client.generate([5], model="tiny", max_tokens=10**6)
    assert (error.value.reason, error.value.status) == ("context_length_exceeded", "INVALID_ARGUMENT")
    with pytest.raises(errors.NotFound) as missing:
        client.generate([5], model="x" * 100_000)
    assert missing.value.reason == "model_not_found" and len(str(missing.value)) < 1000


def test_an_argument_of_a_wrong_type_is_named() -> None:
    for name, value in [("top_p", "a"), ("model", 5), ("stop", [1]), ("logit_bias", {"5": 1.0}), ("n", 1.5)]:
        with pytest.raises(TypeError, match=name):
            generate_request([5], **{"model": "m", name: value})
    with pytest.raises(TypeError, match="integer"):
        generate_request([5], model="m", seed="a")  # type: ignore[arg-type]


def test_what_is_not_given_is_not_greedy() -> None:
    assert generate_request([5], model="m").sampling.temperature == 1.0
    assert generate_request([5], model="m", temperature=None).sampling.temperature == 1.0
    assert generate_request([5], model="m", temperature=0).sampling.temperature == 0.0


def test_a_key_that_no_header_holds_is_not_shown(kind: Any) -> None:
    for key in ("secret\n", "sécret"):
        with pytest.raises(ValueError, match="api_key") as error:
            kind("127.0.0.1:1", api_key=key)
        assert "cret" not in str(error.value)


def test_closing_ends_what_runs_and_what_comes_later(mock: Router) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 1000, "ignore_eos": True}
    client = Client(mock.addresses["grpc"], timeout=30)
    stream = client.stream([6, 9], **asked)
    next(stream)
    client.close()
    with pytest.raises(errors.Cancelled):
        list(stream)
    for call in (client.workers, lambda: client.generate([5], **asked), lambda: next(client.stream([5], **asked))):
        with pytest.raises(errors.Cancelled):
            call()
    mock.wait_drained(2)


def test_closing_an_asyncio_client_cancels_calls_and_not_tasks() -> None:
    called = threading.Semaphore(0)

    class Hangs(router_pb2_grpc.RouterServicer):
        def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
            called.release()
            while context.is_active():
                time.sleep(0.01)
            yield from ()

        def Route(self, request: pb.RouteRequest, context: grpc.ServicerContext) -> pb.Decision:
            called.release()
            while context.is_active():
                time.sleep(0.01)
            return pb.Decision()

    async def close(target: str) -> None:
        client = AsyncClient(target, timeout=30)
        tasks = [asyncio.create_task(ask([5], model="m")) for ask in (client.generate, client.route)]
        for _ in tasks:
            await asyncio.to_thread(called.acquire, timeout=10)
        await client.close()
        for task in tasks:
            with pytest.raises(errors.Cancelled):
                await task
        never_used = AsyncClient(target)
        await never_used.close()
        for closed in (client, never_used):
            with pytest.raises(errors.Cancelled):
                await closed.workers()
            with pytest.raises(errors.Cancelled):
                await closed.generate([5], model="m")

    with serving(Hangs()) as target:
        asyncio.run(close(target))


def test_leaving_a_stream_frees_its_rows(client: Any, mock: Router) -> None:
    # 1000 tokens would take 5 s.
    for piece in client.stream([9, 9], model="tiny", max_tokens=1000, ignore_eos=True):
        if piece.first_index >= 3:
            break
    mock.wait_drained(2)


def test_the_loop_closes_a_stream_that_was_left(mock: Router) -> None:
    async def leave() -> None:
        async with AsyncClient(mock.addresses["grpc"]) as client:
            async for piece in client.stream([8, 9], model="tiny", max_tokens=1000, ignore_eos=True):
                if piece.first_index >= 3:
                    break
            await asyncio.to_thread(mock.wait_drained, 2)

    asyncio.run(leave())


def test_cancelling_the_task_frees_its_rows(mock: Router) -> None:
    async def cancel() -> None:
        async with AsyncClient(mock.addresses["grpc"]) as client:
            task = asyncio.create_task(client.generate([7, 9], model="tiny", max_tokens=1000, ignore_eos=True))
            while not (await client.workers())[0].batch_size:
                await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(mock.wait_drained, 2)

    asyncio.run(cancel())


def test_a_deadline_ends_it_and_frees_its_rows(client: Any, mock: Router) -> None:
    began = time.monotonic()
    got: list[results.Piece] = []
    with pytest.raises(errors.DeadlineExceeded):
        for piece in client.stream([4, 4], model="tiny", max_tokens=1000, ignore_eos=True, timeout=0.3):
            got.append(piece)
    assert 0.25 < time.monotonic() - began < 1.5
    assert got, "tokens came before the deadline"
    mock.wait_drained(2)


@pytest.mark.parametrize("timeout", [1e10, 1e300, math.inf])
def test_a_deadline_that_never_comes(client: Any, timeout: float) -> None:
    assert client.generate([5, 6], model="tiny", max_tokens=1, timeout=timeout).choices[0].finish_reason == "length"


def test_closing_ends_a_stream_with_an_error_of_ours(kind: Any, mock: Router) -> None:
    client = kind(mock.addresses["grpc"], timeout=30)
    pieces = client.stream([5, 6], model="tiny", max_tokens=1000, ignore_eos=True)
    next(pieces)
    client.close()
    with pytest.raises(errors.Cancelled):
        list(pieces)
    mock.wait_drained()
    for call in (lambda: client.generate([5], model="tiny"), lambda: list(client.stream([5], model="tiny"))):
        with pytest.raises(errors.Cancelled, match="the client is closed"):
            call()


def test_closing_ends_a_call_and_cancelling_still_cancels(mock: Router) -> None:
    async def main() -> None:
        client = AsyncClient(mock.addresses["grpc"])
        long = {"model": "tiny", "max_tokens": 1000, "ignore_eos": True}
        runs, cancelled = (asyncio.create_task(client.generate([5, 6], **long)) for _ in range(2))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await client.close()
        with pytest.raises(errors.Cancelled):
            await runs

    asyncio.run(main())
    mock.wait_drained()


def test_calls_at_once(mock: Router) -> None:
    async def many() -> list[results.Completion]:
        async with AsyncClient(mock.addresses["grpc"]) as client:
            asks = (client.generate([i], model="tiny", max_tokens=6, temperature=0) for i in range(5, 35))
            return await asyncio.gather(*asks)

    answers = asyncio.run(many())
    with Client(mock.addresses["grpc"]) as client:
        found: dict[int, tuple[int, ...]] = {}

        def ask(first: int) -> None:
            found[first] = client.generate([first], model="tiny", max_tokens=6, temperature=0).ids

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(5, 35)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert [found[i] for i in range(5, 35)] == [a.ids for a in answers]


def test_without_workers_retries_end_with_the_budget(kind: Any) -> None:
    policy = RetryPolicy(attempts=3, backoff=0.01, bucket=10)
    with Router(["grpc://127.0.0.1:1"], ready=0) as router:
        with kind(router.addresses["grpc"], retry=policy, timeout=0.5) as client:
            began = time.monotonic()
            with pytest.raises(errors.Unavailable) as error:
                client.generate([5], model="tiny")
            # The router asks to come again after a second, which the deadline does not allow.
            assert error.value.retry_after == 1.0 and error.value.reason == "no_ready_worker"
            assert time.monotonic() - began < 0.4
        calls = router.metrics()['scls_router_requests_total{model="unknown",code="503"}']
        assert calls == 1


@contextmanager
def serving(service: router_pb2_grpc.RouterServicer) -> Iterator[str]:
    """The address of a router made by hand."""
    server = grpc.server(ThreadPoolExecutor(4))
    router_pb2_grpc.add_RouterServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@contextmanager
def failing(status: grpc.StatusCode, times: int, after: int = 0) -> Iterator[tuple[str, list[float]]]:
    """A router whose first calls fail with `status` after so many answers; and the deadlines its calls came with."""
    calls: list[float] = []

    class Service(router_pb2_grpc.RouterServicer):
        def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
            calls.append(context.time_remaining())
            failed = len(calls) <= times
            for index in range(after if failed else 2):
                yield pb.GenerateResponse(ids=[index], first_index=index)
            if failed:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", "150"), ("scls-code", "overloaded")))
                context.abort(status, "not now")
            yield pb.GenerateResponse(finish=2, usage=pb.Usage(completion_tokens=2))

        def Route(self, request: pb.RouteRequest, context: grpc.ServicerContext) -> pb.Decision:
            calls.append(context.time_remaining())
            if len(calls) <= times:
                context.abort(status, "not now")
            return pb.Decision(worker_id="w")

    with serving(Service()) as target:
        yield target, calls


@contextmanager
def answering(*answers: pb.GenerateResponse) -> Iterator[tuple[str, list[pb.GenerateRequest]]]:
    """A router that answers every generation so; and what it was asked."""
    asked: list[pb.GenerateRequest] = []

    class Service(router_pb2_grpc.RouterServicer):
        def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
            asked.append(request)
            metadata = dict(context.invocation_metadata())
            assert metadata["authorization"] == "Bearer key"
            yield from answers

    with serving(Service()) as target:
        yield target, asked


def test_choices_are_put_together_by_index(kind: Any) -> None:
    lp = common.TokenLogprobs(chosen=-0.5, top_ids=[7, 8], top=[-0.25, -0.5])
    answers = [
        pb.GenerateResponse(choice=1, ids=[8], text="b", logprobs=[lp], request_id="r"),
        pb.GenerateResponse(choice=0, ids=[7], text="a", logprobs=[lp], request_id="r"),
        pb.GenerateResponse(choice=1, ids=[9], first_index=1, text="c", logprobs=[lp], finish=1, request_id="r"),
        pb.GenerateResponse(choice=0, first_index=1, finish=2, usage=pb.Usage(completion_tokens=3), request_id="r"),
    ]
    with answering(*answers) as (target, asked), kind(target, api_key="key") as client:
        done = client.generate("x", model="m", n=2, logprobs=2, seed=-1, stop="end", logit_bias={5: -1.5}, top_p=0.5)
    first, second = done.choices
    token = results.TokenLogprobs(-0.5, ((7, -0.25), (8, -0.5)))
    assert (first.index, first.text, first.ids, first.finish_reason, first.logprobs) == (
        0,
        "a",
        (7,),
        "length",
        (token,),
    )
    assert (second.index, second.text, second.ids, second.finish_reason) == (1, "bc", (8, 9), "stop")
    assert second.logprobs == (token, token) and done.usage.completion_tokens == 3
    (request,) = asked
    sampling = request.sampling
    assert (request.n, sampling.logprobs, sampling.seed, list(request.stop)) == (2, 2, 2**64 - 1, ["end"])
    assert dict(sampling.logit_bias) == {5: -1.5} and sampling.top_p == 0.5
    assert not any(map(sampling.HasField, ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")))


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [pb.GenerateResponse(ids=[7])],
        [pb.GenerateResponse(finish=2)],
        [pb.GenerateResponse(choice=1, ids=[7])],
        [pb.GenerateResponse(ids=[7], first_index=5, finish=2, usage=pb.Usage())],
    ],
)
def test_an_answer_that_is_none_is_an_error(kind: Any, answers: list[pb.GenerateResponse]) -> None:
    with answering(*answers) as (target, _), kind(target, api_key="key") as client:
        with pytest.raises(errors.InternalError):
            client.generate("x", model="m")


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_what_failed_before_its_first_token_is_tried_again(kind: Any, status: grpc.StatusCode) -> None:
    with failing(status, 2) as (target, calls), kind(target, retry=RetryPolicy(backoff=0.01), timeout=3) as client:
        assert client.generate([5], model="m").ids == (0, 1)
        # The push-back was honoured twice, within one deadline. gRPC rounds what it sends.
        assert len(calls) == 3 and calls[0] - calls[2] > 0.25
    with failing(status, 2) as (target, calls), kind(target, retry=RetryPolicy(backoff=0.01), timeout=20) as client:
        assert client.route([5], model="m").worker_id == "w"
        assert len(calls) == 3


def test_what_failed_later_or_otherwise_is_not_tried_again(kind: Any) -> None:
    for status, after, error in [
        (grpc.StatusCode.UNAVAILABLE, 1, errors.Unavailable),
        (grpc.StatusCode.INTERNAL, 0, errors.InternalError),
        (grpc.StatusCode.ABORTED, 0, errors.SclsError),
    ]:
        with failing(status, 9, after) as (target, calls), kind(target, timeout=20) as client:
            with pytest.raises(error) as raised:
                client.generate([5], model="m")
            assert len(calls) == 1 and raised.value.status == status.name and raised.value.retry_after == 0.15


def test_calls_of_a_client_share_its_budget(kind: Any) -> None:
    policy = RetryPolicy(attempts=10, backoff=0.001, bucket=10)
    # Without a push-back, as Route fails.
    with failing(grpc.StatusCode.UNAVAILABLE, 1000) as (target, calls), kind(target, retry=policy) as client:
        for _ in range(5):
            with pytest.raises(errors.Unavailable):
                client.route([5], model="m")
    # Ten tokens: retries end when half of them are gone, and calls fail at once from then on.
    assert len(calls) == 5 + 4


def test_nobody_there(kind: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{probe.getsockname()[1]}"
    with kind(target, retry=ONCE, timeout=5) as client, pytest.raises(errors.Unavailable):
        client.workers()


def test_attempts_end_before_the_deadline() -> None:
    policy = RetryPolicy(backoff=100, most_backoff=100, bucket=1000)
    late = errors.Unavailable("x", "UNAVAILABLE", retry_after=10.0)
    with pytest.raises(errors.Unavailable):
        Attempts(policy, Budget(policy), 5.0).pause(late)
    assert Attempts(policy, Budget(policy), math.inf).pause(late) >= 10.0
    assert Attempts(policy, Budget(policy), math.inf).left() is None
    assert Attempts(policy, Budget(policy), 1e300).left() is None


def test_retries_without_end() -> None:
    policy = RetryPolicy(attempts=10**9, backoff=0.001, most_backoff=0.002, bucket=math.inf)
    attempts = Attempts(policy, Budget(policy), math.inf)
    assert all(attempts.pause(errors.Unavailable("x", "UNAVAILABLE")) <= 0.002 for _ in range(2000))


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda ids: np.array(ids, np.uint32),
        lambda ids: np.array(ids, np.int32),
        lambda ids: np.array(ids, ">u4"),
        lambda ids: np.repeat(np.array(ids, np.uint32), 2)[::2],
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: array("I", ids),
        lambda ids: array("q", ids),
        lambda ids: array("I", ids).tobytes(),
        lambda ids: memoryview(array("I", ids)),
        lambda ids: bytearray(array("I", ids).tobytes()),
        lambda ids: memoryview(array("I", ids).tobytes()),
        lambda ids: memoryview(np.repeat(np.array(ids, np.uint32), 2))[::2],
        lambda ids: range(ids[0], ids[-1] + 1),
    ],
)
def test_ids_of_every_kind_are_packed_alike(make: Callable[[list[int]], Any]) -> None:
    ids = list(range(70_000, 70_050))
    assert packed_ids(make(ids)) == np.array(ids, "<u4").tobytes()
    assert hash_blocks(0, packed_ids(make(ids)), 16) == hash_blocks(0, ids, 16)


def test_results_and_errors_pickle(mock: Router) -> None:
    with Client(mock.addresses["grpc"]) as client:
        done = client.generate([5], model="tiny", max_tokens=20, ignore_eos=True)
        values: list[Any] = [done, *client.stream([5], model="tiny", max_tokens=2), *client.workers()]
        values.append(client.route([5], model="tiny"))
        with pytest.raises(errors.ModelNotFound) as error:
            client.generate([5], model="none")
    for value in values:
        assert pickle.loads(pickle.dumps(value)) == value and hash(value) == hash(value)
    assert "20 in all" in repr(done) and "worker_id='w0'" in repr(done)
    copy = pickle.loads(pickle.dumps(error.value))
    assert type(copy) is errors.ModelNotFound and vars(copy) == vars(error.value)
    assert copy.field == "model" and str(copy) == str(error.value)


@pytest.mark.parametrize("module", [scls_router.client, scls_router.aio])
def test_the_examples_run(module: ModuleType, mock: Router) -> None:
    tests = [t for t in doctest.DocTestFinder().find(module) if t.examples]
    assert len(tests) >= 2
    for test in tests:
        for example in test.examples:
            example.source = example.source.replace("127.0.0.1:30001", mock.addresses["grpc"])
        said: list[str] = []
        assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


def test_importing_is_cheap() -> None:
    code = "import sys, time; t = time.perf_counter(); import scls_router; t = time.perf_counter() - t;"
    code += "print(t); print([m for m in ('grpc', 'google.protobuf', 'numpy', 'torch') if m in sys.modules]);"
    code += "from scls_router import Client; print([m for m in ('numpy', 'torch') if m in sys.modules])"
    took, loaded, later = subprocess.check_output([sys.executable, "-c", code], text=True).split("\n", 2)
    assert float(took) < 0.3 and loaded == later.strip() == "[]"
