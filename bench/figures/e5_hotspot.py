"""E5, `bench/figures/e5_hotspot.py`: a hotspot burst, the guard off and on; and what the guard does where there is none.

16 workers. For 60 s a share x of all requests begins with the same H tokens, which nobody had before. p99 of all requests is
over those that arrive from the burst's start to a minute after its end. Runs `router-sim/examples/hotspot.rs`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loads import most_of_all
from routing import RESULTS, ROOT, TRAFFIC, WORKERS, goal, print_goals, report, short, write

BURSTS = [(0.5, 8192), (0.3, 8192), (0.1, 8192), (0.5, 1024), (0.3, 1024), (0.1, 1024)]
BACKGROUNDS = [("tau", 0.5), ("tau", 0.3), ("conversation", 0.5)]
QUIET = [("conversation", 0.5), ("conversation", 0.75), ("coder", 0.5), ("tau", 0.5), ("tau", 0.75), ("mixed", 0.5)]
SAFE = ("conversation", "coder", "tau")
"""Traces of which no request may be filtered."""

EXAMPLE = ROOT / "target" / ("debug" if "--smoke" in sys.argv else "release") / "examples/hotspot"

Row = dict[str, Any]


def runs(trace: str, load: float, share: float, shared: int, seeds: int) -> list[Row]:
    rate = load * most_of_all(trace)
    command = [str(EXAMPLE), str(TRAFFIC[trace].path), f"{rate:.4g}"]
    command += [str(share), str(shared), str(WORKERS), str(seeds), *TRAFFIC[trace].in_copies[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()}")
    named = {"background": trace, "load": load, "x": share, "H": shared}
    return [{**named, **json.loads(line)} for line in done.stdout.splitlines()]


def of(rows: list[Row], policy: str, guard: bool) -> list[Row]:
    return [row for row in rows if row["policy"] == policy and row["guard"] == guard]


def mean(rows: list[Row], figure: str) -> float:
    return statistics.fmean(row[figure] for row in rows)


def table(rows: list[Row]) -> list[Row]:
    """One row a background, burst, policy and guard: means over seeds."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in ("background", "load", "x", "H", "policy", "guard")), []).append(row)
    out = []
    for (trace, load, share, shared, policy, guard), runs in cells.items():
        figures = ("all_mean", "all_p99", "hot_mean", "hot_p99", "holders", "alarms", "filtered", "last_alarm")
        means = {figure: short(mean(runs, figure)) for figure in figures}
        named = {"background": trace, "load": load, "x": share, "H": shared, "policy": policy, "guard": guard}
        out.append({**named, "seeds": len(runs), **means})
    return out


def judge(bursts: list[Row], quiet: list[Row]) -> list[Row]:
    goals = []
    adversarial = [row for row in bursts if row["x"] == 0.5 and row["H"] == 8192]
    tripped = [row for row in adversarial if row["guard"] and row["first_filtered"]]
    late = [row["first_filtered"][0] - row["first_alarm"][0] - 2 * row["first_filtered"][1] for row in tripped]
    for policy in ("product", "product_anticipating"):
        name = f"{policy}: guarded bursts (x = 0.5, H = 8192, tau at half load) that trip it"
        goals.append(goal(name, share_tripped(adversarial, policy), ">=", 1.0))
    goals.append(
        goal("requests of the class from its alarm to the first filtered one, less 2|M|: most", max(late), "<=", 10)
    )
    clears = max(row["last_alarm"] for row in tripped)
    goals.append(goal("seconds from the burst's start to its last alarm: most", clears, "<", 60))
    for policy in ("product", "product_anticipating"):
        for trace, load in BACKGROUNDS:
            here = [row for row in adversarial if (row["background"], row["load"]) == (trace, load)]
            bare, guarded = of(here, "product", False), of(here, policy, True)
            for figure, bound in (("all_p99", 1.0), ("hot_p99", 1.5)):
                name = f"{policy} with the guard over product without, {figure}, {trace} at {load:.0%}"
                goals.append(goal(name, mean(guarded, figure) / mean(bare, figure), "<=", bound))
    for policy in ("product", "product_anticipating"):
        filtered = sum(row["filtered"] for row in quiet if row["background"] in SAFE and row["policy"] == policy)
        goals.append(goal(f"requests of quiet traces (conversation, coder, tau) filtered, {policy}", filtered, "<=", 0))
    return goals


def share_tripped(rows: list[Row], policy: str) -> float:
    there = [row for row in of(rows, policy, True) if (row["background"], row["load"]) == ("tau", 0.5)]
    return sum(row["first_filtered"] is not None for row in there) / max(len(there), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="where the report goes")
    parser.add_argument("--smoke", action="store_true", help="one burst, one seed: seconds")
    args = parser.parse_args()
    began = time.monotonic()
    # the tests have built it without --release
    build = ["cargo", "build", "--quiet", "-p", "router-sim", "--example", "hotspot"]
    subprocess.run([*build, *([] if args.smoke else ["--release"])], cwd=ROOT, check=True)
    count = 1 if args.smoke else args.seeds
    cases = [
        (trace, load, *burst, count if burst == BURSTS[0] else 1) for trace, load in BACKGROUNDS for burst in BURSTS
    ]
    calm = [(trace, load, 0.0, 0, count) for trace, load in QUIET]
    if args.smoke:
        cases, calm = cases[:1], calm[:1]
    most_of = {trace: most_of_all(trace) for trace, *_ in cases + calm}
    print(" ".join(f"{trace} at most {rate:.3g}" for trace, rate in most_of.items()), flush=True)
    with ThreadPoolExecutor(max(os.cpu_count() or 1, int(os.environ.get("SCLS_JOBS", 0)))) as pool:
        found = list(pool.map(lambda case: runs(*case), cases + calm))
    bursts = [row for part in found[: len(cases)] for row in part]
    quiet = [row for part in found[len(cases) :] for row in part]
    rows = table(bursts)
    for row in rows:
        if row["x"] == 0.5:
            guard = "guard" if row["guard"] else "     "
            print(
                f"{row['background']:12} {row['load']:.0%} H {row['H']:5} {row['policy']:20} {guard} all p99 {row['all_p99']:7.3f} s"
                f" hot p99 {row['hot_p99']:7.3f} s holders {row['holders']:4.1f} filtered {row['filtered']:.1f}"
            )
    if args.smoke:
        return
    goals = judge(bursts, quiet)
    print_goals(goals)
    still = [row for row in table(quiet) if row["guard"]]
    keep = ("background", "load", "policy", "seeds", "all_mean", "all_p99", "alarms", "filtered")
    still = [{key: row[key] for key in keep} for row in still]
    command = "python bench/figures/e5_hotspot.py"
    content = report("e5_hotspot", command, time.monotonic() - began, rows=rows, quiet=still, goals=goals)
    write(args.json or RESULTS / "e5.json", content)


if __name__ == "__main__":
    main()
