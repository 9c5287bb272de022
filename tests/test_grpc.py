"""The router's gRPC service: generation, the decision alone, the workers; what is not served says so."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from handmade import HandmadeWorker
from harness import MODEL, Router, RustMock, Worker
from reference import differs, greedy
from scls_router.proto import common_pb2 as common
from scls_router.proto import router_pb2 as pb
from scls_router.proto import router_pb2_grpc, worker_pb2_grpc
from scls_router.proto import worker_pb2 as wpb
from session import ids_of


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    workers = [Worker("--model", str(MODEL), "--dtype", "float32", "--served-name", "tiny") for _ in range(2)]
    try:
        with Router([w.url for w in workers], "--scheduler", "ils") as router:
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
        assert decision.policy == "product_anticipating" and decision.prompt_tokens == 100
        assert len(decision.candidates) == 2
        assert {c.worker_id for c in decision.candidates} >= {decision.worker_id}
        assert all(c.batch_size == 0 and c.score_low >= c.new_tokens << 32 for c in decision.candidates)
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
        (pb.GenerateRequest(prompt=pb.Prompt(text="a")), grpc.StatusCode.INVALID_ARGUMENT),
        # Every message of the answer would carry it.
        (
            pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="a"), request_id="x" * 129),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
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


def test_what_changes_workers_is_closed_and_says_why(channel: grpc.Channel) -> None:
    stub = router_pb2_grpc.RouterStub(channel)
    for method, request in [
        ("AddWorker", pb.AddWorkerRequest(url="grpc://x:1")),
        ("DrainWorker", pb.DrainWorkerRequest(worker_id="w")),
        ("RemoveWorker", pb.RemoveWorkerRequest(worker_id="w")),
        ("Register", pb.RegisterRequest(url="grpc://x:1")),
    ]:
        with pytest.raises(grpc.RpcError) as error:
            getattr(stub, method)(request, timeout=10)
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert method in error.value.details() and "--worker-urls" in error.value.details()
    with pytest.raises(grpc.RpcError) as error:
        list(stub.WatchDecisions(pb.WatchDecisionsRequest(), timeout=10))
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED and "Explain" in error.value.details()


def test_explain_gives_a_decision_that_was_made(channel: grpc.Channel) -> None:
    stub = router_pb2_grpc.RouterStub(channel)
    worker = generate(channel, prompt=pb.Prompt(ids=ids_of(range(300, 340))))[-1].usage.worker_id
    decisions = []
    for number in range(1, 100):
        try:
            decisions.append(stub.Explain(pb.ExplainRequest(decision_id=number), timeout=10))
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND, error
            break
    last = decisions[-1]
    assert (last.decision_id, last.worker_id, last.prompt_tokens) == (len(decisions), worker, 40)
    scores = {c.worker_id: (c.score_high, c.score_low) for c in last.candidates}
    assert scores[worker] == min(scores.values())


def test_a_message_over_the_limit_is_refused_and_one_below_is_read(channel: grpc.Channel) -> None:
    for size, code, what in [
        ((16 << 20) + 1, grpc.StatusCode.OUT_OF_RANGE, "16777216"),
        (15 << 20, grpc.StatusCode.INVALID_ARGUMENT, "too long for the context"),
    ]:
        with pytest.raises(grpc.RpcError) as error:
            generate(channel, prompt=pb.Prompt(ids=common.TokenIds(le_u32=bytes(size // 4 * 4 + 4))))
        assert error.value.code() == code and what in error.value.details(), error.value.details()


def test_errors_name_field_and_reason_for_programs(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as error:
        generate(channel, prompt=pb.Prompt(text="a"), limits=common.Limits(max_tokens=10**6))
    metadata = dict(error.value.trailing_metadata())
    assert (metadata["scls-code"], metadata["scls-field"]) == ("context_length_exceeded", "max_tokens")


def big_tokenizer(folder: Path) -> int:
    """The model's tokenizer with a vocabulary of over 12 MB; gives its size."""
    config = json.loads((MODEL / "tokenizer.json").read_text())
    vocab = config["model"]["vocab"]
    start = 1 + max([*vocab.values(), *(t["id"] for t in config["added_tokens"])])
    # Long words, as those of many languages are. No merge makes them, so texts keep their ids.
    vocab.update({f"⟨{i:06}⟩" + "þ" * 60: start + i for i in range(95_000)})
    (folder / "tokenizer.json").write_text(json.dumps(config))
    return start + 95_000


def test_a_tokenizer_of_12_mb(tmp_path: Path) -> None:
    vocab = big_tokenizer(tmp_path)
    size = (tmp_path / "tokenizer.json").stat().st_size
    assert size > 12 << 20, size
    flags = ["--vocab", str(vocab), "--tokenizer", str(tmp_path), "--served-name", "tiny"]
    with RustMock(*flags) as rust, Worker("--mock", *flags) as python:
        for worker in (rust, python):
            with grpc.insecure_channel(worker.url.removeprefix("grpc://")) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                chunks = list(stub.GetTokenizer(wpb.GetTokenizerRequest(), timeout=30))
            assert max(len(c.data) for c in chunks) <= 1 << 20
            assert b"".join(c.data for c in chunks) == (tmp_path / "tokenizer.json").read_bytes()
            with Router([worker.url]) as router, grpc.insecure_channel(router.addresses["grpc"]) as channel:
                last = generate(channel, prompt=pb.Prompt(text="I want to cancel my flight."))[-1]
                assert 3 < last.usage.prompt_tokens < 30


def test_a_snapshot_of_two_million_blocks() -> None:
    count = 2_000_000
    hashes = np.random.default_rng(0).integers(1, 2**64, count, np.uint64).tobytes()
    with RustMock("--served-name", "tiny", "--vocab", "2560", "--worker-id", "small") as mock:
        with grpc.insecure_channel(mock.url.removeprefix("grpc://")) as channel:
            info = worker_pb2_grpc.WorkerStub(channel).GetInfo(wpb.GetInfoRequest(), timeout=10)
        info.worker_id, info.blocks = "big", count + 1000
        with HandmadeWorker(info, hashes) as big, Router([mock.url, big.url], ready=1) as router:
            with grpc.insecure_channel(router.addresses["grpc"]) as channel:
                stub = router_pb2_grpc.RouterStub(channel)
                began, slowest, indexed = time.monotonic(), 0.0, 0
                while indexed < count:
                    asked = time.monotonic()
                    assert asked - began < 30, f"{indexed} blocks"
                    workers = stub.ListWorkers(pb.ListWorkersRequest(), timeout=10).workers
                    indexed = next(w.indexed_blocks for w in workers if w.url == big.url)
                    slowest = max(slowest, time.monotonic() - asked)
                # A question waits for one chunk of the sixteen, not for all of them.
                took = time.monotonic() - began
                assert slowest < took / 2, f"an answer took {slowest:.2f} of {took:.2f} s"
                router.wait_ready(2)
                decision = stub.Route(
                    pb.RouteRequest(model="tiny", prompt=pb.Prompt(ids=ids_of(range(64)))), timeout=10
                )
                assert {c.worker_id for c in decision.candidates} == {"big", "small"}


def test_a_worker_s_message_over_the_limit_ends_its_session() -> None:
    info = common.WorkerInfo(
        worker_id="w", worker_epoch=5, model_digest="m", served_names=["tiny"], vocab_size=100, max_context=1000,
        block_size=16, blocks=10**7, max_rows=4,
    )  # fmt: skip
    size = (16 << 20) + 8
    with HandmadeWorker(info, bytes(size), chunk=size) as worker, Router([worker.url], ready=0) as router:
        with grpc.insecure_channel(router.addresses["grpc"]) as channel:
            stub = router_pb2_grpc.RouterStub(channel)
            deadline, detail = time.monotonic() + 20, ""
            while "too large" not in detail:
                assert time.monotonic() < deadline, detail
                (status,) = stub.ListWorkers(pb.ListWorkersRequest(), timeout=10).workers
                detail = status.detail
            assert status.state != pb.WorkerStatus.STATE_READY and "16777216" in detail


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + 5  # it follows /ready ten times a second
    while health.Check(health_pb2.HealthCheckRequest(), timeout=5).status != health_pb2.HealthCheckResponse.SERVING:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    names = [
        s.name for s in next(iter(stub.ServerReflectionInfo(iter([ask]), timeout=5))).list_services_response.service
    ]
    assert "scls.v1.Router" in names
    assert "scls.v1.Worker" not in names, "a router is no worker, though they share a contract"
