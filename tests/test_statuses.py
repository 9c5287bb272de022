"""Every status that the HTTP listeners answer with, and every refusal of what is not offered, over real processes.

500 is a bug, which no request can ask for: `http.rs` has its test. 422 is none of ours: `fuzz.rs` never sees it.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from harness import MODEL, Router, RustMock
from scls_router.proto import common_pb2 as common
from scls_router.proto import router_pb2, router_pb2_grpc, worker_pb2_grpc
from scls_router.proto import worker_pb2 as pb

KEY = {"authorization": "Bearer second"}
CHAT = {"messages": [{"role": "user", "content": "a"}]}
MOST_BODY = 100_000


@pytest.fixture(scope="module")
def busy() -> Iterator[Router]:
    """One row at a time, two requests at most, a second to be begun and four to be done."""
    flags = ["--max-concurrent-requests", "2", "--queue-timeout-secs", "1", "--request-timeout-secs", "4"]
    flags += ["--max-payload-size", str(MOST_BODY), "--api-key", "first, second", "--log-level", "info"]
    mock = ["--served-name", "tiny", "--vocab", "2560", "--tokenizer", str(MODEL), "--max-rows", "1"]
    with RustMock(*mock, "--step-us", "2000") as worker, Router([worker.url], *flags) as router:
        yield router


def check(answer: tuple[int, dict[str, str], bytes], status: int, code: str | None, param: str | None = None) -> None:
    got, headers, body = answer
    assert got == status, body[:300]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert (error["code"], error["param"]) == (code, param), error
    assert headers["content-type"] == "application/json" and headers["x-request-id"]
    assert not any(name.startswith("access-control-") for name in headers)


# method, path, body (a dict goes with the model), headers, status, code, param, a header of the answer
PLAIN: list[tuple[str, str, Any, dict[str, str], int, str | None, str | None, tuple[str, str] | None]] = [
    ("POST", "/v1/completions", b"{", KEY, 400, None, None, None),
    ("POST", "/v1/completions", {"prompt": 5}, KEY, 400, None, "prompt", None),
    ("POST", "/v1/completions", {"prompt": [5] * 9000}, KEY, 400, "context_length_exceeded", "prompt", None),
    ("POST", "/tokenize", {"prompt": [5]}, KEY, 400, None, "prompt", None),
    ("POST", "/detokenize", {"tokens": [99_999]}, KEY, 400, None, "tokens", None),
    ("POST", "/v1/completions", {"prompt": "a"}, {}, 401, "invalid_api_key", None, ("www-authenticate", "Bearer")),
    ("GET", "/v1/models", None, {}, 401, "invalid_api_key", None, ("www-authenticate", "Bearer")),
    ("GET", "/v1/models", None, {"authorization": "Bearer wrong"}, 401, "invalid_api_key", None, None),
    ("POST", "/tokenize", b"{", {"authorization": "second"}, 401, "invalid_api_key", None, None),
    ("POST", "/v1/completions", {"model": "gpt", "prompt": "a"}, KEY, 404, "model_not_found", "model", None),
    ("GET", "/v1/models/gpt", None, KEY, 404, "model_not_found", "model", None),
    ("GET", "/v1/nothing", None, KEY, 404, "not_found", None, None),
    ("GET", "/workers", None, KEY, 404, "not_found", None, None),
    ("GET", "/v1/completions", None, KEY, 405, "method_not_allowed", None, ("allow", "POST")),
    ("DELETE", "/v1/models", None, KEY, 405, "method_not_allowed", None, ("allow", "GET,HEAD")),
    ("PUT", "/health", b"{}", {}, 405, "method_not_allowed", None, ("allow", "GET,HEAD")),
    ("POST", "/v1/completions", b" " * (MOST_BODY + 1), KEY, 413, "body_too_large", None, None),
    ("POST", "/v1/completions", {}, {**KEY, "content-type": "text/plain"}, 415, "unsupported_content_type", None, None),
    ("POST", "/tokenize", {}, {**KEY, "content-encoding": "br"}, 415, "unsupported_content_encoding", None, None),
    *(
        (method, path, body, {}, 501, "not_offered", None, ("x-should-retry", "false"))
        for method, path, body in [
            ("POST", "/v1/embeddings", {"input": "a"}),
            ("POST", "/v1/responses", {"input": "a"}),
            ("GET", "/v1/responses/5", None),
            ("POST", "/v1/messages", {"max_tokens": 5}),
            ("POST", "/v1/messages/count_tokens", {}),
            ("POST", "/v1/rerank", {"query": "a"}),
            ("POST", "/v1/audio/speech", {"input": "a"}),
            ("POST", "/v1/images/generations", {"prompt": "a"}),
            ("POST", "/v1/moderations", {"input": "a"}),
        ]
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code", "param", "header"),
    PLAIN,
    ids=[f"{row[4]} {row[0]} {row[1]} {i}" for i, row in enumerate(PLAIN)],
)
def test_statuses(
    busy: Router,
    method: str,
    path: str,
    body: Any,
    headers: dict[str, str],
    status: int,
    code: str | None,
    param: str | None,
    header: tuple[str, str] | None,
) -> None:
    body = {"model": "tiny", **body} if isinstance(body, dict) else body
    answer = busy.request(method, path, body if body is not None else b"", headers)
    check(answer, status, code, param)
    if header:
        assert answer[1][header[0]] == header[1]


IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
SPOKEN = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
# What design says is not offered: guided decoding, adapters, images, a prefill/decode split, what other APIs have.
NOT_OFFERED: list[tuple[str, Any]] = [
    ("guided_json", {"type": "object"}),
    ("guided_regex", "a+"),
    ("guided_choice", ["a", "b"]),
    ("guided_grammar", "root ::= 'a'"),
    ("guided_decoding_backend", "xgrammar"),
    ("structured_outputs", {"regex": "a+"}),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("functions", [{"name": "f"}]),
    ("function_call", "auto"),
    ("lora", "a"),
    ("lora_request", {"lora_name": "a"}),
    ("adapter", "a"),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("prompt_embeds", "AAAA"),
    ("mm_processor_kwargs", {"num_crops": 4}),
    ("kv_transfer_params", {"do_remote_decode": True}),
    ("bootstrap_host", "10.0.0.1"),
    ("web_search_options", {}),
    ("prediction", {"type": "content", "content": "a"}),
    ("reasoning_effort", "low"),
    ("input", "a"),
    ("instructions", "a"),
    ("previous_response_id", "resp_5"),
    ("system", "a"),
    ("thinking", {"type": "enabled", "budget_tokens": 1024}),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]),
    ("messages", [{"role": "user", "content": [SPOKEN]}]),
    ("messages", [{"role": "user", "content": [{"type": "file", "file": {"file_id": "a"}}]}]),
    ("tools", [{"type": "web_search"}]),
]


@pytest.mark.parametrize(("field", "value"), NOT_OFFERED, ids=[f"{f} {i}" for i, (f, _) in enumerate(NOT_OFFERED)])
def test_what_is_not_offered_is_refused_by_name(busy: Router, field: str, value: Any) -> None:
    answer = busy.request("POST", "/v1/chat/completions", {"model": "tiny", **CHAT, field: value}, KEY)
    check(answer, 400, "unsupported_parameter", field)
    if field not in ("messages", "tools", "tool_choice"):
        answer = busy.request("POST", "/v1/completions", {"model": "tiny", "prompt": "a", field: value}, KEY)
        check(answer, 400, "unsupported_parameter", field)


def ask(router: Router, max_tokens: int, **more: Any) -> tuple[int, dict[str, str], bytes]:
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": max_tokens, "ignore_eos": True, **more}
    return router.request("POST", "/v1/completions", body, KEY)


def until(router: Router, metric: str, value: float) -> None:
    deadline = time.monotonic() + 10
    while router.metrics().get(metric, 0) != value:
        assert time.monotonic() < deadline, f"{metric} is not {value}: {router.metrics().get(metric)}"
        time.sleep(0.02)


def test_200_names_the_worker_and_what_was_cached(busy: Router) -> None:
    for cached in ("0", "32"):
        status, headers, body = ask(busy, 2, prompt=list(range(100, 140)))
        assert status == 200, body
        assert headers["x-scls-worker"] and headers["x-scls-cached-tokens"] == cached
        lo, hi = map(int, headers["x-scls-eta-ms"].split("-"))
        # Two iterations of 2 ms.
        assert 0 <= lo <= hi and 2 <= hi < 1000


def test_408_429_504_of_one_that_runs_one_that_waits_and_one_too_many(busy: Router) -> None:
    with futures.ThreadPoolExecutor(2) as pool:
        runs = pool.submit(ask, busy, 6000)
        until(busy, "scls_router_inflight_requests", 1)
        time.sleep(0.1)
        waits = pool.submit(ask, busy, 5)
        until(busy, "scls_router_inflight_requests", 2)
        time.sleep(0.1)
        began = time.monotonic()
        answer = ask(busy, 5)
        assert time.monotonic() - began < 0.5
        check(answer, 429, "overloaded")
        assert 1 <= int(answer[1]["retry-after"]) <= 60
        check(waits.result(), 408, "queue_timeout")
        check(runs.result(), 504, "timeout")
    assert ask(busy, 2)[0] == 200


def test_499_is_counted_and_logged_and_not_sent(busy: Router) -> None:
    counted = 'scls_router_requests_total{model="tiny",code="499"}'
    before = busy.metrics().get(counted, 0)
    host, port = busy.addresses["http"].split(":")
    body = json.dumps({"model": "tiny", "prompt": [5], "max_tokens": 6000}).encode()
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: {KEY['authorization']}\r\n"
        raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        until(busy, "scls_router_inflight_requests", 1)
    until(busy, counted, before + 1)
    assert any("the client went away" in line for line in busy.log)


@pytest.mark.parametrize("name", ["host", "origin"])
def test_403_for_a_page_that_asks_the_admin_listener(busy: Router, name: str) -> None:
    host, port = busy.addresses["admin"].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    for value, status in [("http://localhost:8080", 200), ("http://evil.example", 403)]:
        connection.request(
            "GET", "/workers", headers={name: value.removeprefix("http://") if name == "host" else value}
        )
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == status, body
    check((answer.status, {k.lower(): v for k, v in answer.getheaders()}, body), 403, "forbidden")
    connection.close()


def test_401_over_grpc(busy: Router) -> None:
    with grpc.insecure_channel(busy.addresses["grpc"]) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        request = router_pb2.ListWorkersRequest()
        for metadata in [None, [("authorization", "Bearer wrong")]]:
            with pytest.raises(grpc.RpcError) as error:
                stub.ListWorkers(request, metadata=metadata, timeout=10)
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert len(stub.ListWorkers(request, metadata=[("authorization", "Bearer first")], timeout=10).workers) == 1


def test_503_without_a_worker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        with Router([url], ready=0) as router:
            answer = router.request("POST", "/v1/completions", {"model": "tiny", "prompt": [5]})
            check(answer, 503, "no_ready_worker")
            assert int(answer[1]["retry-after"]) >= 1
            for path in ("/ready", "/readyz", "/readiness"):
                assert router.request("GET", path)[0] == 503
            for path in ("/health", "/healthz", "/live", "/liveness"):
                assert router.request("GET", path)[0] == 200


class Breaks(worker_pb2_grpc.WorkerServicer):
    """A worker that ends every row before its first token."""

    def GetInfo(self, request: Any, context: Any) -> common.WorkerInfo:
        return common.WorkerInfo(
            worker_id="breaks",
            worker_epoch=7,
            model_digest="m",
            served_names=["tiny"],
            vocab_size=100,
            max_context=1000,
            block_size=16,
            blocks=100,
            max_rows=8,
        )

    def GetTokenizer(self, request: Any, context: Any) -> Iterator[pb.FileChunk]:
        return iter(())

    def Session(self, messages: Iterator[pb.RouterMessage], context: Any) -> Iterator[pb.WorkerMessage]:
        said = 0
        for message in messages:
            body: dict[str, Any] = {}
            if message.HasField("hello"):
                body = {"snapshot": pb.Snapshot(last=True)}
            elif message.HasField("ping"):
                body = {"pong": pb.Pong(nonce=message.ping.nonce)}
            elif message.HasField("plan") and message.plan.add:
                rows = [pb.RowTokens(row=r.row, finish=common.FINISH_REASON_ERROR) for r in message.plan.add]
                body = {"step": pb.Step(batch=message.plan.plan_no, step=1, rows=rows)}
            if body:
                said += 1
                yield pb.WorkerMessage(worker_epoch=7, state_seq=said, **body)


@pytest.mark.parametrize("stream", [False, True])
def test_502_of_a_worker_that_breaks_before_the_first_token(stream: bool) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    worker_pb2_grpc.add_WorkerServicer_to_server(Breaks(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Router([f"grpc://127.0.0.1:{port}"]) as router:
            body = {"model": "tiny", "prompt": [5, 6], "stream": stream}
            check(router.request("POST", "/v1/completions", body), 502, "worker_failed")
    finally:
        server.stop(0).wait(5)
