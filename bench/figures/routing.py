"""What the routing figures (E2, E3, E4) share: traces, loads, runs of the command line, reports and goals."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from machine import git_commit, machine  # noqa: E402

BINARY = Path(os.environ.get("SCLS_ROUTER_RELEASE", ROOT / "target/release/scls-router"))
RESULTS = ROOT / "bench/results"
TRACES = ROOT / "bench/traces"

LOADS = (0.25, 0.5, 0.75, 0.9)
"""Shares of the maximum rate."""

WORKERS = 16


@dataclass(frozen=True)
class Traffic:
    """A trace as the routing figures use it."""

    name: str
    file: str
    window: str | None
    """Seconds of the trace that are replayed, where all of it would take too long."""
    low: float
    """Times its rate at which nothing waits."""
    high: float
    """Times its rate that no policy serves, or at which pauses are half of what they were."""
    copies: int | None = None
    """Of how many copies every rate is made, where the contexts of one more would not fit into the fleet's caches at any rate."""

    @property
    def path(self) -> Path:
        return TRACES / self.file

    @property
    def in_copies(self) -> list[str]:
        """As the command line takes it."""
        return ["--copies", str(self.copies)] if self.copies else []


TRAFFIC = {
    one.name: one
    for one in (
        Traffic("conversation", "mooncake_conversation.jsonl.gz", None, 0.25, 5.0),
        Traffic("mixed", "mooncake_mixed.jsonl.gz", None, 0.25, 8.0),
        Traffic("coder", "coder_sessions.jsonl.gz", None, 0.25, 4.0, 2),
        Traffic("tau", "tau_airline.jsonl.gz", "0:216", 8.0, 300.0),
    )
}

FIGURES = (
    "ttft_mean",
    "ttft_p50",
    "ttft_p95",
    "ttft_p99",
    "tpot_mean",
    "latency_mean",
    "latency_p99",
    "hit_ratio",
    "imbalance_b",
    "throughput",
    "unfinished",
)
"""What is kept of each run."""


@dataclass
class Cell:
    """A policy at one point: a list of values a figure, one a seed, in the order of seeds."""

    policy: str
    commit: str
    guard: bool
    values: dict[str, list[float]]

    @property
    def name(self) -> str:
        return self.policy + (" +guard" if self.guard else "") + ("" if self.commit == "prefixes" else " -commit")

    def mean(self, figure: str) -> float:
        values = self.values[figure]
        return statistics.fmean(values) if values else math.nan

    def error(self, figure: str) -> float:
        """Standard error of the mean over seeds; not a number for one seed."""
        values = self.values[figure]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan

    def row(self) -> dict[str, Any]:
        out: dict[str, Any] = {"policy": self.policy, "commit": self.commit, "guard": self.guard}
        out["seeds"] = len(self.values["ttft_mean"])
        for figure in FIGURES:
            out[figure] = short(self.mean(figure))
        for figure in ("ttft_mean", "tpot_mean", "latency_mean"):
            out[figure + "_se"] = short(self.error(figure))
        return out


def short(value: float) -> float | None:
    """Four digits; `None` where there is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def simulate(
    traffic: Traffic,
    rate: float,
    policies: Sequence[str],
    *,
    seeds: int,
    commit: str = "prefixes",
    guard: str = "off",
    device: str = "7b-h20",
    workers: int = WORKERS,
    window: str | None = None,
    extra: Sequence[str] = (),
) -> list[Cell]:
    """Runs policies on one trace at one rate; the cells in the order of policies, commits and guards."""
    command = [str(BINARY), "simulate", "--json", "--trace", str(traffic.path), "--rate-scale", f"{rate:.4g}"]
    command += ["--workers", str(workers), "--cost-model", device, "--policy", ",".join(policies)]
    command += ["--commit", commit, "--guard", guard, "--seeds", str(seeds), *traffic.in_copies, *extra]
    if window or traffic.window:
        command += ["--window", window or str(traffic.window)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()}")
    cells: dict[tuple[str, str, bool], Cell] = {}
    for run in sorted(json.loads(done.stdout)["runs"], key=lambda run: int(run["seed"])):
        key = (run["policy"], run["commit"], bool(run["guard"]))
        cell = cells.setdefault(key, Cell(*key, values={figure: [] for figure in FIGURES}))
        for figure in FIGURES:
            value = run.get(figure)
            cell.values[figure].append(math.nan if value is None else float(value))
    return list(cells.values())


class Cache:
    """What was run already, by this very program: a run that was interrupted goes on."""

    def __init__(self, name: str) -> None:
        program = hashlib.sha256(BINARY.read_bytes()).hexdigest()[:12]
        self.folder = ROOT / "target/figures" / f"{name}-{program}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Any:
        file = self.folder / f"{key}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def put(self, key: str, value: Any) -> None:
        file = self.folder / f"{key}.json"
        part = file.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.replace(file)

    def cells(self, key: str, make: Callable[[], list[Cell]]) -> list[Cell]:
        """Those of this key; made where there are none yet."""
        known = self.get(key)
        if known is None:
            made = make()
            self.put(key, [asdict(cell) for cell in made])
            return made
        return [Cell(**cell) for cell in known]


def maximum(traffic: Traffic, device: str, policies: Sequence[str], *, window: str | None = None) -> float:
    """The rate at which the best of these policies has five times the mean TTFT that it has when nothing waits."""

    def best(rate: float) -> float:
        return min(
            cell.mean("ttft_mean") for cell in simulate(traffic, rate, policies, seeds=1, device=device, window=window)
        )

    low, high = traffic.low, traffic.high
    bound = 5 * best(low)
    # to 2 %: the load's own noise is larger
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if best(middle) > bound else (middle, high)
    return float(f"{math.sqrt(low * high):.3g}")


def geometric(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def overlap(one: Cell, other: Cell, figure: str = "ttft_mean") -> bool:
    """Whether their 95 % intervals over seeds overlap."""
    reach = [2.78 if len(cell.values[figure]) <= 5 else 1.96 for cell in (one, other)]  # t of four degrees of freedom
    width = sum(r * cell.error(figure) for r, cell in zip(reach, (one, other), strict=True))
    return abs(one.mean(figure) - other.mean(figure)) <= width


def goal(name: str, value: float, op: str, bound: float, **more: Any) -> dict[str, Any]:
    ops: dict[str, Callable[[float, float], bool]] = {
        "<=": lambda a, b: a <= b,
        ">=": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
    }
    return {"goal": name, "value": short(value), "op": op, "bound": bound, "holds": ops[op](value, bound), **more}


def report(name: str, command: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "command": command,
        "commit": git_commit(),
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seed": 1,
        "seconds": short(seconds),
        **more,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, one row a line."""
    parts = []
    for key, value in content.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        lines = ",\n".join("  " + json.dumps(row) for row in value) if rows else ""
        text = f"[\n{lines}\n ]" if rows else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def print_goals(goals: Sequence[dict[str, Any]]) -> None:
    for one in goals:
        print(f"{'holds' if one['holds'] else 'FAILS'}  {one['goal']}: {one['value']} ({one['op']} {one['bound']})")
