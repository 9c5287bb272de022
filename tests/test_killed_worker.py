"""A worker with a model is killed in the midst of its bursts: every answer is what it would have been."""

from __future__ import annotations

import http.client
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from harness import ROOT, Process, Router

COUNT, TOKENS = 16, 300
WORKER = [sys.executable, "-m", "scls_worker", "--port", "0", "--served-name", "m", "--threads", "1"]
MODEL = ["--model", str(ROOT / "models/airline-tiny"), "--exit-with-parent"]


def test_a_worker_killed_in_the_midst_of_bursts_changes_no_token() -> None:
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Process([*WORKER, *MODEL], {"scls-worker"}, {"OMP_NUM_THREADS": "1"})) for _ in range(2)
        ]
        at = ["grpc://" + worker.addresses["scls-worker"] for worker in workers]
        router = stack.enter_context(Router(at, "--log-level", "error"))

        def ask(number: int) -> str:
            connection = http.client.HTTPConnection(router.addresses["http"], timeout=60)
            heat = {"temperature": number % 2, "seed": number, "ignore_eos": True}
            body = json.dumps({"model": "m", "prompt": [5 + number] * (20 + number), "max_tokens": TOKENS, **heat})
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            response = connection.getresponse()
            told = json.loads(response.read())
            assert response.status == 200 and told["usage"]["completion_tokens"] == TOKENS, told
            text: str = told["choices"][0]["text"]
            return text

        with ThreadPoolExecutor(COUNT) as threads:
            undisturbed = list(threads.map(ask, range(COUNT)))
            asked = [threads.submit(ask, number) for number in range(COUNT)]
            time.sleep(0.1)
            assert not any(one.done() for one in asked)
            workers[0].kill()
            assert [one.result() for one in asked] == undisturbed
