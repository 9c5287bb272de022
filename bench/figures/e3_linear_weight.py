"""E3, `bench/figures/e3_linear_weight.py`: the linear rule's best weight moves with trace and load; the product has none.

Maximum rates are those that E2 found (`bench/results/e2.json`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from routing import (
    LOADS,
    RESULTS,
    TRAFFIC,
    Cell,
    Traffic,
    geometric,
    goal,
    print_goals,
    report,
    short,
    simulate,
    write,
)

WEIGHTS = tuple(round(0.1 * step, 1) for step in range(1, 10))
OURS = ("product", "product_anticipating")
NEAR = 1.02
"""Weights within so much of the best cannot be told from it."""


def point(traffic: Traffic, rate: float, seeds: int, device: str, window: str | None) -> list[Cell]:
    linear = [f"linear@{weight}" for weight in WEIGHTS]
    cells = simulate(traffic, rate, linear, seeds=seeds, commit="prefixes,load", device=device, window=window)
    return cells + simulate(traffic, rate, OURS, seeds=seeds, device=device, window=window)


def judge(points: dict[tuple[str, float], list[Cell]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    best: list[dict[str, Any]] = []
    for (trace, load), cells in points.items():
        linear = {w: min(c.mean("ttft_mean") for c in cells if c.policy == f"linear@{w}") for w in WEIGHTS}
        least = min(linear.values())
        ours = {cell.policy: cell.mean("ttft_mean") for cell in cells if cell.policy in OURS}
        best.append(
            {
                "trace": trace,
                "load": load,
                "weight": min(linear, key=lambda w: linear[w]),
                "as_good": [w for w, value in linear.items() if value <= NEAR * least],
                "ttft": short(least),
                "worst_weight": short(max(linear.values()) / least),
                **{f"{policy}_over_tuned": short(value / least) for policy, value in ours.items()},
            }
        )
    regret = {
        w: geometric(
            min(c.mean("ttft_mean") for c in cells if c.policy == f"linear@{w}")
            / min(c.mean("ttft_mean") for c in cells if c.policy.startswith("linear@"))
            for cells in points.values()
        )
        for w in WEIGHTS
    }
    weights = [row["weight"] for row in best]
    goals = [
        goal(
            "the best weight moves over traces and loads: largest less smallest", max(weights) - min(weights), ">", 0.1
        ),
        goal(
            "mean TTFT of the best single weight over a weight tuned per point, geometric mean",
            min(regret.values()),
            ">",
            1.0,
        ),
    ]
    goals += [
        goal(
            f"{policy}: mean TTFT over linear tuned per point, geometric mean",
            geometric(row[f"{policy}_over_tuned"] for row in best),
            "<=",
            1.0,
        )
        for policy in OURS
    ]
    return best, goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", default=",".join(TRAFFIC))
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="7b-h20")
    parser.add_argument("--json", type=Path, default=None, help="where the report goes")
    parser.add_argument("--smoke", action="store_true", help="one window, one load, one seed: seconds")
    args = parser.parse_args()
    began = time.monotonic()
    points: dict[tuple[str, float], list[Cell]] = {}
    if args.smoke:
        points["mixed", 0.5] = point(TRAFFIC["mixed"], 1.7, 1, args.device, "0:60")
    else:
        most = json.loads((RESULTS / "e2.json").read_text())["max_rate"]
        for name in args.traces.split(","):
            for load in map(float, args.loads.split(",")):
                points[name, load] = point(TRAFFIC[name], load * most[name], args.seeds, args.device, None)
                print(f"{name} {load:.0%} ({time.monotonic() - began:.0f} s)", flush=True)
    best, goals = judge(points)
    for row in best:
        print(
            f"{row['trace']:12} {row['load']:4.0%}  best weight {row['weight']}, product {row['product_over_tuned']} of it"
        )
    print_goals(goals)
    if args.json:
        rows = [{"trace": t, "load": load, **cell.row()} for (t, load), cells in points.items() for cell in cells]
        command = "bench/figures/e3_linear_weight.py --json bench/results/e3.json"
        header = report("e3_linear_weight", command, time.monotonic() - began, device=args.device)
        write(args.json, {**header, "best": best, "rows": rows, "goals": goals})


if __name__ == "__main__":
    main()
