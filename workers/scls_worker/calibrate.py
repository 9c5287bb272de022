"""Measures what iterations cost here: a grid of them through the engine's own loop, so a time is what a slice report would
have said. The model is fitted by scls_router. Knows rows and blocks, no tensors.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from scls_router.proto import common_pb2 as common

from . import cost
from .engine import TOLD_US, Engine, Runner
from .errors import StartupError
from .kv_pool import KvPool
from .rows import Batch, Row, RowKey

log = logging.getLogger(__name__)


class Effort(NamedTuple):
    """How long to measure, and what. A round takes every point once."""

    seconds: float
    rounds: int
    rows: Sequence[int]
    sizes: Sequence[int]  # tokens of contexts, chunks and prompts
    most: int  # tokens that one point computes


# A worker starts with it: enough for the first plans, which the router corrects by what it sees.
START = Effort(1.5, 7, (1, 4, 16), (16, 64, 256), 512)
COMMAND = Effort(12.0, 15, (1, 4, 16, 64), (16, 64, 256, 1024, 4096), 1 << 14)

# The router corrects a measured model by a factor of two at most: a fit that misses what it was made from by more is none.
# On a machine that is busy (the other workers of an `up` load their models) the next look may see better.
TRUSTED = 0.5
LOOKS = 3
# Most tokens that a row draws in one look: a burst's steps are cheaper than one alone, and bursts are what will run.
DRAWS = 4


class Point(NamedTuple):
    """One iteration, or a burst of some: `rows` rows of `tokens` tokens each draw one more; beside them a row has a chunk of
    `chunk` tokens computed, behind `before`. Padded: a chunk is each row's whole prompt.
    """

    rows: int
    tokens: int
    chunk: int = 0
    before: int = 0

    @property
    def work(self) -> int:
        return self.chunk * max(1, self.rows) + self.rows


def grid(info: common.WorkerInfo, effort: Effort) -> list[Point]:
    """Points that fit this worker's memory, context and rows, small ones first."""
    padded = info.cost_shape == common.COST_SHAPE_PADDED
    sizes = [size for size in effort.sizes if size + DRAWS <= info.max_context]
    counts = sorted({min(rows, info.max_rows) for rows in effort.rows})
    points = [Point(rows, tokens) for tokens in sizes for rows in counts]
    if padded:
        points += [Point(rows, size, size) for size in sizes for rows in counts]
    else:
        chunks = sorted({min(size, info.chunk_tokens) for size in sizes})
        points += [Point(0, 0, chunk, before) for chunk in chunks for before in (0, *sizes[2:])]
        # And beside rows that decode, as newcomers come.
        points += [Point(rows, sizes[-2], chunk) for rows in counts[1:2] for chunk in chunks[:2] if len(sizes) > 1]
    fits = [
        point
        for point in dict.fromkeys(points)
        if point.work <= effort.most
        and point.chunk + point.before + DRAWS <= info.max_context
        and (point.rows + (not padded and point.chunk > 0)) <= info.max_rows
        and _blocks(point, info.block_size, padded) <= info.blocks
    ]
    return sorted(fits, key=lambda point: (point.work, point.tokens + point.before))


def _blocks(point: Point, size: int, padded: bool) -> int:
    if padded:
        return point.rows * -(-point.tokens // size)
    beside = -(-(point.before + point.chunk + DRAWS) // size) if point.chunk else 0
    return point.rows * -(-(point.tokens + DRAWS) // size) + beside


class Bench:
    """An engine of its own, on the runner that will serve."""

    def __init__(
        self,
        runner: Runner,
        info: common.WorkerInfo,
        clock: Callable[[], int] = lambda: time.perf_counter_ns() // 1000,
    ) -> None:
        self.info, self.clock = info, clock  # microseconds
        self.padded = info.cost_shape == common.COST_SHAPE_PADDED
        self.engine = Engine(runner, KvPool(info.blocks, info.block_size), info, clock)
        self.steps_us: dict[Point, int] = {}

    def take(self, point: Point) -> float | None:
        """Seconds of one such iteration; None where it does not run here. The first look is at one alone; the next are at as
        many in one go as the engine makes of such.
        """
        engine, pool = self.engine, self.engine.pool
        engine.step_us = max(self.steps_us.get(point, TOLD_US), TOLD_US // DRAWS)
        if self.padded:
            rows = [self._row(i, point.tokens, 0 if point.chunk else None) for i in range(point.rows)]
        else:
            rows = [self._row(i, point.tokens) for i in range(point.rows)]
            if point.chunk:
                rows.append(self._row(point.rows, point.before + point.chunk, point.before))
        batch = Batch(1, rows, 1 << 31, list(rows))
        pool.reserve(sum(row.promised for row in rows))
        for row in rows:
            if not row.wants_prefill:
                row.take_promised(pool)
            elif row.computed:
                row.grow(pool, row.computed)
        if self.padded and not point.chunk:
            batch.iterations, batch.rectangle = 1, list(rows)
        before = batch.iterations
        engine.rows.update((row.key, row) for row in rows)
        engine.batch = batch
        engine.step()
        failed = any(row.finish for row in rows)
        for row in rows:
            row.drop_kv(pool)
        engine.rows.clear()
        engine.batch = engine.base = None
        self.steps_us[point] = engine.step_us
        return None if failed else max(1, batch.prefill_us + batch.decode_us) / (batch.iterations - before) / 1e6

    def _row(self, number: int, tokens: int, prefilled: int | None = None) -> Row:
        """One that decodes, or one whose prefill has come to `prefilled` tokens."""
        # Any ids, but not all the same: a mixture of experts would send them to one.
        ids = (np.arange(tokens + DRAWS + 1, dtype=np.uint64) * 7919 + number * 104_729 + 3) % self.info.vocab_size
        return Row(
            RowKey(number, 0, 0),
            0,
            ids.astype(np.uint32),
            known=tokens,
            prompt_len=tokens,
            max_tokens=DRAWS + 1,
            computed=tokens - 1 if prefilled is None else prefilled,
            wants_prefill=prefilled is not None,
            nameable=False,
            promised=self.engine.pool.blocks_for(tokens if self.padded else tokens + DRAWS),
        )

    def sample(self, point: Point, seconds: float) -> cost.Sample:
        """As the core's cost model counts an iteration."""
        prefill = point.chunk * (point.rows if self.padded else 1)
        return {
            "rows": point.rows,
            "context": point.rows * point.tokens,
            "longest": max(point.tokens, point.before + point.chunk),
            "prefill": prefill,
            "pairs": prefill * point.before + prefill * (point.chunk + 1) // 2,
            "seconds": seconds,
        }


def measure(bench: Bench, points: Sequence[Point], effort: Effort) -> Iterator[list[cost.Sample]]:
    """After every round the samples so far: of each point the median. Ends with the time or the rounds, and a point that
    would take longer than is left is left out.
    """
    for chunked in (False, True):
        for point in [point for point in points if (point.chunk > 0) is chunked][:1]:
            bench.take(point)  # what is loaded and chosen at the first call is no iteration's time
    ends = bench.clock() + effort.seconds * 1e6
    taken: dict[Point, list[float]] = {point: [] for point in points}
    for _ in range(effort.rounds):
        # Microseconds a token of the last point with and without a chunk: the next has more, at no more each.
        pace = {True: 0.0, False: 0.0}
        for point, times in list(taken.items()):
            if bench.clock() + pace[point.chunk > 0] * point.work > ends:
                continue
            seconds = bench.take(point)
            if seconds is None:
                del taken[point]
                continue
            times.append(seconds)
            pace[point.chunk > 0] = seconds * 1e6 / point.work
        yield [bench.sample(point, median(times)) for point, times in taken.items() if times]
        if bench.clock() > ends:
            return


def fitted(
    bench: Bench, effort: Effort, models: cost.Models, told: Callable[[str], object] = lambda _: None
) -> tuple[cost.Model, list[cost.Sample]]:
    """Raises ValueError where there is too little to fit."""
    samples: list[cost.Sample] = []
    began = bench.clock()
    for done, samples in enumerate(measure(bench, grid(bench.info, effort), effort), 1):
        share = min(1.0, max(done / effort.rounds, (bench.clock() - began) / 1e6 / effort.seconds))
        told(f"calibrate {share:4.0%}: round {done}, {len(samples)} points")
    return models.fit(samples, layout=cost.layout_name(bench.info)), samples


def at_start(runner: Runner, info: common.WorkerInfo, models: Callable[[], cost.Models] = cost.models) -> None:
    """Announces what a short look says. A worker that cannot be measured serves all the same, and announces nothing."""
    began = time.perf_counter()
    try:
        bench = Bench(runner, info)
        for look in range(1, LOOKS + 1):
            try:
                model, samples = fitted(bench, START, models())
            except ValueError:  # a stall took the time of most points
                if look == LOOKS:
                    raise
                continue
            announced = cost.message(model.to_dict())
            if announced.p99_error <= TRUSTED:
                break
        else:
            raise ValueError(
                f"the fit misses by {announced.p99_error:.0%}, {LOOKS} times; --calibrate looks for longer"
            )
    except Exception as error:
        log.warning("not calibrated: %s: %s", type(error).__name__, error)
        return
    info.cost_model.CopyFrom(announced)
    log.info(
        "calibrated in %.1f s: %d points, mean error %.1f %%",
        time.perf_counter() - began,
        len(samples),
        100 * info.cost_model.mean_error,
    )


def command(
    path: Path,
    runner: Runner,
    info: common.WorkerInfo,
    told: Callable[[str], object],
    models: Callable[[], cost.Models] = cost.models,
) -> None:
    """Measures for longer, and writes the file that --cost-model takes."""
    if not path.absolute().parent.is_dir():
        raise StartupError(f"cannot write {path}: no such folder")
    told(f"calibrate   0%: {info.served_names[0]}, {cost.layout_name(info)}, {info.device}, {info.dtype}")
    try:
        model, samples = fitted(Bench(runner, info), COMMAND, models(), told)
    except ValueError as error:
        raise StartupError(f"cannot fit a cost model: {error}") from None
    cost.write(path, info, model, samples)
    form = model.to_dict()
    told(
        f"calibrate 100%: r2 {form['r2']:.3f}, mean error {form['mean_error']:.1%}, p99 {form['p99_error']:.1%}: {path}"
    )
