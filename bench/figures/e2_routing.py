"""E2, `bench/figures/e2_routing.py`: every routing policy on every trace with prefixes, from a quarter of the load to nine tenths.

Loads are shares of a maximum rate, which this script finds: where the best policy's mean TTFT is five times what it is when nothing
waits. Sessions are closed. Each policy that asks what workers hold runs twice: with prefixes committed at the decision, and with the
index that engines report; weights are swept. "Tuned" is the best external policy of each point over all of these.

A first pass runs everything with one seed. The second runs with all seeds what can matter: ours, min-TTFT and JSQ, which goals name, and at
each point whatever came within a quarter of its best, or within twice of it with its source's weights. What is judged is fixed
beforehand: `JUDGED`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from routing import (
    LOADS,
    TRAFFIC,
    Cache,
    Cell,
    Traffic,
    geometric,
    goal,
    maximum,
    overlap,
    print_goals,
    report,
    short,
    simulate,
    write,
)

OURS = ("product", "product_anticipating", "product_time")
"""Ours, without knobs."""

JUDGED = ("product_anticipating", "prefixes", True)
"""What is recommended, and so what is judged, whatever the results say: prefixes committed at the decision and the guard on."""

BLIND = (
    "round_robin",
    "random",
    "least_requests",
    "power_of_two",
    "jsq",
    "least_token_load",
    "llumnix",
    "scls_lpt",
    "stack_session",
    "stack_prefixaware",
    "sticky",
)
"""External ones that never ask what workers hold."""

FIXED = (
    "least_wait_token",
    "most_hit",
    "bounded_most_hit",
    "linear@0.7",
    "bailian",
    "dynamo@1",
    "dynamo_softmax",
    "dynamo_first",
    "sglang",
    "sglang_cli",
    "aibrix",
    "llm_d",
    "llm_d_10_1",
    "min_ttft",
    "preble",
    "mooncake",
    "stack_kvaware",
    "polyserve",
    "smetric",
    "smetric_held",
    "dual_map",
    "d2lpm",
)
"""External ones that do, with the weights of their sources."""

SWEPT = (
    *(f"linear@{lam}" for lam in (0.3, 0.4, 0.5, 0.6, 0.8)),
    *(f"dynamo@{weight}" for weight in (4, 16, 64)),
    "dynamo_2026@1",
)
"""Other weights of theirs."""

SEARCH = ("product_anticipating", "min_ttft")
"""What the maximum rate is found with: between them they are the best of every trace in the simulation study."""

NEAR = 1.25
"""Times the best of a point up to which a policy runs with all seeds."""
NEAR_FIXED = 2.0
"""The same of external policies as their sources have them, whose means over all points are judged."""
DIVERGED = 5.0
"""Times the best mean TTFT of a point at 90 % from which a policy counts as diverging."""


def run(
    traffic: Traffic, rate: float, seeds: int, policies: tuple[str, ...], device: str, window: str | None
) -> list[Cell]:
    """These policies at one point, with prefixes committed and without where that differs; ours with the guard too."""
    cells: list[Cell] = []
    ours = [policy for policy in policies if policy in OURS]
    asking = [policy for policy in policies if policy not in OURS and policy not in BLIND]
    blind = [policy for policy in policies if policy in BLIND]
    common: dict[str, Any] = {"seeds": seeds, "device": device, "window": window}
    if ours:
        cells += simulate(traffic, rate, ours, commit="prefixes", guard="off,on", **common)
        cells += simulate(traffic, rate, ours, commit="load", **common)
    if asking:
        cells += simulate(traffic, rate, asking, commit="prefixes,load", **common)
    if blind:
        cells += simulate(traffic, rate, blind, **common)
    return cells


def is_ours(cell: Cell) -> bool:
    return cell.policy in OURS


def key(cell: Cell) -> tuple[str, str, bool]:
    return (cell.policy, cell.commit, cell.guard)


def point(traffic: Traffic, rate: float, seeds: int, device: str, window: str | None) -> list[Cell]:
    """All policies at one point: those that can matter with all seeds."""
    everything = (*OURS, *BLIND, *FIXED, *SWEPT)
    cells = run(traffic, rate, 1, everything, device, window)
    if seeds == 1:
        return cells
    best = min(cell.mean("ttft_mean") for cell in cells)
    bound = {policy: NEAR_FIXED if policy in FIXED else NEAR for policy in everything}
    near = {cell.policy for cell in cells if cell.mean("ttft_mean") <= bound[cell.policy] * best}
    again = tuple(p for p in everything if p in OURS or p in ("min_ttft", "jsq") or p in near)
    full = {key(cell): cell for cell in run(traffic, rate, seeds, again, device, window)}
    return [full.get(key(cell), cell) for cell in cells]


def top_rate(cache: Cache, traffic: Traffic, device: str) -> float:
    """The maximum rate, found once."""
    key = f"{device}-{traffic.name}"
    found = cache.get(key)
    if found is None:
        found = maximum(traffic, device, SEARCH)
        cache.put(key, found)
    return float(found)


def resumed(cache: Cache, traffic: Traffic, load: float, most: float, seeds: int, device: str) -> list[Cell]:
    """A point, run unless it was."""
    key = f"{device}-{traffic.name}-{load:g}-{seeds}"
    return cache.cells(key, lambda: point(traffic, load * most, seeds, device, None))


Points = dict[tuple[str, float], list[Cell]]


def find(cells: list[Cell], policy: str, commit: str = "prefixes", guard: bool = False) -> Cell:
    return next(cell for cell in cells if key(cell) == (policy, commit, guard))


def tuned(cells: list[Cell]) -> Cell:
    """The best external policy of a point, all weights and both indices tried."""
    return min((cell for cell in cells if not is_ours(cell)), key=lambda cell: cell.mean("ttft_mean"))


def over_points(points: Points, wanted: tuple[str, str, bool], figure: str = "ttft_mean") -> list[float]:
    """A policy's mean over that of the best external one, a point each."""
    return [find(cells, *wanted).mean(figure) / tuned(cells).mean(figure) for cells in points.values()]


def fixed_keys(points: Points) -> list[tuple[str, str, bool]]:
    """External policies with the weights of their sources, one entry for each index mode."""
    cells = next(iter(points.values()))
    return [key(cell) for cell in cells if not is_ours(cell) and cell.policy not in SWEPT]


def cause(mine: Cell, theirs: Cell) -> str:
    """Where a loss comes from, as the figures of both say it."""
    parts = []
    hits = theirs.mean("hit_ratio") - mine.mean("hit_ratio")
    if hits > 0.01:
        parts.append(f"it hits {100 * hits:.1f} points more")
    for figure, label in (("tpot_mean", "TPOT"), ("latency_mean", "latency")):
        ratio = mine.mean(figure) / theirs.mean(figure)
        if ratio < 0.98:
            parts.append(f"our {label} is {100 * (1 - ratio):.0f} % less: b counts for us and not for it")
    if not parts and theirs.mean("imbalance_b") < 0.95 * mine.mean("imbalance_b"):
        parts.append("it spreads rows more evenly")
    return "; ".join(parts) or "queueing alone: equal hits, TPOT and latency"


def judge(points: Points) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Goals, losses and a summary of these points."""
    ours = sorted({key(cell) for cells in points.values() for cell in cells if is_ours(cell)})
    by = {wanted: geometric(over_points(points, wanted)) for wanted in ours}
    best = JUDGED
    ratios = over_points(points, best)
    pairs = [(find(cells, *best), tuned(cells)) for cells in points.values()]
    count = len(pairs)
    within = {
        share: sum(m.mean("ttft_mean") <= share * t.mean("ttft_mean") or overlap(m, t) for m, t in pairs) / count
        for share in (1.05, 1.10)
    }
    name = find(next(iter(points.values())), *best).name
    goals = [
        goal(f"{name}: mean TTFT over the tuned external best, geometric mean", by[best], "<=", 1.05),
        goal(f"{name}: the same, worst point", max(ratios), "<=", 1.35),
        goal(f"{name}: points within 5 % or overlapping", within[1.05], ">=", 0.65),
        goal(f"{name}: points within 10 % or overlapping", within[1.10], ">=", 0.80),
    ]
    loaded = {at: cells for at, cells in points.items() if at[1] >= 0.5}
    if loaded:
        for figure, label in (("tpot_mean", "TPOT"), ("latency_mean", "latency")):
            rows = []
            for cells in loaded.values():
                rival = min(
                    (find(cells, "min_ttft", commit) for commit in ("prefixes", "load")),
                    key=lambda c: c.mean("ttft_mean"),
                )
                rows.append(find(cells, *best).mean(figure) / rival.mean(figure))
            text = f"{name}: mean {label} over min-TTFT's at 50 % load and above"
            goals.append(goal(text + ", geometric mean", geometric(rows), "<=", 1.0, worst=short(max(rows))))
    beaten = {}
    for wanted in fixed_keys(points):
        beaten[wanted] = geometric(
            find(cells, *wanted).mean("ttft_mean") / find(cells, *best).mean("ttft_mean") for cells in points.values()
        )
    closest = min(beaten, key=lambda wanted: beaten[wanted])
    goals.append(
        goal(
            f"mean TTFT of the closest fixed external policy over {name}'s, geometric mean",
            beaten[closest],
            ">=",
            1.07,
            policy=find(next(iter(points.values())), *closest).name,
        )
    )
    most = [
        find(cells, *best).mean("ttft_mean") / min(cell.mean("ttft_mean") for cell in cells)
        for at, cells in points.items()
        if at[1] >= 0.9
    ]
    if most:
        goals.append(
            goal(f"{name}: mean TTFT over the best of all at 90 % (5 is divergence)", max(most), "<", DIVERGED)
        )
    for trace, load, least in (
        ("conversation", 0.5, 0.4),
        ("conversation", 0.75, 0.85),
        ("coder", 0.5, 0.7),
        ("tau", 0.5, 0.7),
    ):
        if (trace, load) in points:
            cells = points[trace, load]
            saved = 1 - find(cells, *best).mean("ttft_mean") / find(cells, "jsq").mean("ttft_mean")
            goals.append(goal(f"{name}: mean TTFT below JSQ's, {trace} at {load:.0%}", saved, ">=", least))
    losses = [
        {
            "trace": at[0],
            "load": at[1],
            "ours": mine.name,
            "theirs": theirs.name,
            "ttft": short(mine.mean("ttft_mean") / theirs.mean("ttft_mean")),
            "tpot": short(mine.mean("tpot_mean") / theirs.mean("tpot_mean")),
            "latency": short(mine.mean("latency_mean") / theirs.mean("latency_mean")),
            "intervals_overlap": overlap(mine, theirs),
            "cause": cause(mine, theirs),
        }
        for at, (mine, theirs) in zip(points, pairs, strict=True)
        if mine.mean("ttft_mean") > 1.05 * theirs.mean("ttft_mean")
    ]
    table = {
        "ours_over_tuned": {
            find(next(iter(points.values())), *w).name: short(v) for w, v in sorted(by.items(), key=lambda i: i[1])
        },
        "fixed_over_ours": {
            find(next(iter(points.values())), *w).name: short(v) for w, v in sorted(beaten.items(), key=lambda i: i[1])
        },
        "judged": name,
    }
    return goals, losses, table


def show(points: Points, top: int = 12) -> None:
    """The best of each point, a line each, as ratios to the best of all."""
    for (trace, load), cells in points.items():
        ordered = sorted(cells, key=lambda cell: cell.mean("ttft_mean"))
        best = ordered[0].mean("ttft_mean")
        line = ", ".join(f"{cell.name} {cell.mean('ttft_mean') / best:.2f}" for cell in ordered[:top])
        print(f"{trace} {load:.0%}: {best:.3g} s; {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", default=",".join(TRAFFIC))
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="7b-h20")
    parser.add_argument("--json", type=Path, default=None, help="where the report goes")
    parser.add_argument("--smoke", action="store_true", help="one window, one load, one seed: seconds")
    args = parser.parse_args()
    began = time.monotonic()
    points: Points = {}
    most: dict[str, float] = {}
    if args.smoke:
        traffic = TRAFFIC["mixed"]
        points["mixed", 0.5] = point(traffic, 1.7, 1, args.device, "0:60")
    else:
        cache = Cache("e2")
        for name in args.traces.split(","):
            most[name] = top_rate(cache, TRAFFIC[name], args.device)
            print(f"{name}: at most {most[name]:.3g} times its rate ({time.monotonic() - began:.0f} s)", flush=True)
            for load in map(float, args.loads.split(",")):
                cells = resumed(cache, TRAFFIC[name], load, most[name], args.seeds, args.device)
                points[name, load] = cells
                show({(name, load): cells})
    goals, losses, table = judge(points)
    print_goals(goals)
    for loss in losses:
        print(f"loss: {loss['trace']} {loss['load']:.0%}, {loss['ttft']} of {loss['theirs']}: {loss['cause']}")
    if args.json:
        rows = [
            {"trace": trace, "load": load, **cell.row()}
            for (trace, load), cells in points.items()
            for cell in cells
            if math.isfinite(cell.mean("ttft_mean"))
        ]
        command = "bench/figures/e2_routing.py --json bench/results/e2.json"
        header = report("e2_routing", command, time.monotonic() - began, device=args.device, max_rate=most, **table)
        write(args.json, {**header, "losses": losses, "rows": rows, "goals": goals})


if __name__ == "__main__":
    main()
