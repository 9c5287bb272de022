"""Tokens to decision from Python, beside the hash plus look-up of the ai-dynamo-runtime wheel.

Both hold the same blocks on the same workers and are asked for the same prompts in the same run, in turns, on one
core. That both find the same number of blocks on every worker is asserted for every prompt. Theirs is a hash and a
look-up; ours is hash, look-up, scores and the choice.

One core, because their look-up is a call to a thread of its own: across cores it would pay for waking that one up,
which says more of the machine than of the look-up. So the ratio is against the faster of their two cases.

ai-dynamo-runtime (NVIDIA, Apache-2.0) comes from the package index, see run.sh; nothing of it is copied here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dynamo import _core as dynamo
from scls_router import Router, hash_blocks
from workload import BLOCK, Workload, tokens

RESULTS = Path(__file__).resolve().parents[2] / "results" / "python-route.json"
GOAL = 5.0


def fill(workload: Workload, workers: int) -> tuple[Router, dynamo.RadixTree]:
    router, tree = Router(block_size=BLOCK), dynamo.RadixTree()
    for worker in range(workers):
        router.add_worker(str(worker))
    chains: dict[int, tuple[list[int], list[int]]] = {}
    for event, stored in enumerate(workload.stores):
        if stored.session not in chains:
            ids = tokens(workload.session(stored.session))
            theirs = dynamo.compute_block_hash_for_seq(ids.tolist(), BLOCK)
            chains[stored.session] = (hash_blocks(0, ids, BLOCK), theirs)
        names, contents = chains[stored.session]
        span = range(stored.start, stored.end)
        router.report(str(stored.worker), stored=[names[at] for at in span])
        blocks = [{"block_hash": names[at], "tokens_hash": contents[at]} for at in span]
        parent = names[stored.start - 1] if stored.start else None
        data = {"event_id": event, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}}
        tree.apply_event(stored.worker, json.dumps(data).encode())
    return router, tree


def check(router: Router, tree: dynamo.RadixTree, prompts: list[np.ndarray]) -> int:
    """Blocks found on all workers over all prompts, which both agree on."""
    total = 0
    for prompt in prompts:
        theirs = tree.find_matches(dynamo.compute_block_hash_for_seq(prompt.tolist(), BLOCK)).scores
        theirs = {worker: found for (worker, _), found in theirs.items()}
        for candidate in router.route(prompt, commit=False).candidates:
            ours = (len(prompt) - candidate.new_tokens) // BLOCK
            # Ours never counts the block of the last token: an engine computes that token whatever it has.
            assert ours == min(theirs.get(int(candidate.worker), 0), (len(prompt) - 1) // BLOCK), candidate
            total += ours
    return total


def measure(calls: dict[str, Callable[[int], object]], prompts: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds a call: median wall time, mean CPU time of all threads; of each the median over the rounds.

    In a round each call goes once over all prompts before the next call does. In turns by prompt, the first to ask
    would bring the prompt, and the index where several calls share it, into the cache for those after it.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times = []
            before = time.process_time_ns()
            for prompt in range(prompts):
                began = time.perf_counter_ns()
                call(prompt)
                times.append(time.perf_counter_ns() - began)
            cpu[name].append((time.process_time_ns() - before) / prompts / 1e3)
            wall[name].append(statistics.median(times) / 1e3)
    return {name: {"wall_us": statistics.median(wall[name]), "cpu_us": statistics.median(cpu[name])} for name in calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=128, help="of a prompt, 16 tokens each")
    parser.add_argument("--distinct", type=int, default=1 << 18, help="blocks in the index")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    workload = Workload(args.workers, args.blocks, args.distinct, args.queries)
    router, tree = fill(workload, args.workers)
    arrays = [tokens(query) for query in workload.queries]
    narrow = [ids.astype(np.uint32) for ids in arrays]
    lists = [ids.tolist() for ids in arrays]
    found = check(router, tree, arrays)
    print(f"{len(arrays)} prompts of {len(arrays[0])} tokens, {args.workers} workers: {found} blocks found by both")

    def theirs(ids: list[int]) -> object:
        return tree.find_matches(dynamo.compute_block_hash_for_seq(ids, BLOCK)).scores

    def counted(at: int) -> None:
        router.finished(router.route(arrays[at]))

    calls: dict[str, Callable[[int], object]] = {
        "ours, numpy int64": lambda at: router.route(arrays[at], commit=False).worker,
        "theirs, numpy int64 as a list": lambda at: theirs(arrays[at].tolist()),
        "ours, numpy uint32": lambda at: router.route(narrow[at], commit=False).worker,
        "theirs, a list that is there": lambda at: theirs(lists[at]),
        "ours, a list that is there": lambda at: router.route(lists[at], commit=False).worker,
        "ours, numpy int64, counted and finished": counted,
        "ours, hash alone, numpy int64": lambda at: hash_blocks(0, arrays[at], BLOCK),
        "the one copy alone, numpy int64": lambda at: memoryview(arrays[at]).tobytes(),
    }
    gc.disable()
    measure(calls, args.queries, 1)
    figures = measure(calls, args.queries, args.rounds)
    for name, figure in figures.items():
        print(f"{name:42} {figure['wall_us']:8.2f} us wall  {figure['cpu_us']:8.2f} us cpu")
    base, ours = figures["theirs, numpy int64 as a list"], figures["ours, numpy int64"]
    ratios = {kind: base[f"{kind}_us"] / ours[f"{kind}_us"] for kind in ("wall", "cpu")}
    listed = figures["theirs, a list that is there"]
    ratios |= {f"{kind}, their list free": listed[f"{kind}_us"] / ours[f"{kind}_us"] for kind in ("wall", "cpu")}
    print("theirs over ours: " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items()))
    holds = ratios["wall"] >= GOAL and ratios["cpu"] >= GOAL
    report = {
        "name": "python-route",
        "command": "make bench-peers",
        "commit": commit_name(),
        "when": date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": None, "load": round(os.getloadavg()[0], 1)},
        "seed": 7,
        "python": platform.python_version(),
        "rivals": {"ai-dynamo-runtime": version("ai-dynamo-runtime")},
        "workload": {key: getattr(args, key) for key in ("workers", "blocks", "distinct", "queries", "rounds")},
        "blocks_found_by_both": found,
        "rows": [{"call": name, **figure} for name, figure in figures.items()],
        "ratios": ratios,
        "goals": [
            {
                "goal": "their hash and look-up over our tokens to decision, from numpy, one core: the lesser of wall and CPU",
                "value": min(ratios["wall"], ratios["cpu"]),
                "op": ">=",
                "bound": GOAL,
                "holds": holds,
            }
        ],
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if holds else "the goal does not hold")


def commit_name() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
