"""Simulated runs of whole fleets: real scheduling, modelled workers, virtual time.

`simulate` is `scls-router simulate` from Python: same names, same checks, same figures.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Real
from os import PathLike, fsdecode
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, final

from scls_router import _native

if TYPE_CHECKING:
    import polars

__all__ = ["Simulation", "simulate"]

_T = TypeVar("_T")
_Some: TypeAlias = _T | Sequence[_T]
_File: TypeAlias = str | PathLike[str]


@final
class Simulation:
    """What `simulate` gives: a line of figures for each run, what became of each request, and pictures.

    Attributes:
        runs: for each run its labels (``trace``, ``workers``, ``policy``, ``seed``, ...) and its figures, times in
            seconds. What a way to schedule does not have is None.
    """

    runs: list[dict[str, Any]]

    def __init__(self, native: _native._Runs) -> None:
        self._native = native
        self.runs = json.loads(native.json)

    def __len__(self) -> int:
        return len(self.runs)

    def __str__(self) -> str:
        """The table that the command line prints: a line for each combination, means over seeds."""
        return self._native.table

    def __repr__(self) -> str:
        return f"<Simulation of {len(self)} runs>"

    def _repr_html_(self) -> str:
        return self._native.page

    @cached_property
    def requests(self) -> dict[str, array[Any]]:
        """What became of each request of all runs, as columns of equal length: ``run`` (a place in ``runs``), ``request``
        (its place in the trace), ``worker``, ``arrived``, ``ttft``, ``tpot``, ``latency``, ``gap`` (the longest time
        between two tokens), ``input_tokens``, ``cached_tokens``, ``output_tokens``, ``slices`` (those it took; of
        iteration-level engines, how often it was preempted). Times are seconds, NaN where there is none: of a request
        that had not begun, or not ended, when the run was over. Those of the run's first part, which its figures leave
        out, are here too."""
        columns: dict[str, array[Any]] = {"run": array("I")}
        for run in range(len(self)):
            parts = self._native.columns(run)
            number = 0
            for name, (kind, values) in parts.items():
                column = columns.setdefault(name, array(kind))
                before = len(column)
                column.frombytes(values)
                number = len(column) - before
            columns["run"].extend([run] * number)
        return columns

    def to_polars(self, *, requests: bool = False) -> polars.DataFrame:
        """The runs as a polars data frame, a row each; with ``requests`` a row for each request of each run.

        Raises:
            ImportError: polars is not installed.
        """
        try:
            import polars
        except ImportError:
            raise ImportError("to_polars needs polars\npip install polars") from None
        if requests:
            types = {"I": polars.UInt32, "d": polars.Float64}
            columns = self.requests.items()
            return polars.DataFrame([polars.Series(name, values, types[values.typecode]) for name, values in columns])
        return polars.DataFrame(self.runs, infer_schema_length=None)

    def plot(self, path: _File | None = None) -> str:
        """All pictures on one page: distributions of TTFT, TPOT and latency, batch sizes and imbalance over time, hit ratio,
        throughput against rate, slices as lanes. A notebook shows the result itself.

        Args:
            path: where the page is written too, an HTML file that opens by itself.

        Returns:
            The page.
        """
        page = self._native.page
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page


def simulate(
    trace: _Some[_File] | None = None,
    *,
    synthetic: str | None = None,
    rate: float | None = None,
    seconds: float = 300.0,
    workers: _Some[int] = 8,
    cost_model: _Some[_File] = "7b-h20",
    scheduler: _Some[str] = "continuous",
    policy: _Some[str] = "product_anticipating",
    commit: _Some[Literal["prefixes", "load", "none"]] = "prefixes",
    guard: _Some[bool] = False,
    rate_scale: _Some[float] = 1.0,
    seeds: int = 1,
    sessions: Literal["closed", "open"] = "closed",
    window: tuple[float, float] | None = None,
    limit: int | None = None,
    until: float | None = None,
    delay_ms: _Some[float] = 0.0,
    host_ms: _Some[float] | None = None,
    start_ms: _Some[float] | None = None,
    noise: float = 0.0,
    bias: float = 0.0,
    slo: tuple[float, float] | None = None,
    jobs: int | None = None,
) -> Simulation:
    """Runs requests through modelled workers in virtual time. Where several values are given, all combinations are run.

    >>> runs = simulate(synthetic="sharegpt-like", rate=2, seconds=30, workers=[1, 2], cost_model="13b-a100").runs
    >>> [(run["workers"], run["unfinished"]) for run in runs]
    [(1, 0), (2, 0)]
    >>> runs[1]["latency_mean"] < runs[0]["latency_mean"]
    True

    Other threads run meanwhile, and Ctrl-C ends it. The same arguments give the same figures on any machine, but
    ``wall_s``.

    Args:
        trace: files of requests.
        synthetic: the name of generated requests instead: ``sharegpt-like``, ``long-prompts`` or ``agents``.
        rate: generated requests a second.
        seconds: of generated requests.
        workers: how many.
        cost_model: names of modelled devices, or files with their coefficients.
        scheduler: ``continuous``, ``slice``, ``ils``, ``scls``, ``sls``, ``so``, ``pm``, ``ab`` or ``lb``; after ``@`` its
            rows (continuous, sls) or its S (the others).
        policy: how a worker is chosen: ours or a rival's name, its weight after ``@``.
        commit: what a decision moves in the router.
        guard: the hotspot guard.
        rate_scale: times the trace's own rate.
        seeds: runs of each combination, with seeds 1 to this.
        sessions: whether a turn waits for the end of the one before it.
        window: only requests from so many seconds of the trace to so many.
        limit: most output tokens, which every request announces; None: the trace's longest answer.
        until: virtual seconds at which a run is over, whatever is left.
        delay_ms: how late what workers say reaches the router.
        host_ms: host time of an iteration that the device waits for; None: the device's own.
        start_ms: what a slice start exposes; None: the device's own.
        noise: sigma of the log-normal factor on the time of slices.
        bias: sigma of the log-normal factor by which each worker is always slower or faster; each draws its own, by the seed.
        slo: most seconds to the first token and a token after it; ``goodput`` counts the requests within both.
        jobs: runs at once; None: the cores of this machine.

    Raises:
        ValueError: a file, a name or a number is no good; the message says what to do.
        TypeError: an argument is none of what it may be.
        KeyboardInterrupt: Ctrl-C.
    """
    flags: list[str] = []

    def add(name: str, value: object) -> None:
        if value is not None:
            flags.append(f"--{name.replace('_', '-')}={_text(name, value)}")

    add("trace", trace)
    add("synthetic", synthetic)
    add("rate", rate)
    add("seconds", seconds)
    add("workers", workers)
    add("cost_model", cost_model)
    add("scheduler", scheduler)
    add("policy", policy)
    add("commit", commit)
    add("guard", guard)
    add("rate_scale", rate_scale)
    add("seeds", seeds)
    add("sessions", sessions)
    add("window", _pair("window", window))
    add("limit", limit)
    add("until", until)
    add("delay_ms", delay_ms)
    add("host_ms", host_ms)
    add("start_ms", start_ms)
    add("noise", noise)
    add("bias", bias)
    add("slo", _pair("slo", slo))
    add("jobs", jobs)
    return Simulation(_native._simulate(flags))


def _text(name: str, value: object) -> str:
    """As it is typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return value
    if isinstance(value, PathLike):
        return fsdecode(value)
    if isinstance(value, Real):
        return str(value)
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | Mapping):
        return ",".join(_text(name, one) for one in value)
    raise TypeError(f"{name} cannot be of type {type(value).__name__}")


def _pair(name: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == 2:
        return ":".join(_text(name, one) for one in value)
    raise TypeError(f"{name} is a pair of numbers: {value!r}")
