"""The router over real sockets: streams, overload, faults, bad input. Mock workers where no model is needed."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import MODEL, ROOT, ROUTER, Process, Router, RustMock, Worker

VOCAB = 2000


def splitmix64(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def mock_answer(prompt: list[int], n: int) -> list[int]:
    """What a mock worker draws: a function of the token before and its place."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(3 + splitmix64(((ids[-1] << 32) | (len(ids) - 1)) & (2**64 - 1)) % (VOCAB - 3))
    return ids[len(prompt) :]


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def mock(*args: str) -> RustMock:
    return RustMock("--vocab", str(VOCAB), "--step-us", "1000", *args)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Router, list[RustMock]]]:
    workers = [mock() for _ in range(2)]
    try:
        with Router([w.url for w in workers]) as router:
            yield router, workers
    finally:
        for worker in workers:
            worker.stop()


def completion(router: Router, ids: list[int], n: int, **more: Any) -> dict[str, Any]:
    body = {"model": "mock", "prompt": ids, "max_tokens": n, "temperature": 0, "return_token_ids": True, **more}
    return router.post("/v1/completions", body)


def test_two_hundred_concurrent_streams_of_mixed_lengths(pair: tuple[Router, list[RustMock]]) -> None:
    router, _ = pair
    asked = [(prompt(i, 1 + i * 37 % 700), 1 + i * 13 % 120) for i in range(200)]

    def ask(item: tuple[list[int], int]) -> tuple[list[int], list[str], dict]:
        ids, n = item
        got: list[int] = []
        finishes: list[str] = []
        usage: dict = {}
        body = {
            "model": "mock",
            "prompt": ids,
            "max_tokens": n,
            "temperature": 0,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        for event in router.stream("/v1/completions", body):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                got += choice.get("token_ids") or []
                finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
        return got, finishes, usage

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, asked))
    for (ids, n), (got, finishes, usage) in zip(asked, answers, strict=True):
        assert got == mock_answer(ids, n), "each index once, in order"
        assert finishes == ["length"]
        assert usage["prompt_tokens"] == len(ids) and usage["completion_tokens"] == n
    router.wait_drained()


def anticipated(decision: dict[str, Any], new_tokens: int) -> int:
    """1 + arrivals a second x seconds of prefill a token x new tokens, in units of 2^-32."""
    arrivals, prefill = round(decision["arrivals_per_s"] * 2**20), round(decision["prefill_s_per_token"] * 2**40)
    return (1 << 32) + (arrivals * prefill * new_tokens >> 20 + 40 - 32)


def test_every_decision_recomputes(pair: tuple[Router, list[RustMock]]) -> None:
    router, _ = pair
    for i in range(20):
        completion(router, prompt(i % 5, 100 + 20 * i), 3)
    decisions = router.admin("/decisions")["decisions"]
    assert len(decisions) >= 20
    for decision in decisions:
        assert decision["recomputed"] == decision["worker"]
        # and by hand, from the record alone
        scores = [
            (c["queued_tokens"] + c["new_tokens"]) * (c["batch_size"] + 1) * anticipated(decision, c["new_tokens"])
            for c in decision["candidates"]
        ]
        assert [int(c["score"]) for c in decision["candidates"]] == scores
        chosen = next(c for c in decision["candidates"] if c["worker"] == decision["worker"])
        assert int(chosen["score"]) == min(scores)


def test_a_second_turn_hits_what_the_first_left(pair: tuple[Router, list[RustMock]]) -> None:
    router, _ = pair
    first = prompt(77, 160)
    answer = completion(router, first, 32)["choices"][0]["token_ids"]
    second = completion(router, first + answer + prompt(78, 20), 4)
    # all whole blocks of prompt and answer: the last token drawn was never computed
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == (160 + 31) // 16 * 16


def test_sixteen_interleaved_conversations_hit_nearly_what_one_endless_cache_would() -> None:
    """Closed loop under one system prompt, on two workers that are never both idle: the answers go into the history."""
    workers = [mock("--step-us", "2000") for _ in range(2)]
    system = prompt(1, 700)
    served: list[tuple[float, list[int], list[int], dict]] = []

    def converse(router: Router, conversation: int) -> None:
        history = list(system)
        for turn in range(6):
            history += prompt(1000 * (conversation + 1) + turn, 40)
            sent = time.monotonic()
            body = completion(router, history, 30)
            answer = body["choices"][0]["token_ids"]
            served.append((sent, list(history), answer, body))
            history += answer

    try:
        with Router([w.url for w in workers]) as router:
            with ThreadPoolExecutor(16) as pool:
                for run in [pool.submit(converse, router, i) for i in range(16)]:
                    run.result()
            router.wait_drained()
            used = {body["scls"]["worker"] for *_, body in served}
            busy = router.worker_metric("worker_busy_seconds_total")
    finally:
        for worker in workers:
            worker.stop()
    known: set[tuple[int, ...]] = set()
    ideal = cached = 0
    for _, ids, answer, body in sorted(served, key=lambda s: s[0]):
        most = (len(ids) - 1) // 16
        ideal += 16 * next((i for i in range(most) if tuple(ids[: 16 * (i + 1)]) not in known), most)
        known |= {tuple((ids + answer)[: 16 * (i + 1)]) for i in range((len(ids) + len(answer)) // 16)}
        cached += body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert len(used) == 2 and min(busy) > 0.2 * max(busy), "both served"
    assert cached >= 0.9 * ideal, f"{cached} of {ideal}: {cached / ideal:.3f}"


def test_a_client_that_goes_away_frees_its_row_at_the_next_step(pair: tuple[Router, list[RustMock]]) -> None:
    router, _ = pair
    host, port = router.addresses["http"].split(":")
    body = json.dumps({"model": "mock", "prompt": [5, 6, 7], "max_tokens": 7000, "stream": True}).encode()
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        assert raw.recv(100)
        assert sum(router.worker_metric("worker_batch_size")) == 1
    gone = time.monotonic()
    router.wait_drained(5)
    assert time.monotonic() - gone < 2, "7000 tokens would take 7 s"


def test_with_the_memory_full_everything_still_finishes() -> None:
    # 80 blocks: three of these requests at once at most
    with mock("--blocks", "80", "--max-rows", "8") as worker, Router([worker.url]) as router:
        asked = [(prompt(i, 200 + i), 60) for i in range(24)]
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda item: completion(router, *item), asked))
        for (ids, n), answer in zip(asked, answers, strict=True):
            assert answer["choices"][0]["token_ids"] == mock_answer(ids, n)
        router.wait_drained()
        status, _, body = router.request(
            "POST", "/v1/completions", {"model": "mock", "prompt": prompt(1, 1200), "max_tokens": 100}
        )
        assert status == 400 and json.loads(body)["error"]["code"] == "context_length_exceeded"
        assert completion(router, [5], 3)["choices"][0]["token_ids"] == mock_answer([5], 3)


def test_a_slow_link_leaves_no_idle_time_between_slices() -> None:
    """10 ms each way, slices of some tens of steps of 2 ms: without a standing plan the worker would idle a quarter of the
    time."""
    with mock("--link-delay-ms", "10", "--max-rows", "16", "--step-us", "2000") as worker:
        with Router([worker.url]) as router:
            asked = [(prompt(i, 50 + i), 30 + i * 17 % 150) for i in range(96)]
            with ThreadPoolExecutor(96) as pool:
                runs = [pool.submit(completion, router, ids, n) for ids, n in asked]
                for run in runs:
                    run.result()
            metrics = router.metrics()
            idle = sum(v for k, v in metrics.items() if k.startswith("scls_router_worker_idle_seconds_total"))
            busy = sum(v for k, v in metrics.items() if k.startswith("scls_router_worker_busy_seconds_total"))
            assert busy > 0.5
            assert idle < 0.01 * busy, f"idle {idle:.4f} s of busy {busy:.3f} s"


def test_a_killed_workers_requests_go_on_elsewhere() -> None:
    workers = [mock("--step-us", "4000") for _ in range(2)]
    try:
        with Router([w.url for w in workers]) as router:
            asked = [(prompt(i, 60), 200) for i in range(20)]
            with ThreadPoolExecutor(20) as pool:
                runs = [pool.submit(completion, router, ids, n) for ids, n in asked]
                time.sleep(0.4)
                assert min(router.worker_metric("worker_batch_size")) > 0, "both have work"
                workers[0].kill()
                answers = [run.result() for run in runs]
            for (ids, n), answer in zip(asked, answers, strict=True):
                assert answer["choices"][0]["token_ids"] == mock_answer(ids, n), "moved token for token"
            router.wait_drained()
    finally:
        for worker in workers:
            worker.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_the_last_worker_killed_ends_its_requests_within_two_seconds(stream: bool) -> None:
    worker = mock("--step-us", "4000")
    with worker, Router([worker.url]) as router:
        outcome: list[tuple[float, Any]] = []

        def ask() -> None:
            body = {"model": "mock", "prompt": [5, 6], "max_tokens": 4000, "stream": stream}
            status, _, answer = router.request("POST", "/v1/completions", body)
            outcome.append((time.monotonic(), (status, answer.decode())))

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.5)
        worker.kill()
        killed = time.monotonic()
        thread.join(10)
        at, (status, text) = outcome[0]
        assert at - killed < 2
        if stream:
            assert status == 200 and '"error"' in text and "[DONE]" not in text
        else:
            assert status in (502, 503) and json.loads(text)["error"]["type"]
        status, headers, text = router.request("POST", "/v1/completions", {"model": "mock", "prompt": [5]})
        assert status == 503 and int(headers["retry-after"]) >= 1
        assert router.request("GET", "/ready")[0] == 503
        assert router.request("GET", "/health")[0] == 200
        # it comes back on the same port and is used again
        again = RustMock("--vocab", str(VOCAB), "--port", worker.url.rsplit(":", 1)[1])
        with again:
            router.wait_ready(1)
            assert completion(router, [5], 3)["choices"][0]["token_ids"] == mock_answer([5], 3)


def alive(pid: int) -> bool:
    """A process that runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_the_routers_end_ends_its_workers(how: str) -> None:
    router = Router([], "--model", str(MODEL), "--workers", "2", "--python", sys.executable, command="up", ready=2)
    pid = router.child.pid
    tasks = Path(f"/proc/{pid}/task")
    children = [int(c) for task in tasks.iterdir() for c in (task / "children").read_text().split()]
    assert len(children) == 2 and all(map(alive, children))
    if how == "kill":
        router.kill()
    else:
        assert router.stop() == 0
    deadline = time.monotonic() + 10
    while any(map(alive, children)):
        assert time.monotonic() < deadline, "workers outlived their router"
        time.sleep(0.05)


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def real() -> Iterator[Router]:
    with Worker("--model", str(MODEL), "--served-name", "tiny") as worker, Router([worker.url]) as router:
        yield router


BIG = 2**31
BAD: list[tuple[str, str, Any, int, str | None]] = [
    # name, path, body, status, param
    ("broken JSON", "completions", b'{"model": ', 400, None),
    ("not an object", "completions", [1], 400, None),
    ("invalid UTF-8", "completions", b'{"model": "tiny", "prompt": "\xff\xfe"}', 400, None),
    ("NaN", "completions", b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, None),
    ("infinite temperature", "completions", b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400, None),
    ("wrong type", "completions", {"prompt": "a", "max_tokens": "ten"}, 400, "max_tokens"),
    ("negative temperature", "completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("unknown model", "completions", {"model": "gpt-7", "prompt": "a"}, 404, "model"),
    ("no model", "chat", {"model": None, "messages": [{"role": "user", "content": "a"}]}, 400, "model"),
    ("empty prompt", "completions", {"prompt": ""}, 400, "prompt"),
    ("empty ids", "completions", {"prompt": []}, 400, "prompt"),
    ("no prompt", "completions", {}, 400, "prompt"),
    ("max_tokens 0", "completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("max_tokens -1", "completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    ("max_tokens 2^31", "completions", {"prompt": "a", "max_tokens": BIG}, 400, "max_tokens"),
    ("prompt over the context", "completions", {"prompt": [5] * 9000, "max_tokens": 1}, 400, None),
    ("ids out of range", "completions", {"prompt": [5, 10**6]}, 400, "prompt"),
    ("negative ids", "completions", {"prompt": [-5]}, 400, "prompt"),
    ("one empty prompt", "completions", {"prompt": ["a", ""]}, 400, "prompt"),
    ("n", "completions", {"prompt": "a", "n": 129}, 400, "n"),
    ("top_p", "completions", {"prompt": "a", "top_p": 1.5}, 400, "top_p"),
    ("logprobs", "chat", {"messages": [{"role": "user", "content": "a"}], "logprobs": 2}, 400, "logprobs"),
    (
        "response_format",
        "chat",
        {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
        400,
        "response_format",
    ),
    ("no messages", "chat", {"messages": []}, 400, "messages"),
    ("no role", "chat", {"messages": [{"content": "a"}]}, 400, "messages"),
    (
        "an image",
        "chat",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}
            ]
        },
        400,
        "messages",
    ),
    ("made-up field", "completions", {"prompt": "a", "best_guess": 1}, 400, "best_guess"),
    ("huge body", "completions", {"prompt": "a" * (9 << 20)}, 413, None),
]


@pytest.mark.parametrize(("name", "path", "body", "status", "param"), BAD, ids=[b[0] for b in BAD])
def test_bad_input(real: Router, name: str, path: str, body: Any, status: int, param: str | None) -> None:
    url = "/v1/chat/completions" if path == "chat" else "/v1/completions"
    if isinstance(body, dict):
        body = {"model": "tiny", **body}
        body = {k: v for k, v in body.items() if k != "model" or v is not None}
    got, headers, answer = real.request("POST", url, body)
    assert got == status, answer[:300]
    error = json.loads(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert headers["content-type"].startswith("application/json")
    if param:
        assert error["param"] == param, error
    ok = real.post("/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 2})
    assert ok["usage"]["completion_tokens"] >= 1, "the next request works"


def test_unknown_paths_and_methods_are_openai_shaped(real: Router) -> None:
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)]:
        got, _, answer = real.request(method, path)
        assert got == status and json.loads(answer)["error"]["message"]


def test_a_worker_that_does_not_fit_the_pool_is_refused_with_the_difference() -> None:
    good = mock()
    others = [mock("--block-size", "32"), mock("--tokenizer", str(MODEL))]
    try:
        with Router([good.url, *(o.url for o in others)], ready=1) as router:
            deadline = time.monotonic() + 10
            while True:
                workers = router.admin("/workers")["workers"]
                refused = sorted(w["detail"] for w in workers if w["state"] == "refused")
                if len(refused) == 2:
                    break
                assert time.monotonic() < deadline, workers
                time.sleep(0.05)
            assert any("block size" in d for d in refused) and any("tokenizer" in d for d in refused), refused
            assert completion(router, [5], 2)["choices"][0]["token_ids"] == mock_answer([5], 2)
    finally:
        for worker in [good, *others]:
            worker.stop()


def test_a_worker_that_does_not_answer_harms_nobody() -> None:
    """It accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent, mock() as good:
        url = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        with Router([url, good.url], ready=1) as router:
            assert completion(router, [5], 2)["choices"][0]["token_ids"] == mock_answer([5], 2)
            workers = router.admin("/workers")["workers"]
            assert sorted(w["state"] for w in workers) == ["connecting", "ready"]


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json", "folder"])
def test_a_model_folder_that_lacks_something_ends_with_one_line(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "model"
    if missing != "folder":
        folder.mkdir()
        for file in MODEL.iterdir():
            if file.name != missing:
                (folder / file.name).write_bytes(file.read_bytes())
    command = [
        ROUTER,
        "up",
        "--model",
        str(folder),
        "--workers",
        "1",
        "--python",
        sys.executable,
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--admin-port",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert missing in done.stderr or str(folder) in done.stderr


def test_every_line_on_stdout_is_an_address() -> None:
    with mock() as worker:
        process = Process(
            [
                ROUTER,
                "serve",
                "--port",
                "0",
                "--grpc-port",
                "0",
                "--admin-port",
                "0",
                "--worker-urls",
                worker.url,
                "--log-level",
                "off",
            ],
            {"http", "grpc", "admin"},
        )
        with process:
            pass
        assert sorted(line.split()[1] for line in process.log) == ["admin", "grpc", "http"]
