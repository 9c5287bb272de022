"""Rates at which the routing figures run: shares of the maximum that E2 found."""

from __future__ import annotations

import gzip
import json
from functools import cache

from routing import RESULTS, TRAFFIC, maximum

SEARCH = ("product_anticipating", "min_ttft")
"""As E2's."""


@cache
def most(trace: str, device: str = "7b-h20") -> float:
    """The maximum rate of a trace on 16 workers, in times its own: E2's (`bench/results/e2.json`) if it is there, else searched for."""
    found = RESULTS / "e2.json"
    if found.exists():
        known = json.loads(found.read_text())
        if known.get("device") == device and trace in known["max_rate"]:
            return float(known["max_rate"][trace])
    return maximum(TRAFFIC[trace], device, SEARCH)


@cache
def most_of_all(trace: str, device: str = "7b-h20") -> float:
    """The same in times the rate of the whole trace, where E2 replays a window: as many requests a second."""
    traffic = TRAFFIC[trace]
    if traffic.window is None:
        return most(trace, device)
    first, last = map(float, traffic.window.split(":"))
    with gzip.open(traffic.path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    times = [row["arrival_s"] for row in rows if "arrival_s" in row]
    inside = [at for at in times if first <= at < last]
    rates = [len(some) / (some[-1] - some[0]) for some in (inside, times)]
    return most(trace, device) * rates[0] / rates[1]
