"""E6: how long a slice should be, by whether KV outlives it and by where rows go.

KV dropped: the SCLS paper's slices on workers that pad, batches dealt in turn (`lb` without max-min: `ab`) or to the least
loaded (`scls`, longest first). KV kept: our slices with the cut rule, where a row stays where its policy put it. Mean and 95th
percentile of latency, and TTFT, at a load that all of them serve, and throughput beyond it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from routing import RESULTS, goal, print_goals, report, short, write
from slices import WORKLOADS, Job, Run, Workload, in_parallel

STEPS = (16, 32, 64, 128, 256, 512, 1024)
PLACES = ("round_robin", "least_requests", "product", "product_time")
LOADS = {"sharegpt-like": 0.4, "servegen_mid h200": 0.2}
"""Shares of an iteration level's capacity: what the slices that drop KV can serve at most S."""
FULL = 1.15


def jobs_of(work: Workload, load: float, seconds: float) -> list[Job]:
    jobs = []
    for steps in STEPS:
        for share in (load, FULL):
            jobs += [Job(work, f"{name}@{steps}", share * work.capacity, seconds) for name in ("ab", "scls")]
            jobs += [
                Job(work, f"slice@{steps}", share * work.capacity, seconds, policy=place)
                for place in (PLACES if share == load else ("least_requests",))
            ]
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one workload, short runs, nothing written")
    parser.add_argument("--json", type=Path, default=RESULTS / "e6.json")
    parser.add_argument("--part", type=float, default=1.0, help="of the full length of runs (default 1)")
    args = parser.parse_args()
    began = time.monotonic()
    works = [work for work in WORKLOADS if work.name in LOADS][: 1 if args.smoke else None]
    jobs = [job for work in works for job in jobs_of(work, LOADS[work.name], 30 if args.smoke else 300 * args.part)]
    rows = [row_of(job, run) for job, run in zip(jobs, in_parallel(jobs), strict=True)]
    goals = []
    for work in works:
        light = [row for row in rows if row["workload"] == work.name and row["load"] < 1]
        show(work.name, light)
        dropped = best([row for row in light if row["scheduler"] == "scls"])
        kept = best([row for row in light if row["scheduler"] == "slice"])
        value = kept["latency_mean"] / dropped["latency_mean"]
        goals.append(goal(f"{work.name}: mean latency with KV kept over dropped, each at its best S", value, "<=", 1))
        sets = {place: [row["latency_mean"] for row in light if row["placement"] == place] for place in PLACES}
        value = max(max(of) / min(of) for of in sets.values())
        goals.append(goal(f"{work.name}: mean latency with KV kept, worst S over best", value, "<=", 1.1))
        value = max(row["latency_mean"] for row in light if row["scheduler"] == "scls") / dropped["latency_mean"]
        goals.append(goal(f"{work.name}: mean latency with KV dropped, worst S over best", value, ">=", 1.1))
    print_goals(goals)
    if not args.smoke:
        command = f"bench/figures/e6_slice_length.py --part {args.part:g}"
        write(args.json, report("e6", command, time.monotonic() - began, rows=rows, goals=goals))


def row_of(job: Job, run: Run) -> Run:
    scheduler, steps = job.scheduler.split("@")
    place = {"ab": "in turn", "scls": "longest first to the least loaded"}.get(scheduler, job.policy)
    named = {"workload": job.work.name, "scheduler": scheduler, "S": int(steps), "kv": "dropped", "placement": place}
    if scheduler == "slice":
        named["kv"] = "kept"
    figures = {key: short(value) if isinstance(value, float) else value for key, value in run.items()}
    return {**named, "load": round(job.rate / job.work.capacity, 3), **figures, "scheduler": scheduler}


def best(rows: list[Run]) -> Run:
    return min(rows, key=lambda row: row["latency_mean"])


def show(name: str, rows: list[Run]) -> None:
    print(f"{name}: mean latency, seconds".ljust(48) + "".join(f"{steps:>9}" for steps in STEPS))
    for kind in dict.fromkeys((row["kv"], row["placement"]) for row in rows):
        line = {row["S"]: row["latency_mean"] for row in rows if (row["kv"], row["placement"]) == kind}
        print(f"  KV {kind[0]}, {kind[1]}".ljust(48) + "".join(f"{line[steps]:9.2f}" for steps in STEPS))


if __name__ == "__main__":
    main()
