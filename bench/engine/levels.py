"""Slices against iterations, on one worker with all else equal: what slices bring is measured, not assumed.

Behind a router, as it is run: a queue that never empties, and arrivals at 70 % of what iteration level serves. In one
process, where the length of a slice can be set and everything between two passes is seen: host time, what a slice start
exposes, long slices against short ones with a queue waiting.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from contest import OURS, SERVED, Contest, engines, warm
from routing import goal, short
from turns import Engine, Played

MODES = ("slice", "ils")
LENGTHS = (16, 128)
# Rows of a worker whose queue waits, and of a full one.
FEW, FULL = 16, 64
SHARE = 0.7


def compare(contest: Contest, seconds: float) -> dict[str, Any]:
    """`seconds`: of a turn of arrivals."""
    made, _ = engines(contest)
    with ExitStack() as stack:
        up = {}
        for name in (OURS, SERVED):
            up[name] = stack.enter_context(made[name]())
            up[name].wait()
            warm(up[name], contest, {})
        many = 3 * FULL if contest.count >= FULL else contest.count
        full = rounds(up[SERVED], contest, "a full queue", [{"scheduler": mode, "count": many} for mode in MODES])
        capacity = statistics.median(many / turn.seconds for turn in full[1])
        poisson: dict[str, Any] = {"rate": SHARE * capacity, "count": max(8, int(SHARE * capacity * seconds))}
        print(f"capacity at iteration level: {capacity:.2f} requests/s", flush=True)
        mixed = [{"scheduler": mode, **poisson} for mode in MODES]
        served = rounds(up[SERVED], contest, "70 %, served", mixed)
        alone = rounds(up[OURS], contest, "70 %, one process", mixed)
        queue = [{"slice_len": length, "rows": FEW, "count": contest.count} for length in LENGTHS]
        lengths = rounds(up[OURS], contest, "a queue of 16 rows", queue)

    def over(turns: Sequence[Sequence[Played]], of: Any) -> float:
        """Slices over iterations, the median of the rounds: both modes of a round have the same requests at the same times."""
        return statistics.median(of(mine) / of(other) for mine, other in zip(*turns, strict=True))

    starts = [start for turn in alone[0] for start in turn.more["starts_s"]]
    seen = [*full[0], *served[0], *alone[0]]
    missed, parts = errors(seen, whole=True), errors(seen, whole=False)
    rows = [
        line("a full queue, served", MODES, full),
        line("70 %, served", MODES, served),
        line("70 %, one process", MODES, alone),
        line("a queue of 16 rows, one process", LENGTHS, lengths),
    ]
    return {
        "levels": [row for part in rows for row in part],
        "capacity_requests_per_s": short(capacity),
        "slice_start_ms": summary([1e3 * start for start in starts]),
        "forecast_error": {"whole": summary(missed), "cut": summary(parts)},
        "goals": [
            goal("throughput of S = 128 over S = 16, a queue waiting", over(lengths[::-1], speed), ">=", 0.97),
            goal("error of a whole slice's time, mean", statistics.fmean(missed), "<=", 0.06),
            goal("error of a whole slice's time, p99", quantile(missed, 0.99), "<=", 0.15),
            goal("mean TTFT over iteration level at 70 %", over(served, lambda turn: turn.more["ttft_s"]), "<=", 1.05),
            goal("mean latency over iteration level at 70 %", over(served, lambda turn: turn.latency), "<=", 1.0),
            goal("host time a token over iteration level at 70 %", over(alone, host), "<=", 0.5),
            goal("throughput over iteration level, a full queue", over(full, speed), ">=", 0.98),
            goal("exposed cost of a slice start, mean ms", 1e3 * statistics.fmean(starts), "<=", 2, stretch=1),
        ],
    }


def rounds(engine: Engine, contest: Contest, what: str, ways: Sequence[dict[str, Any]]) -> list[list[Played]]:
    """Turns of each way, interleaved: the same requests for all ways of a round."""
    turns: list[list[Played]] = [[] for _ in ways]
    for at in range(contest.rounds):
        for way, mine in zip(ways, turns, strict=True):
            mine.append(turn := engine.turn(turn=1 + at, **way))
            shown = ", ".join(f"{name} {value}" for name, value in way.items() if name in ("scheduler", "slice_len"))
            print(
                f"round {at + 1}  {what}, {shown}: {turn.rate:.1f} tokens/s, mean latency {turn.latency:.2f} s,"
                f" TTFT {1e3 * first(turn):.0f} ms",
                flush=True,
            )
    return turns


def first(turn: Played) -> float:
    """Mean time to the first token."""
    return float(turn.more["ttft_s"]) if "ttft_s" in turn.more else turn.ttft


def host(turn: Played) -> float:
    """Seconds a token between two passes while rows were there."""
    return float(turn.more["host_s"]) / turn.tokens


def speed(turn: Played) -> float:
    return turn.rate


def errors(turns: Sequence[Played], whole: bool) -> list[float]:
    """How far the time of slices was off what was expected before they ran: of those that ran to their ends, or of those that
    were cut, for as many iterations as they had.
    """
    forecasts = [forecast for turn in turns for forecast in turn.more["forecasts"]]
    return [abs(took / foreseen - 1) for foreseen, took, ran_out in forecasts if foreseen and ran_out is whole]


def line(what: str, names: Sequence[Any], turns: Sequence[Sequence[Played]]) -> list[dict[str, Any]]:
    rows = []
    for name, mine in zip(names, turns, strict=True):
        row = {"load": what, "mode": name, "tokens_per_s": short(statistics.median(map(speed, mine)))}
        row["latency_mean_s"] = short(statistics.median(turn.latency for turn in mine))
        row["ttft_mean_s"] = short(statistics.median(map(first, mine)))
        row["slices"] = short(statistics.median(turn.more["slices"] for turn in mine))
        if "host_s" in mine[0].more:
            row["host_us_per_token"] = short(1e6 * statistics.median(map(host, mine)))
        rows.append(row)
    return rows


def summary(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"count": 0}
    named = {"mean": statistics.fmean(values), "median": statistics.median(values), "p99": quantile(values, 0.99)}
    return {name: short(value) for name, value in named.items()} | {"count": len(values)}


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
