"""E8, `bench/figures/e8_staleness.py`: feedback that comes late, with and without commits; and coding agents in open loop.

What a decision moves at once: prefixes and load (ours), load alone (the paper's form), nothing (the router sees what engines said
last). In open loop a late turn overlaps the one before it; who does not know yet where that one runs computes it all again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loads import most
from routing import BINARY, RESULTS, TRAFFIC, WORKERS, goal, print_goals, report, short, simulate, write

POLICIES = ("product", "product_anticipating", "jsq")
POINTS = (("conversation", 0.5, POLICIES, (0, 50, 500)), ("coder", 0.5, POLICIES[:2], (0, 500)))
"""Trace, load, policies, delays in milliseconds."""
COMMITS = ("prefixes", "load", "none")
OPEN = ("product", "product_anticipating", "min_ttft", "sticky", "linear@0.6", "dynamo@16", "jsq")
OPENED = ("--sessions", "open", "--until", "4000")
"""A run is over at 4,000 s. Of one that diverges, who still waits counts with the time waited, which is kinder than the truth."""

Key = tuple[str, float, str, str, int]


def late(trace: str, load: float, policies: Sequence[str], delays: Sequence[int], seeds: int) -> dict[Key, list[float]]:
    """Mean TTFT by seed."""
    command = [str(BINARY), "simulate", "--json", "--trace", str(TRAFFIC[trace].path), "--workers", str(WORKERS)]
    command += ["--rate-scale", f"{load * most(trace):.4g}", "--cost-model", "7b-h20", "--seeds", str(seeds)]
    command += TRAFFIC[trace].in_copies
    command += ["--policy", ",".join(policies), "--commit", ",".join(COMMITS), "--delay-ms", ",".join(map(str, delays))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()}")
    cells: dict[Key, list[float]] = {}
    for run in json.loads(done.stdout)["runs"]:
        key = (trace, load, run["policy"], run["commit"], round(run["delay_ms"]))
        cells.setdefault(key, []).append(float(run["ttft_mean"]))
    return cells


def open_maximum() -> float:
    """Coder's maximum rate in open loop, which is less: nothing slows those who come. To 5 %."""

    def best(rate: float) -> float:
        cells = simulate(TRAFFIC["coder"], rate, ("product_anticipating", "sticky"), seeds=1, extra=OPENED)
        return min(cell.mean("ttft_mean") for cell in cells)

    low, high = 1.0, most("coder")
    bound = 5 * best(0.25)
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if best(middle) > bound else (middle, high)
    return math.sqrt(low * high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="where the report goes")
    parser.add_argument("--smoke", action="store_true", help="one minute, one seed: seconds")
    args = parser.parse_args()
    began = time.monotonic()
    if args.smoke:
        for cell in simulate(
            TRAFFIC["conversation"], 1.0, POLICIES, seeds=1, window="0:60", extra=("--delay-ms", "500")
        ):
            print(cell.policy, short(cell.mean("ttft_mean")))
        return
    cells: dict[Key, list[float]] = {}
    for trace, load, policies, delays in POINTS:
        cells |= late(trace, load, policies, delays, args.seeds)
    rows: list[dict[str, Any]] = []
    for (trace, load, policy, commit, delay), values in cells.items():
        alone = statistics.fmean(cells[trace, load, policy, "prefixes", 0])
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        named = {"trace": trace, "load": load, "policy": policy, "commit": commit, "delay_ms": delay}
        mean = statistics.fmean(values)
        figures = {
            "ttft_mean": short(mean),
            "ttft_mean_se": short(error),
            "over_committed_at_once": short(mean / alone),
        }
        rows.append({**named, "seeds": len(values), **figures})
        print(f"{trace:12} {load:.0%} {policy:20} {commit:8} {delay:3} ms  {mean:7.3f} s  {mean / alone:.3f}")

    rate = 0.75 * open_maximum()
    print(f"coder in open loop at {rate:.3g} times its rate")
    collapse = simulate(TRAFFIC["coder"], rate, OPEN, seeds=args.seeds, commit="prefixes,load", extra=OPENED)
    best = min(cell.mean("ttft_mean") for cell in collapse)
    over = {(cell.policy, cell.commit): cell.mean("ttft_mean") / best for cell in collapse}
    table = [{**cell.row(), "over_best": short(cell.mean("ttft_mean") / best)} for cell in collapse]
    for cell in collapse:
        mean, hit = cell.mean("ttft_mean"), cell.mean("hit_ratio")
        print(f"coder open 75% {cell.policy:20} {cell.commit:8} {mean:8.2f} s  {mean / best:7.2f}  hits {hit:.2f}")

    def loss(policy: str, commit: str, delay: int) -> float:
        here, bare = (("conversation", 0.5, policy, *which) for which in ((commit, delay), ("prefixes", 0)))
        return statistics.fmean(cells[here]) / statistics.fmean(cells[bare]) - 1

    goals = [
        goal(
            "mean TTFT lost by 500 ms, product with commit, conversation at half load",
            loss("product", "prefixes", 500),
            "<=",
            0.05,
        ),
        goal("the same, product_anticipating", loss("product_anticipating", "prefixes", 500), "<=", 0.05),
        goal(
            "mean TTFT lost without commit at no delay, conversation at half load",
            loss("product", "none", 0),
            ">=",
            0.4,
        ),
        goal("the same at 500 ms", loss("product", "none", 500), ">=", 0.4),
        goal(
            "mean TTFT over the best, coder open at 75 %, product_anticipating with commit",
            over["product_anticipating", "prefixes"],
            "<=",
            1.2,
        ),
        goal("the same, product without committed prefixes (the failing case)", over["product", "load"], ">", 1.2),
    ]
    print_goals(goals)
    command = "python bench/figures/e8_staleness.py"
    content = report(
        "e8_staleness",
        command,
        time.monotonic() - began,
        open_rate=short(rate),
        rows=rows,
        open_loop=table,
        goals=goals,
    )
    write(args.json or RESULTS / "e8.json", content)


if __name__ == "__main__":
    main()
