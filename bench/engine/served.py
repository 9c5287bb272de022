"""Ours as it is run: a worker process behind a router process on loopback, asked over HTTP.

The client shares the machine's cores with both, so it asks for whole answers and not for streams; the times to the first
token are the router's own. Every turn has a router of its own in front of the same worker: modes take turns too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from embedded import arrivals
from harness import Process, Router
from turns import THREADS, TURN_S, WHOLE, Play, Played, answer, check
from workload import Request, refreshed

NAME = "bench"


def start(stack: ExitStack, folder: str, dtype: str, flags: Sequence[str]) -> tuple[Play, dict[str, Any]]:
    command = [sys.executable, "-m", "scls_worker", "--port", "0", "--model", folder, "--served-name", NAME]
    command += ["--dtype", dtype, "--threads", str(THREADS), "--exit-with-parent", *flags]
    began = time.perf_counter()
    worker = stack.enter_context(Process(command, {"scls-worker"}, {"OMP_NUM_THREADS": str(THREADS)}))
    up = time.perf_counter() - began
    vocab = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]

    def play(count: int, turn: int, scheduler: str = "slice", rate: float | None = None) -> Played:
        work = refreshed(count, turn, vocab)
        flags = ["--scheduler", scheduler, "--log-level", "warn"]
        with Router(["grpc://" + worker.addresses["scls-worker"]], *flags) as router:
            return burst(router, work, arrivals(count, rate, turn))

    return play, {"version": "scls-router", "up_s": up}


def burst(router: Router, work: Sequence[Request], times: Sequence[float]) -> Played:
    address = router.addresses["http"]
    bodies = [
        json.dumps(
            {"model": NAME, "prompt": one.prompt, "max_tokens": one.output, "temperature": 0, "ignore_eos": True}
        )
        for one in work
    ]

    def ask(at: int) -> tuple[float, int, int]:
        """Seconds from its arrival, tokens drawn, tokens found in the cache."""
        time.sleep(max(0.0, began + times[at] - time.perf_counter()))
        arrived = time.perf_counter()
        connection = http.client.HTTPConnection(address, timeout=TURN_S)
        try:
            connection.request("POST", "/v1/completions", bodies[at], {"content-type": "application/json"})
            response = connection.getresponse()
            told = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {told}")
        usage = told["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return time.perf_counter() - arrived, usage["completion_tokens"], cached

    with ThreadPoolExecutor(len(work)) as threads:
        began = time.perf_counter()
        told = list(threads.map(ask, range(len(work))))
        seconds = time.perf_counter() - began
    router.wait_drained()
    metrics = router.metrics()

    def total(name: str) -> float:
        return sum(value for key, value in metrics.items() if key.split("{")[0] == f"scls_router_{name}")

    return Played(
        seconds - min(times),
        check(work, [drawn for _, drawn, _ in told]),
        [ended for ended, _, _ in told],
        [],
        {
            "ttft_s": total("ttft_seconds_sum") / total("ttft_seconds_count"),
            "busy_s": total("worker_busy_seconds_total"),
            "slices": total("slices_total"),
            "cached": sum(cached for _, _, cached in told),
            "forecasts": [
                [outcome["expected_us"] / 1e6, outcome["time_us"] / 1e6, outcome["end"] in WHOLE]
                for batch in router.admin("/batches")["batches"]
                if (outcome := batch["outcome"]) and outcome["steps"]
            ],
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    args, flags = parser.parse_known_args()
    with ExitStack() as stack:
        answer(lambda: start(stack, args.folder, args.dtype, flags))
