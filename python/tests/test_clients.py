"""What the clients say and read, against a router that is made up."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from scls_router import AsyncClient, Client
from scls_router.proto import common_pb2 as common
from scls_router.proto import router_pb2 as pb
from scls_router.proto.router_pb2_grpc import RouterServicer, add_RouterServicer_to_server
from scls_router.results import Completion


class MadeUp(RouterServicer):
    """Two tokens; when it will be done is said only to those in a hurry, with the first of them."""

    def Generate(self, request: pb.GenerateRequest, context: object) -> Iterator[pb.GenerateResponse]:
        eta = pb.Eta(lo_ms=40, hi_ms=90) if request.urgent else None
        yield pb.GenerateResponse(request_id="r", ids=[7], text="a", eta=eta)
        usage = pb.Usage(prompt_tokens=1, completion_tokens=2, worker_id="w")
        last = common.FINISH_REASON_LENGTH
        yield pb.GenerateResponse(request_id="r", first_index=1, ids=[8], text="b", finish=last, usage=usage)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    add_RouterServicer_to_server(MadeUp(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


def blocking(address: str, **options: Any) -> tuple[Completion, list[tuple[int, int] | None]]:
    with Client(address) as client:
        done = client.generate([1], model="m", **options)
        return done, [piece.eta_ms for piece in client.stream([1], model="m", **options)]


def awaiting(address: str, **options: Any) -> tuple[Completion, list[tuple[int, int] | None]]:
    async def main() -> tuple[Completion, list[tuple[int, int] | None]]:
        async with AsyncClient(address) as client:
            done = await client.generate([1], model="m", **options)
            return done, [piece.eta_ms async for piece in client.stream([1], model="m", **options)]

    return asyncio.run(main())


@pytest.mark.parametrize("ask", [blocking, awaiting])
def test_the_first_piece_says_when_the_answer_is_there(ask: Callable[..., Any], address: str) -> None:
    done, pieces = ask(address, urgent=True)
    assert done.eta_ms == (40, 90) and pieces == [(40, 90), None]
    assert pickle.loads(pickle.dumps(done)) == done and "eta_ms=(40, 90)" in repr(done)


@pytest.mark.parametrize("ask", [blocking, awaiting])
def test_a_router_that_does_not_say_is_heard_too(ask: Callable[..., Any], address: str) -> None:
    done, pieces = ask(address)
    assert done.eta_ms is None and pieces == [None, None]
    assert (done.text, done.ids) == ("ab", (7, 8))
