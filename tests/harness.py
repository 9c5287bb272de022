"""Real processes for end-to-end tests: routers and workers on loopback, ended by id, and a small HTTP client."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROUTER = os.environ.get("SCLS_ROUTER_BIN", str(ROOT / "target/debug/scls-router"))
MODEL = ROOT / "models/airline-tiny"
LISTENING = re.compile(r"(http|grpc|admin|scls-worker|mock-worker) listening on ([0-9.]+:\d+)")


class Process:
    """A process whose stdout says where it listens. Both streams are kept for the failure message."""

    def __init__(self, args: list[str], wait_for: set[str], env: dict[str, str] | None = None) -> None:
        self.addresses: dict[str, str] = {}
        self.log: list[str] = []
        self.args = args
        self.child = subprocess.Popen(
            args,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        deadline = time.monotonic() + 60
        while not wait_for <= self.addresses.keys():
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                self.stop()
                raise RuntimeError(f"{args[:3]} said nothing of {wait_for - self.addresses.keys()}:\n" + self.tail())
            if found := LISTENING.search(line):
                self.addresses[found[1]] = found[2]

    def _read(self) -> None:
        assert self.child.stdout
        for line in self.child.stdout:
            self.log.append(line)
            self.lines.put(line)
        self.lines.put(None)

    def tail(self, lines: int = 60) -> str:
        return "".join(self.log[-lines:])

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(10)

    def stop(self) -> int:
        """SIGTERM, then SIGKILL after 15 s; the exit code."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(15)
            except subprocess.TimeoutExpired:
                self.child.kill()
        return self.child.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Worker(Process):
    def __init__(self, *args: str) -> None:
        super().__init__([sys.executable, "-m", "scls_worker", "--port", "0", *args], {"scls-worker"})

    @property
    def url(self) -> str:
        return "grpc://" + self.addresses["scls-worker"]


class RustMock(Process):
    def __init__(self, *args: str) -> None:
        super().__init__([ROUTER, "mock-worker", "--port", "0", *args], {"mock-worker"})

    @property
    def url(self) -> str:
        return "grpc://" + self.addresses["mock-worker"]


class Router(Process):
    """`scls-router serve` in front of workers, or `up`; waits until `ready` workers are ready."""

    def __init__(self, urls: list[str], *args: str, ready: int | None = None, command: str = "serve") -> None:
        ports = ["--port", "0", "--grpc-port", "0", "--admin-port", "0"]
        given = ["--worker-urls", *urls] if command == "serve" else []
        super().__init__([ROUTER, command, *ports, *args, *given], {"http", "grpc", "admin"})
        want = len(urls) if ready is None else ready
        try:
            self.wait_ready(want)
        except BaseException:
            self.stop()
            raise

    def wait_ready(self, want: int, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while want and self.ready_workers() < want:
            if time.monotonic() > deadline or self.child.poll() is not None:
                raise RuntimeError(f"not {want} workers ready:\n" + self.tail())
            time.sleep(0.02)

    def ready_workers(self) -> int:
        return sum(int(v) for k, v in self.metrics().items() if k.startswith("scls_router_worker_ready{"))

    def metrics(self) -> dict[str, float]:
        _, _, body = self.request("GET", "/metrics")
        rows = (line.rsplit(" ", 1) for line in body.decode().splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    def worker_metric(self, name: str) -> list[float]:
        return [v for k, v in self.metrics().items() if k.startswith(f"scls_router_{name}{{")]

    def wait_drained(self, seconds: float = 10) -> None:
        """Until Q, b, W, running and held blocks of every worker are zero."""
        names = [
            "queued_tokens",
            "batch_size",
            "work_microseconds",
            "running_rows",
            "held_rows",
            "running_blocks",
            "held_blocks",
        ]
        deadline = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            left = {k: v for k, v in metrics.items() if any(k.startswith(f"scls_router_worker_{n}{{") for n in names)}
            assert len(left) >= len(names), f"metrics are missing: {sorted(left)}"
            if not any(left.values()):
                return
            assert time.monotonic() < deadline, f"not drained: { {k: v for k, v in left.items() if v} }"
            time.sleep(0.05)

    def admin(self, path: str) -> Any:
        host, port = self.addresses["admin"].split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        try:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        host, port = self.addresses["http"].split(":")
        return http.client.HTTPConnection(host, int(port), timeout=timeout)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connect()
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> dict[str, Any]:
        status, _, answer = self.request("POST", path, body)
        assert status == 200, f"{status}: {answer.decode()[:500]}"
        return json.loads(answer)  # type: ignore[no-any-return]

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of a streamed answer; checks that it ends with [DONE]."""
        connection = self.connect()
        try:
            connection.request(
                "POST", path, json.dumps({**body, "stream": True}).encode(), {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            assert answer.status == 200, f"{answer.status}: {answer.read().decode()[:500]}"
            done = False
            for line in answer:
                text = line.decode().strip()
                if text == "data: [DONE]":
                    done = True
                elif text.startswith("data: "):
                    assert not done, "an event after [DONE]"
                    yield json.loads(text[6:])
            assert done, "the stream ended without [DONE]"
        finally:
            connection.close()
