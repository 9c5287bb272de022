"""Rates at which the routing figures run: shares of the maximum that E2 found."""

from __future__ import annotations

import json
from functools import cache

from routing import RESULTS, TRAFFIC, maximum

SEARCH = ("product", "product_anticipating", "min_ttft")


@cache
def most(trace: str, device: str = "7b-h20") -> float:
    """The maximum rate of a trace on 16 workers, in times its own: E2's (`bench/results/e2.json`) if it is there, else searched for."""
    found = RESULTS / "e2.json"
    if found.exists():
        known = json.loads(found.read_text())
        if known.get("device") == device and trace in known["max_rate"]:
            return float(known["max_rate"][trace])
    return maximum(TRAFFIC[trace], device, SEARCH)
