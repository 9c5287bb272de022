"""E7, `bench/figures/e7_scale.py`: 16 to 4,096 workers at equal load per worker, on the conversation trace.

More workers get superposed copies of the trace with private blocks of their own. Up to 256 workers all of it is replayed, larger
fleets have its first ten minutes, and so has a fleet of 256 for comparison.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from loads import most
from routing import RESULTS, TRAFFIC, WORKERS, Cell, goal, print_goals, report, short, simulate, write

POLICIES = ("product", "product_anticipating", "min_ttft", "linear@0.5", "sticky", "jsq")
WHOLE = (16, 64, 256)
LARGE = (256, 1024, 4096)
FIRST = "0:600"
LOADS = (0.5, 0.75)


def point(workers: int, load: float, seeds: int, window: str | None, policies: tuple[str, ...]) -> list[Cell]:
    rate = load * most("conversation") * workers / WORKERS
    return simulate(TRAFFIC["conversation"], rate, policies, seeds=seeds, workers=workers, window=window)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="where the report goes")
    parser.add_argument("--smoke", action="store_true", help="16 workers, a minute: seconds")
    args = parser.parse_args()
    began = time.monotonic()
    if args.smoke:
        for cell in point(16, 0.5, 1, "0:60", POLICIES[:2]):
            print(cell.policy, short(cell.mean("ttft_mean")))
        return
    points = [(n, load, None, args.seeds) for n in WHOLE for load in LOADS] + [(n, 0.5, FIRST, 1) for n in LARGE]
    rows: list[dict[str, Any]] = []
    lead: dict[tuple[int, float, bool], float] = {}
    for workers, load, window, seeds in points:
        policies = POLICIES if workers <= 64 else ("product", "product_anticipating", "jsq")
        start = time.monotonic()
        cells = {cell.policy: cell for cell in point(workers, load, seeds, window, policies)}
        took = time.monotonic() - start
        best = min(cell.mean("ttft_mean") for cell in cells.values())
        for cell in cells.values():
            ratio = short(cell.mean("ttft_mean") / best)
            named = {"workers": workers, "load": load, "window": window}
            rows.append({**named, **cell.row(), "over_best": ratio, "seconds_all": round(took, 1)})
        ours = cells["product_anticipating"].mean("ttft_mean")
        lead[workers, load, window is not None] = cells["jsq"].mean("ttft_mean") / ours
        told = " ".join(f"{policy} {cell.mean('ttft_mean'):.3f}" for policy, cell in cells.items())
        print(
            f"{workers:5} workers, {load:.0%}{', ten minutes' if window else ''}: {told} s ({took:.0f} s)", flush=True
        )
    unfinished = sum(float(row["unfinished"] or 0) for row in rows if row["workers"] == 4096)
    goals = [
        goal("requests unfinished at 4,096 workers", unfinished, "<=", 0),
        goal("mean TTFT of JSQ over product_anticipating at 256 workers, half load", lead[256, 0.5, False], ">=", 1.5),
        goal("the same at 4,096, ten minutes of the trace", lead[4096, 0.5, True], ">=", 1.5),
    ]
    print_goals(goals)
    content = report("e7_scale", "python bench/figures/e7_scale.py", time.monotonic() - began, rows=rows, goals=goals)
    write(args.json or RESULTS / "e7.json", content)


if __name__ == "__main__":
    main()
