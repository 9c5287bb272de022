"""A decode step of our worker, as a slice report says it: milliseconds, the share of the roofline, and where the time goes.

Steps of every size take turns, and every round measures the limits beside them, in the same process: a share is the median
of the rounds'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from roofline import Meter, Shape, step_seconds
from turns import THREADS

ROWS = (1, 8, 32, 64)
CONTEXT = 256
ROUNDS = 30
# Of a look at a limit; seven of them a round.
LOOK_S = 0.1


def steps(folder: Path, dtype: str, flags: Sequence[str]) -> list[dict[str, Any]]:
    from scls_worker.calibrate import Bench, Point
    from scls_worker.folder import check_folder
    from scls_worker.model import build_model
    from scls_worker.options import parser

    blocks = ROWS[-1] * (CONTEXT // 16 + 2)
    given = parser().parse_args(
        ["--model", str(folder), "--dtype", dtype, "--threads", str(THREADS), "--blocks", str(blocks), *flags]
    )
    served = build_model(given, check_folder(given.model))
    bench = Bench(served.runner, served.info)
    points = {rows: Point(rows, CONTEXT) for rows in ROWS}
    shape = Shape.of(folder, dtype)
    meter = Meter(dtype, shape.weight_bytes)
    for point in points.values():
        for _ in range(3):
            bench.take(point)
    taken: dict[int, list[float]] = {rows: [] for rows in ROWS}
    bounds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(ROUNDS):
        limits = meter.look(LOOK_S)
        for rows, point in points.items():
            taken[rows].append(bench.take(point) or float("nan"))
            bounds[rows].append(step_seconds(shape, limits, rows, CONTEXT))
    out = []
    for rows in ROWS:
        share = statistics.median(bound / took for bound, took in zip(bounds[rows], taken[rows], strict=True))
        seconds, bound = statistics.median(taken[rows]), statistics.median(bounds[rows])
        parts = profile(served.runner, lambda point=points[rows]: bench.take(point))
        row = {"rows": rows, "context": CONTEXT, "ms": 1e3 * seconds, "bound_ms": 1e3 * bound, "share": share}
        # What no forecast can know: how far the same step is off its own median.
        off = sorted(abs(took / seconds - 1) for took in taken[rows])
        spread = {"mean": statistics.fmean(off), "p99": off[int(0.99 * len(off))]}
        out.append({**row, "spread": spread, "parts": parts})
    return out


def profile(runner: Any, step: Callable[[], float | None], calls: int = 5) -> dict[str, float]:
    """Shares of a step's time. Where one call of ours computes all layers, it is one part."""
    if getattr(runner, "forward", None):
        return profile_of_call(runner, step, calls)
    from scls_worker.attention import Pass
    from scls_worker.native import NativePass
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiled

    def named(plain: Callable[..., Any]) -> Callable[..., Any]:
        def attend(*args: Any) -> Any:
            with record_function("bench attention"):
                return plain(*args)

        return attend

    plain: dict[Any, Any] = {made: made.attend for made in (Pass, NativePass)}
    for made, attend in plain.items():
        made.attend = named(attend)
    try:
        with profiled(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(calls):
                with record_function("bench step"):
                    step()
    finally:
        for made, attend in plain.items():
            made.attend = attend
    times = {event.key: event.cpu_time_total for event in seen.key_averages()}
    linear, attention = (times[name] / times["bench step"] for name in ("aten::linear", "bench attention"))
    return {"linear": linear, "attention": attention, "rest": 1 - linear - attention}


def profile_of_call(runner: Any, step: Callable[[], float | None], calls: int) -> dict[str, float]:
    """The kernel's part of an iteration, and the worker's own around it."""
    forward, inside, passes, whole = runner.forward, 0.0, 0, 0.0

    def timed(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside, passes
            began = time.perf_counter()
            made = kernel(*args)
            inside += time.perf_counter() - began
            passes += made or 1  # a burst says how many it made
            return made

        return call

    plain = {name: getattr(forward, name) for name in ("run", "bursts")}
    for name, kernel in plain.items():
        setattr(forward, name, timed(kernel))
    try:
        for _ in range(calls):
            whole += step() or float("nan")
    finally:
        for name, kernel in plain.items():
            setattr(forward, name, kernel)
    share = inside / passes / (whole / calls)
    return {"kernel": share, "rest": 1 - share}


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
    parts = ", ".join(f"{name} {share:.0%}" for name, share in row["parts"].items())
    of = f"{row['share']:4.0%} of the roofline ({row['bound_ms']:.2f} ms)"
    spread = f"the same step varies by {row['spread']['mean']:.1%}, p99 {row['spread']['p99']:.0%}"
    return f"decode step, {row['rows']:2} rows x {row['context']}: {row['ms']:6.2f} ms, {of}; {parts}; {spread}"


if __name__ == "__main__":
    main()
