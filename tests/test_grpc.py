"""The router's gRPC service: generation, the decision alone, the workers; what is not served says so."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from harness import MODEL, Router, Worker
from reference import differs, greedy
from scls_worker.proto import common_pb2 as common
from scls_worker.proto import router_pb2 as pb
from scls_worker.proto import router_pb2_grpc
from session import ids_of


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    workers = [Worker("--model", str(MODEL), "--dtype", "float32", "--served-name", "tiny") for _ in range(2)]
    try:
        with Router([w.url for w in workers], "--slice-len", "8") as router:
            with grpc.insecure_channel(router.addresses["grpc"]) as channel:
                yield channel
    finally:
        for worker in workers:
            worker.stop()


def generate(channel: grpc.Channel, **request: object) -> list[pb.GenerateResponse]:
    stub = router_pb2_grpc.RouterStub(channel)
    limits = request.pop("limits", common.Limits(max_tokens=20))
    return list(stub.Generate(pb.GenerateRequest(model="tiny", limits=limits, **request), timeout=60))  # type: ignore[arg-type]


def test_generate_streams_ids_and_text_and_ends_with_usage(channel: grpc.Channel) -> None:
    prompt = list(range(10, 60))
    answers = generate(channel, prompt=pb.Prompt(ids=ids_of(prompt)), request_id="mine")
    ids: list[int] = []
    for answer in answers:
        assert answer.request_id == "mine"
        if answer.ids:
            assert answer.first_index == len(ids)
        ids += answer.ids
    wrong = differs(ids, greedy(MODEL, prompt, 20))
    assert wrong is None or wrong.startswith("tie"), wrong
    assert "".join(a.text for a in answers)
    last = answers[-1]
    assert last.finish in (common.FINISH_REASON_LENGTH, common.FINISH_REASON_STOP)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (50, len(ids))
    assert last.usage.worker_id and last.usage.slices >= 1
    assert not any(a.finish for a in answers[:-1])


def test_text_and_ids_give_the_same(channel: grpc.Channel) -> None:
    text = [a for a in generate(channel, prompt=pb.Prompt(text="I want to cancel my flight."))]
    assert "".join(a.text for a in text)


def test_route_decides_and_commits_nothing(channel: grpc.Channel) -> None:
    stub = router_pb2_grpc.RouterStub(channel)
    ask = pb.RouteRequest(model="tiny", prompt=pb.Prompt(ids=ids_of(range(100, 200))))
    decisions = [stub.Route(ask, timeout=10) for _ in range(4)]
    for decision in decisions:
        assert decision.policy == "product" and decision.prompt_tokens == 100
        assert len(decision.candidates) == 2
        assert {c.worker_id for c in decision.candidates} >= {decision.worker_id}
        assert all(c.batch_size == 0 and c.score_low == c.new_tokens for c in decision.candidates)
    assert len({d.worker_id for d in decisions}) == 1, "a dry run does not turn the wheel"


def test_list_workers(channel: grpc.Channel) -> None:
    workers = router_pb2_grpc.RouterStub(channel).ListWorkers(pb.ListWorkersRequest(), timeout=10).workers
    assert [w.state for w in workers] == [pb.WorkerStatus.STATE_READY] * 2
    assert all(w.info.served_names == ["tiny"] and w.url.startswith("grpc://") for w in workers)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.GenerateRequest(model="none", prompt=pb.Prompt(text="a")), grpc.StatusCode.NOT_FOUND),
        (pb.GenerateRequest(model="tiny"), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="a"), n=129), grpc.StatusCode.INVALID_ARGUMENT),
        (
            pb.GenerateRequest(model="tiny", prompt=pb.Prompt(ids=common.TokenIds(le_u32=b"abc"))),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            pb.GenerateRequest(
                model="tiny", prompt=pb.Prompt(text="a"), sampling=common.Sampling(temperature=float("nan"))
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="a"), sampling=common.Sampling(top_p=1.5)),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="a"), limits=common.Limits(max_tokens=10**6)),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
def test_bad_requests(channel: grpc.Channel, request_: pb.GenerateRequest, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.RpcError) as error:
        list(router_pb2_grpc.RouterStub(channel).Generate(request_, timeout=10))
    assert error.value.code() == code, error.value.details()


def test_what_is_not_served_yet_says_so(channel: grpc.Channel) -> None:
    stub = router_pb2_grpc.RouterStub(channel)
    with pytest.raises(grpc.RpcError) as error:
        stub.Register(pb.RegisterRequest(url="grpc://x:1"), timeout=10)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED and "Register" in error.value.details()


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    names = [
        s.name for s in next(iter(stub.ServerReflectionInfo(iter([ask]), timeout=5))).list_services_response.service
    ]
    assert "scls.v1.Router" in names
