"""What the figures of slices (E1, E6) share: workloads, and runs of the command line over them."""

from __future__ import annotations

import gzip
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing import BINARY, TRACES

WORKERS = 8
Run = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Lengths of a trace, or generated ones, which come as a Poisson process; and the worker that serves them."""

    name: str
    device: str
    lengths: str | None
    """The trace; `None`: log-normal, like published statistics of shared chats (`synthetic-sharegpt-like`)."""
    context: int
    """Prompts are cut so that prompt and limit fit the model's context."""
    limit: int
    capacity: float
    """About what iteration-level engines serve, requests a second: what loads are shares of."""
    rows: tuple[int, ...]
    """Batch sizes of `sls` that are tried."""
    longer: float = 1.0
    """Times as long runs as of the others: its answers take minutes."""

    @property
    def most(self) -> int:
        """Tokens of the longest prompt."""
        drawn = 1024 if self.lengths is None else max(i for i, _ in pool(self.lengths))
        return min(drawn, self.context - self.limit)

    def cap(self, kv: int) -> int:
        """Rows that never run out of memory, each as long as it can be: the capped iteration level of the SCLS paper."""
        return kv // (self.most + self.limit)


WORKLOADS = (
    Workload("sharegpt-like", "13b-a100", None, 4096, 1024, 52.0, (8, 16, 25)),
    Workload("azure_conv", "13b-a100", "azure_conv", 4096, 1024, 18.5, (4, 8, 12)),
    Workload("servegen_mid h20", "7b-h20", "servegen_mid", 32768, 4096, 20.5, (8, 16, 32)),
    Workload("servegen_mid h200", "8b-h200", "servegen_mid", 32768, 4096, 58.0, (8, 16, 32)),
    Workload("servegen_reason", "8b-h200", "servegen_reason", 32768, 8192, 22.0, (8, 16, 32), 2.0),
    Workload("azure_code", "8b-h200", "azure_code", 32768, 1024, 118.0, (4, 8, 16)),
)
"""Llama-2 has a context of 4,096, the others of 32,768 or more."""

KV = {"13b-a100": 52_000, "7b-h20": 1_150_000, "8b-h200": 800_000}
"""Tokens, as in `router-sim/models`."""

POOLS: dict[str, list[tuple[int, int]]] = {}


def pool(name: str) -> list[tuple[int, int]]:
    if name not in POOLS:
        with gzip.open(TRACES / f"{name}.jsonl.gz", "rt") as lines:
            rows = [json.loads(line) for line in lines]
        POOLS[name] = [(row["input_tokens"], row["output_tokens"]) for row in rows if "input_tokens" in row]
    return POOLS[name]


def trace(work: Workload, rate: float, seconds: float, seed: int, folder: Path) -> Path:
    """A file of requests: lengths drawn with replacement, exponential gaps."""
    path = folder / f"{work.name.replace(' ', '-')}-{rate:.4g}-{seconds:.4g}-{seed}.jsonl"
    if path.exists():
        return path
    draw = random.Random(f"{work.name} {seed}")
    most, drawn = work.most, pool(work.lengths) if work.lengths else []
    at, lines = 0.0, []
    while True:
        at += draw.expovariate(rate)
        if at >= seconds:
            break
        if work.lengths is None:
            prompt = min(1024, max(4, round(math.exp(draw.gauss(4.6, 1.3)))))
            output = min(1024, max(2, round(math.exp(draw.gauss(5.2, 1.0)))))
        else:
            prompt, output = draw.choice(drawn)
        prompt, output = min(prompt, most), min(output, work.limit)
        lines.append(f'{{"arrival_s": {at:.6f}, "input_tokens": {prompt}, "output_tokens": {output}}}')
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass(frozen=True)
class Job:
    """One run."""

    work: Workload
    scheduler: str
    rate: float
    seconds: float
    host: float = 1.0
    start: float = 2.0
    policy: str = "least_requests"
    drain: bool = False
    seed: int = 1


def simulate(job: Job, folder: Path) -> Run:
    path = trace(job.work, job.rate, job.seconds, job.seed, folder)
    command = [str(BINARY), "simulate", "--json", "--trace", str(path), "--workers", str(WORKERS), "--jobs", "1"]
    command += ["--cost-model", job.work.device, "--scheduler", job.scheduler, "--policy", job.policy]
    command += ["--limit", str(job.work.limit), "--host-ms", f"{job.host:g}", "--start-ms", f"{job.start:g}"]
    if not job.drain:
        command += ["--until", f"{job.seconds:g}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()}")
    (run,) = json.loads(done.stdout)["runs"]
    return {
        "workload": job.work.name,
        "scheduler": job.scheduler,
        "offered": job.rate,
        "host_ms": job.host,
        "start_ms": job.start,
        **{key: run.get(key) for key in FIGURES},
    }


FIGURES = (
    "throughput",
    "output_tokens_per_s",
    "ttft_mean",
    "ttft_p99",
    "tpot_mean",
    "latency_mean",
    "latency_p95",
    "computed",
    "pad",
    "invalid",
    "evicted",
    "slices_mean",
    "early_returns",
    "cuts",
    "spread",
    "unfinished",
)


def in_parallel(jobs: Sequence[Job]) -> list[Run]:
    """All of them, two at once."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        place = Path(folder)
        for job in jobs:
            trace(job.work, job.rate, job.seconds, job.seed, place)
        done = []
        for at, run in enumerate(threads.map(lambda job: simulate(job, place), jobs), 1):
            done.append(run)
            print(f"\r{at} of {len(jobs)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return done
