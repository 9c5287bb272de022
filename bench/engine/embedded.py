"""Ours in one process: the core's scheduler in front of one engine, without a server, as the rivals are measured.

The scheduler is told what the engine's session says and the engine gets what the scheduler decides, between two
iterations; a clock says when requests arrive. Everything outside the runner's calls is host time, the scheduler's and this
translation's included.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from turns import THREADS, WHOLE, Play, Played, answer, check
from workload import Request, refreshed

NAME = "w"


def arrivals(count: int, rate: float | None, seed: int) -> list[float]:
    """Seconds from the turn's start; all at once without a rate."""
    if rate is None:
        return [0.0] * count
    draw, at = random.Random(seed), 0.0
    return [at := at + draw.expovariate(rate) for _ in range(count)]


def start(folder: str, dtype: str, flags: Sequence[str] = ()) -> tuple[Play, dict[str, Any]]:
    importing = time.perf_counter()
    import torch
    import transformers
    from scls_worker import calibrate, options
    from scls_worker.folder import check_folder

    # What a worker's start imports before it builds anything.
    from scls_worker.model import build_model

    began = time.perf_counter()
    given = options.parser().parse_args(
        ["--model", folder, "--dtype", dtype, "--threads", str(THREADS), "--served-name", NAME, *flags]
    )
    served = build_model(given, check_folder(given.model))
    calibrate.at_start(served.runner, served.info)
    play = Drivers(served).play
    one = play(count=1, turn=-1)
    cold = time.perf_counter() - began - (one.ended[0] - one.first[0])
    about = {
        "version": f"scls_worker, torch {torch.__version__}, transformers {transformers.__version__}",
        "imports_s": began - importing,
        "first_token_s": cold,
    }
    return play, about


class Drivers:
    """A scheduler and an engine for each turn, on one runner: nothing is known of an earlier turn but the model's speed."""

    def __init__(self, served: Any) -> None:
        self.served = served

    def play(
        self,
        count: int,
        turn: int,
        scheduler: str = "slice",
        slice_len: int | None = None,
        rows: int | None = None,
        rate: float | None = None,
    ) -> Played:
        work = refreshed(count, turn, self.served.info.vocab_size)
        driver = Driver(self.served, scheduler, slice_len, rows)
        return driver.run(work, arrivals(count, rate, turn))


class Runner:
    """The runner, and the time of its calls."""

    def __init__(self, runner: Any) -> None:
        self.seconds = 0.0
        self.run = self.timed(runner.run)
        self.burst = self.timed(runner.burst) if runner.burst else None

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - began

        return run


class Session:
    """What the engine says, until it is read."""

    full = False

    def __init__(self) -> None:
        self.said: list[Any] = []

    def send(self, message: Any) -> None:
        self.said.append(message)

    def close(self) -> None:
        pass


class Driver:
    def __init__(self, served: Any, mode: str, slice_len: int | None, rows: int | None) -> None:
        from scls_router import Scheduler
        from scls_router.proto import worker_pb2 as pb
        from scls_worker.engine import Engine
        from scls_worker.kv_pool import KvPool

        info = type(served.info)()
        info.CopyFrom(served.info)
        info.max_rows = rows or info.max_rows
        self.began = time.perf_counter()
        self.runner, self.session = Runner(served.runner), Session()
        clock = lambda: time.monotonic_ns() // 1000  # noqa: E731
        self.engine = Engine(self.runner, KvPool(info.blocks, info.block_size), info, clock)
        self.scheduler = Scheduler(
            "product", mode, block_size=info.block_size, vocab=info.vocab_size, slice_len=slice_len, max_rows=1 << 16
        )
        joined = self.scheduler.join(
            NAME,
            blocks=info.blocks,
            max_rows=info.max_rows,
            max_context=info.max_context,
            chunk_tokens=info.chunk_tokens,
            cost_model=cost_of(info),
            now=self.now(),
        )
        self.first: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.drawn: dict[int, int] = {}
        self.starts: list[float] = []  # exposed, of slices that began while rows were there
        self.slices = 0
        self.busy_rows = False
        self.cached = 0
        self.carry_out(joined)
        self.say(hello=pb.Hello(owner_epoch=1))
        self.hear()

    def now(self) -> float:
        return time.perf_counter() - self.began

    def run(self, work: Sequence[Request], times: Sequence[float]) -> Played:
        waiting = sorted(zip(times, range(len(work)), strict=True), reverse=True)
        spells = 0.0  # in which rows were there
        runs_before = self.runner.seconds
        began = self.now()
        # Requests come from elsewhere, and whoever brings one interrupts a burst.
        threading.Thread(target=self.ring, args=([began + at for at in sorted(times)],), daemon=True).start()
        while waiting or self.scheduler.rows:
            turned = self.now()
            self.engine.interrupt.clear()
            while waiting and began + waiting[-1][0] <= self.now():
                _, at = waiting.pop()
                one = work[at]
                self.carry_out(self.scheduler.arrive(at, one.prompt, max_tokens=one.output, now=self.now()))
            if not self.scheduler.rows:
                time.sleep(max(0.0, began + waiting[-1][0] - self.now()))
                continue
            if self.engine.ready:
                self.engine.step()
            self.hear()
            spells += self.now() - turned
        seconds = self.now() - began
        order = range(len(work))
        arrived = [began + at for at in times]
        host = spells - (self.runner.seconds - runs_before)
        return Played(
            seconds,
            check(work, [self.drawn[at] for at in order]),
            [self.ended[at] - arrived[at] for at in order],
            [self.first[at] - arrived[at] for at in order],
            {
                "host_s": host,
                "slices": self.slices,
                "starts_s": self.starts,
                "cached": self.cached,
                "forecasts": [
                    [record.outcome.expected, record.outcome.time, record.outcome.end in WHOLE]
                    for record in self.scheduler.batches()
                    if record.outcome and record.outcome.steps
                ],
            },
        )

    def ring(self, times: Sequence[float]) -> None:
        for at in times:
            time.sleep(max(0.0, at - self.now()))
            self.engine.interrupt.set()

    # ---------------------------------------------------------------- engine to scheduler

    def hear(self) -> None:
        """Until neither has anything to say."""
        while self.session.said:
            said, self.session.said = self.session.said, []
            for message in said:
                body = message.WhichOneof("body")
                if body in ("load", "pong"):
                    continue
                self.carry_out(getattr(self, f"hear_{body}")(getattr(message, body), self.now()))

    def hear_snapshot(self, snapshot: Any, now: float) -> list[Any]:
        return self.scheduler.snapshot(NAME, hashes(snapshot.hashes_le_u64), last=snapshot.last, now=now)

    def hear_kv_delta(self, delta: Any, now: float) -> list[Any]:
        removed, stored = hashes(delta.removed_le_u64), hashes(delta.stored_le_u64)
        return self.scheduler.kv_delta(NAME, removed=removed, stored=stored, now=now)

    def hear_step(self, step: Any, now: float) -> list[Any]:
        from scls_router.scheduling import RowTokens

        rows = [
            RowTokens(key(row.row), row.first_index, tuple(row.ids), FINISHES[row.finish], row.cached_tokens)
            for row in step.rows
        ]
        return self.scheduler.steps(NAME, step.batch, rows, now=now)

    def hear_slice_report(self, report: Any, now: float) -> list[Any]:
        from scls_router.scheduling import RowReport, SliceReport

        rows = tuple(
            RowReport(
                key(row.row), row.computed, row.emitted, row.cached, FINISHES[row.finish], row.kv == 1, row.prefill_left
            )
            for row in report.rows
        )
        if self.busy_rows:
            self.starts.append(report.idle_us / 1e6)
        self.slices += 1
        actions = self.scheduler.slice_reported(
            NAME,
            SliceReport(
                report.batch,
                ENDS[report.end],
                report.steps,
                rows,
                report.next_batch or None,
                report.prefill_us / 1e6,
                report.decode_us / 1e6,
                report.peak_blocks,
                report.idle_us / 1e6,
            ),
            now=now,
        )
        # Whether the next start keeps anybody waiting.
        self.busy_rows = self.scheduler.rows > 0
        return actions

    def hear_refused(self, refused: Any, now: float) -> list[Any]:
        if refused.reason != STALE:
            raise RuntimeError(f"the engine refused a plan: {refused}")
        return self.scheduler.refused(NAME, refused.plan_no, "stale", now=now)

    # ---------------------------------------------------------------- scheduler to engine

    def carry_out(self, actions: Sequence[Any]) -> None:
        from scls_router import scheduling
        from scls_router.proto import worker_pb2 as pb

        for action in actions:
            match action:
                case scheduling.Plan():
                    self.say(plan=plan_of(action))
                case scheduling.Cut(batch=batch):
                    self.say(cut=pb.Cut(batch=batch))
                case scheduling.Drop(rows=rows):
                    self.say(drop=pb.Drop(rows=[row_id(row) for row in rows]))
                case scheduling.ReleaseKv(rows=rows):
                    self.say(release_kv=pb.ReleaseKv(rows=[row_id(row) for row in rows]))
                case scheduling.Tokens(row=row):
                    self.first.setdefault(row.request, self.now())
                case scheduling.Finish(row=row, reason=reason, emitted=emitted, cached=cached):
                    if reason != "length":
                        raise RuntimeError(f"a row ended by {reason}")
                    self.ended[row.request], self.drawn[row.request] = self.now(), emitted
                    self.cached += cached
                case scheduling.Placed() | scheduling.WakeAt():
                    pass
                case other:
                    raise RuntimeError(f"unexpected: {other}")

    def say(self, **body: Any) -> None:
        from scls_router.proto import worker_pb2 as pb

        self.engine.handle(self.session, pb.RouterMessage(**body))


# Its base had ended when the plan came: the scheduler sends another.
STALE = 1
FINISHES = {0: None, 1: "stop", 2: "length", 3: "cancelled", 4: "error"}
ENDS = {1: "steps", 2: "all_done", 3: "cut", 4: "backpressure", 5: "error"}


def key(row: Any) -> Any:
    from scls_router.scheduling import RowKey

    return RowKey(row.request, row.choice, row.attempt)


def row_id(row: Any) -> Any:
    from scls_router.proto import common_pb2 as common

    return common.RowId(request=row.request, choice=row.choice, attempt=row.attempt)


def hashes(packed: bytes) -> list[int]:
    import numpy as np

    made: list[int] = np.frombuffer(packed, dtype="<u8").tolist()
    return made


def cost_of(info: Any) -> Any:
    from scls_router import CostModel

    if info.cost_model.WhichOneof("form") != "paged":
        return None
    of = info.cost_model.paged
    return CostModel.paged(
        prefill_constant=of.prefill_constant_s,
        prefill_per_token=of.prefill_per_token_s,
        prefill_per_pair=of.prefill_per_pair_s,
        step_constant=of.step_constant_s,
        step_per_row=of.step_per_row_s,
        step_per_context=of.step_per_context_token_s,
    )


def packed(ids: Sequence[int]) -> Any:
    import numpy as np
    from scls_router.proto import common_pb2 as common

    return common.TokenIds(le_u32=np.array(ids, dtype="<u4").tobytes())


def plan_of(plan: Any) -> Any:
    from scls_router.proto import common_pb2 as common
    from scls_router.proto import worker_pb2 as pb

    return pb.Plan(
        plan_no=plan.no,
        base_batch=plan.base,
        keep=pb.Plan.KEEP_SURVIVORS if plan.keep is None else pb.Plan.KEEP_LIST,
        keep_rows=[row_id(row) for row in plan.keep or ()],
        leave=[row_id(row) for row in plan.leave],
        add=[
            pb.RowStart(
                row=row_id(start.key),
                slice_no=start.slice_no,
                model=NAME,
                hash_root=start.hash_root,
                prompt_ids=packed(start.prompt),
                output_ids=packed(start.output),
                limits=common.Limits(max_tokens=start.max_tokens, ignore_eos=True),
                hold_rank=start.hold_rank,
                prefill_budget=start.prefill_budget,
            )
            for start in plan.add
        ],
        steps=plan.steps,
        ceiling_blocks=plan.ceiling,
        hold_ranks=[pb.HoldRank(row=row_id(row), rank=rank) for row, rank in plan.ranks],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    args, flags = parser.parse_known_args()
    answer(lambda: start(args.folder, args.dtype, flags))
