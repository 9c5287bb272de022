"""A decode step of our worker, as a slice report says it: milliseconds, the share of the roofline, and where the time goes.

Steps of every size take turns; the limits are measured before and after in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roofline import Limits, Shape, measure, step_seconds
from turns import THREADS

ROWS = (1, 8, 32, 64)
CONTEXT = 256
ROUNDS = 30


def steps(folder: Path, dtype: str, flags: Sequence[str]) -> list[dict[str, Any]]:
    from scls_worker.calibrate import Bench, Point
    from scls_worker.folder import check_folder
    from scls_worker.model import build_model
    from scls_worker.options import parser

    blocks = ROWS[-1] * (CONTEXT // 16 + 1)
    given = parser().parse_args(
        ["--model", str(folder), "--dtype", dtype, "--threads", str(THREADS), "--blocks", str(blocks), *flags]
    )
    served = build_model(given, check_folder(given.model))
    bench = Bench(served.runner, served.info)
    points = {rows: Point(rows, CONTEXT) for rows in ROWS}
    shape = Shape.of(folder, dtype)
    before = measure(dtype, shape.weight_bytes)
    for point in points.values():
        for _ in range(3):
            bench.take(point)
    taken: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(ROUNDS):
        for rows, point in points.items():
            taken[rows].append(bench.take(point) or float("nan"))
    after = measure(dtype, shape.weight_bytes)
    limits = Limits(max(before.bandwidth, after.bandwidth), max(before.peak, after.peak))
    out = []
    for rows in ROWS:
        seconds, bound = statistics.median(taken[rows]), step_seconds(shape, limits, rows, CONTEXT)
        parts = profile(lambda point=points[rows]: bench.take(point))
        row = {"rows": rows, "context": CONTEXT, "ms": 1e3 * seconds, "bound_ms": 1e3 * bound, "share": bound / seconds}
        out.append(row | parts)
    return out


def profile(step: Any, calls: int = 5) -> dict[str, float]:
    """Shares of a step's time: products with weights, attention, and the rest."""
    from scls_worker import attention
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiled

    plain = attention.Pass.attend

    def attend(self: Any, *args: Any) -> Any:
        with record_function("bench attention"):
            return plain(self, *args)

    attention.Pass.attend = attend  # type: ignore[method-assign]
    try:
        with profiled(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(calls):
                with record_function("bench step"):
                    step()
    finally:
        attention.Pass.attend = plain  # type: ignore[method-assign]
    times = {event.key: event for event in seen.key_averages()}

    def total(*names: str) -> float:
        return sum(event.cpu_time_total for name, event in times.items() if name in names)

    whole = total("bench step")
    linear = total("aten::linear") / whole
    attending = total("bench attention") / whole
    return {"linear": linear, "attention": attending, "rest": 1 - linear - attending}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one line for a program")
    args, flags = parser.parse_known_args()
    rows = steps(args.folder, args.dtype, flags)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(show(row))


def show(row: dict[str, Any]) -> str:
    return (
        f"decode step, {row['rows']:2} rows x {row['context']}: {row['ms']:6.2f} ms, {row['share']:4.0%} of the roofline"
        f" ({row['bound_ms']:.2f} ms); linear {row['linear']:.0%}, attention {row['attention']:.0%}, rest {row['rest']:.0%}"
    )


if __name__ == "__main__":
    main()
