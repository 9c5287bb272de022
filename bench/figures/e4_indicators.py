"""E4, `bench/figures/e4_indicators.py`: what each indicator of the product is for, by leaving it out or changing it.

Maximum rates are those that E2 found (`bench/results/e2.json`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from routing import RESULTS, TRAFFIC, Cell, Traffic, geometric, goal, print_goals, report, short, simulate, write

VARIANTS = {
    "product": "(Q + u) * (b + 1)",
    "product_hit_ratio": "u * (b + 1), which is (1 - hit ratio) * (b + 1): without Q",
    "product_tokens": "(Q + u) * tokens: all tokens for b",
    "product_plain_batch": "(Q + u) * b: without the row itself",
    "product_sum": "Q + u * (b + 1): without what rows wait for the queue",
    "product_first_tie": "the product, of equals the first worker",
    "product_seconds": "(seconds of Q + u) * (b + 1), attention counted",
    "product_time": "(seconds of Q + u and of a slice) * (b + 1)",
    "product_anticipating": "(Q + u) * (b + 1) * (1 + lambda * c_p * u)",
}
LOADS = (0.5, 0.75)


def point(traffic: Traffic, rate: float, seeds: int, device: str, window: str | None) -> list[Cell]:
    return simulate(traffic, rate, list(VARIANTS), seeds=seeds, device=device, window=window)


def judge(points: dict[tuple[str, float], list[Cell]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    def over(policy: str, figure: str, traces: tuple[str, ...] = tuple(TRAFFIC)) -> float:
        ratios = []
        for (trace, _), cells in points.items():
            if trace in traces:
                by = {cell.policy: cell.mean(figure) for cell in cells}
                ratios.append(by[policy] / by["product"])
        return geometric(ratios)

    figures = ("ttft_mean", "ttft_p50", "ttft_p95", "tpot_mean", "latency_mean")
    table: list[dict[str, Any]] = [
        {"policy": policy, "score": score, **{f: short(over(policy, f)) for f in figures}}
        for policy, score in VARIANTS.items()
    ]
    chat = ("conversation", "mixed") if any(trace == "conversation" for trace, _ in points) else tuple(TRAFFIC)
    goals = [
        goal(
            "P50 TTFT of P over the hit ratio's, chat and mixed (paper 0.856)",
            1 / over("product_hit_ratio", "ttft_p50", chat),
            "<",
            1.0,
        ),
        goal(
            "P95 TTFT of P over the hit ratio's, chat and mixed (paper 0.572)",
            1 / over("product_hit_ratio", "ttft_p95", chat),
            "<",
            1.0,
        ),
        goal("TPOT with tokens over TPOT with b", over("product_tokens", "tpot_mean"), ">", 1.0),
        goal("mean TTFT without + 1 over with it", over("product_plain_batch", "ttft_mean"), ">", 1.0),
        goal("mean TTFT with ties to the first over rotating ones", over("product_first_tie", "ttft_mean"), ">", 1.0),
    ]
    return table, goals


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
    points: dict[tuple[str, float], list[Cell]] = {}
    if args.smoke:
        points["mixed", 0.5] = point(TRAFFIC["mixed"], 1.7, 1, args.device, "0:60")
    else:
        most = json.loads((RESULTS / "e2.json").read_text())["max_rate"]
        for name in args.traces.split(","):
            for load in map(float, args.loads.split(",")):
                points[name, load] = point(TRAFFIC[name], load * most[name], args.seeds, args.device, None)
    table, goals = judge(points)
    print(f"{'over the product':22} TTFT  P50   P95   TPOT  latency")
    for row in table:
        values = [row[f] for f in ("ttft_mean", "ttft_p50", "ttft_p95", "tpot_mean", "latency_mean")]
        print(f"{row['policy']:22} " + "  ".join("-" if v is None else f"{v:.2f}" for v in values))
    print_goals(goals)
    if args.json:
        rows = [{"trace": t, "load": load, **cell.row()} for (t, load), cells in points.items() for cell in cells]
        command = "bench/figures/e4_indicators.py --json bench/results/e4.json"
        header = report("e4_indicators", command, time.monotonic() - began, device=args.device)
        write(args.json, {**header, "over_product": table, "rows": rows, "goals": goals})


if __name__ == "__main__":
    main()
