"""The worker's loop: take a plan, iterate, report, return.

`handle` takes what the router says, `step` runs one iteration; one thread calls both, so everything a message changes
it changes between two iterations. Does not know sockets, threads, text or tensors: sessions and the runner are given.
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb

from . import reports
from .admission import admit, hold
from .kv_pool import KvPool
from .layout import layout_of
from .owner import Owner, Session
from .plans import Plan, Refusal, read_plan
from .rows import Batch, Chunk, Drawn, Row, RowKey

log = logging.getLogger(__name__)

LEASE_US = 10_000_000
# How seldom tokens may be told while nothing else is to be done: a reader sees a text move no more often.
TOLD_US = 33_000


class Runner(Protocol):
    """The model. One call is one forward pass over all chunks; returns what each chunk that draws has drawn, in
    order.

    A runner may also have `burst(chunks, most, interrupt)`, for chunks of one token each that all draw: up to `most` passes,
    each fed with what the last one drew, with a list of tokens of each. It ends early, but not before the first pass, when a
    message came (`interrupt`), or when a row drew one of its stops; a device that hears of a draw later may go on, and what a
    row drew behind its end counts for nothing. All its rows are `plain`.
    """

    def run(self, chunks: Sequence[Chunk]) -> list[Drawn]: ...


class Interrupt:
    """Whether somebody wants the engine's ear. Any thread may set it; `at` is where native code reads it."""

    def __init__(self) -> None:
        self._word = ctypes.c_int32(0)
        self.at = ctypes.addressof(self._word)

    def set(self) -> None:
        self._word.value = 1

    def clear(self) -> None:
        self._word.value = 0

    def __bool__(self) -> bool:
        return self._word.value != 0


Burst = Callable[[Sequence[Chunk], int, Interrupt], Sequence[Sequence[int]]]


class Engine:
    def __init__(
        self, runner: Runner, pool: KvPool, info: common.WorkerInfo, clock: Callable[[], int], lease_us: int = LEASE_US
    ) -> None:
        self.runner, self.pool, self.info = runner, pool, info
        self.layout = layout_of(info, pool)
        self.clock, self.lease_us = clock, lease_us  # microseconds, monotonic
        self.owner = Owner(info.worker_epoch)
        self.lease_ends_us: int | None = None
        self.rows: dict[RowKey, Row] = {}  # all that did not finish, running or held
        self.batch: Batch | None = None
        self.base: Batch | None = None  # the last that ended
        self.ended: set[RowKey] = set()  # rows that ended since the last start: a plan may name them still
        self.standing: Plan | None = None
        self.iterations = 0
        self.interrupt = Interrupt()
        # A padded batch computes rows that have ended, too.
        paged = info.cost_shape != common.COST_SHAPE_PADDED
        self.burst: Burst | None = getattr(runner, "burst", None) if paged else None
        self.step_us = TOLD_US  # of the batch's last decode iteration; before its first nobody knows
        self.batch_ended_us: int | None = None
        self.device_idle_since_us: int | None = None

    # ---------------------------------------------------------------- one iteration

    @property
    def ready(self) -> bool:
        return self.batch is not None and self.owner.listens

    def step(self) -> None:
        """One iteration of the running batch, or several in one go where nothing can happen between them, and the batch's
        end if this was the last.
        """
        batch = self.batch
        assert batch is not None
        began_us = self.clock()
        if batch.iterations == 0 and self.device_idle_since_us is not None:
            batch.idle_us = began_us - self.device_idle_since_us
        prefills = any(row.wants_prefill for row in batch.live)
        most = 1 if prefills else self._most(batch)
        try:
            chunks = self.layout.chunks(batch, self.rows.values(), most)
            batch.peak_blocks = max(batch.peak_blocks, self.pool.running)
            if self.burst and most > 1:
                passes = self.burst(chunks, most, self.interrupt)
                if len(passes) > most:
                    raise RuntimeError("the runner made more passes than asked")
                told = self._follow(batch, chunks, passes)
                count = len(passes)
            else:
                told = self._advance(batch, chunks, self.runner.run(chunks))
                count = 1
        except Exception as error:
            log.exception("batch failed: %s", batch.number)
            self._fail(batch, error)
            return
        batch.iterations += count
        self.iterations += count
        self.device_idle_since_us = self.clock()
        took_us = self.device_idle_since_us - began_us
        if prefills:
            batch.prefill_us += took_us
        else:
            batch.decode_us += took_us
            self.step_us = took_us // count
        self._send_step(batch, told)
        self._end_if_due()

    def _most(self, batch: Batch) -> int:
        """Iterations that may pass before anybody is told: no row can reach its limit before the last of them."""
        if self.burst is None or 2 * self.step_us > TOLD_US:
            return 1
        left = batch.steps if batch.cut_at is None else min(batch.steps, batch.cut_at)
        most = min(left - batch.iterations, TOLD_US // max(1, self.step_us))
        if most < 2 or not all(row.plain for row in batch.live):
            return 1
        return self.layout.ahead(batch, min(most, min(row.max_tokens - row.output_len for row in batch.live)))

    def _advance(self, batch: Batch, chunks: Sequence[Chunk], drawn: Sequence[Drawn]) -> list[pb.RowTokens]:
        """Writes down what the pass computed and drew; rows that ended leave."""
        if len(drawn) != sum(chunk.draws for chunk in chunks):
            raise RuntimeError("the runner drew another number of tokens than asked")
        rest = iter(drawn)
        told = []
        for row, _, size, draws in chunks:
            if row.finish:  # it ended before, and its place was computed for nobody
                continue
            row.settle(self.pool)
            row.computed += size
            row.ran += size
            if not draws:
                continue
            one = next(rest)
            index = row.output_len
            row.wants_prefill = False
            row.tokens[row.known] = one.token
            row.known += 1
            row.emitted += 1
            if one.token in row.stops and index >= row.min_tokens:
                self._finish(row, common.FINISH_REASON_STOP)
            elif row.output_len == row.max_tokens:
                self._finish(row, common.FINISH_REASON_LENGTH)
            told.append(reports.row_tokens(row, one))
        batch.live = [row for row in batch.live if not row.finish]
        return told

    def _follow(self, batch: Batch, chunks: Sequence[Chunk], passes: Sequence[Sequence[int]]) -> list[pb.RowTokens]:
        """Writes down a burst: of every chunk one token in each pass."""
        if not passes or any(len(drawn) != len(chunks) for drawn in passes):
            raise RuntimeError("the runner drew another number of tokens than asked")
        told = []
        for chunk, drawn in zip(chunks, zip(*passes, strict=True), strict=True):
            row, first = chunk.row, chunk.row.output_len
            row.settle(self.pool)
            stop = next((i for i, token in enumerate(drawn) if token in row.stops), None)
            if stop is not None:
                drawn = drawn[: stop + 1]
            count = len(drawn)
            row.tokens[row.known : row.known + count] = drawn
            row.known += count
            row.emitted += count
            row.computed += count
            row.ran += count
            # What became full on the way is named now: there is no next iteration that would, if the row ends.
            row.grow(self.pool, row.computed)
            row.settle(self.pool)
            if stop is not None:
                self._finish(row, common.FINISH_REASON_STOP)
            elif row.output_len == row.max_tokens:
                self._finish(row, common.FINISH_REASON_LENGTH)
            told.append(reports.row_burst(row, first, drawn))
        batch.live = [row for row in batch.live if not row.finish]
        return told

    def _finish(self, row: Row, reason: common.FinishReason) -> None:
        row.finish = reason
        row.drop_kv(self.pool)
        del self.rows[row.key]
        self.ended.add(row.key)

    def _fail(self, batch: Batch, error: Exception) -> None:
        """The pass failed: its rows end, and nothing it should have computed keeps a name."""
        ended, batch.live = batch.live, []
        for row in ended:
            if not row.finish:
                self._finish(row, common.FINISH_REASON_ERROR)
            row.finish = common.FINISH_REASON_ERROR  # what it drew nobody was told
        self.layout.forget()
        batch.iterations += 1
        self.device_idle_since_us = self.clock()
        self._send_step(batch, [reports.row_tokens(row, None) for row in ended])
        self._end(batch, pb.SliceReport.END_ERROR, f"{type(error).__name__}: {error}"[:500])

    def _send_step(self, batch: Batch, told: list[pb.RowTokens]) -> None:
        self._send_deltas()
        told += [reports.row_tokens(row, None) for row in batch.dropped]
        batch.dropped = []
        if told:
            self.owner.send(step=pb.Step(batch=batch.number, step=batch.iterations, rows=told))

    # ---------------------------------------------------------------- from batch to batch

    def _end_if_due(self) -> None:
        batch = self.batch
        if batch is None:
            return
        if not batch.live:
            self._end(batch, pb.SliceReport.END_ALL_DONE)
        elif batch.iterations >= batch.steps:
            self._end(batch, pb.SliceReport.END_STEPS)
        elif batch.cut_at is not None and batch.iterations >= batch.cut_at:
            self._end(batch, pb.SliceReport.END_CUT)
        elif batch.iterations and self.owner.full:
            self._end(batch, pb.SliceReport.END_BACKPRESSURE)

    def _end(self, batch: Batch, end: pb.SliceReport.End, error: str = "") -> None:
        """The batch is over. The standing plan starts before the report goes out, which names it."""
        self.batch, self.base = None, batch
        self.batch_ended_us = self.clock()
        self.layout.end(batch.live)
        report = reports.slice_report(batch, end, error)
        plan, self.standing = self.standing, None
        if plan is None:
            hold(batch.live, self.pool)
        else:
            # A refusal goes before the report: the router would take a plan it sent for one that starts.
            self._start(plan)
        self._send_deltas()
        report.next_batch = self.batch.number if self.batch else 0
        self.owner.send(slice_report=report)
        self._send_load()
        # A batch without rows does not run.
        self._end_if_due()

    def _start(self, plan: Plan) -> None:
        """The plan's batch runs from now on, or the plan is refused and nothing runs."""
        base = self.base.rows if self.base else []
        try:
            rows = admit(plan, base, self.rows, self.ended, self.pool, self.layout, self.info.max_rows)
        except Refusal as refusal:
            self.refuse(plan.number, refusal)
            return
        self.ended.clear()
        self.rows.update((row.key, row) for row in plan.add)
        for row in rows:
            row.start()
        for key, rank in plan.hold_ranks.items():
            if key in self.rows:
                self.rows[key].hold_rank = rank
        waiting_since_us = max(plan.arrived_us, self.batch_ended_us or 0)
        self.step_us = TOLD_US
        self.batch = Batch(plan.number, rows, plan.steps, list(rows), queue_us=self.clock() - waiting_since_us)

    # ---------------------------------------------------------------- what the router says

    def handle(self, session: Session, message: pb.RouterMessage) -> None:
        """Takes one message. Nothing in it can end the worker."""
        body = message.WhichOneof("body")
        if session is not self.owner.session:
            if body == "hello":
                self._hello(session, message.hello)
            else:
                self._turn_away(session, pb.Refused.REASON_INVALID, "the first message is no hello")
        elif body == "plan":
            self._take_plan(message.plan)
        elif body == "cut":
            self._cut(message.cut)
        elif body == "drop":
            self._drop([RowKey.of(row) for row in message.drop.rows])
        elif body == "release_kv":
            self._release_kv([RowKey.of(row) for row in message.release_kv.rows])
        elif body == "resync":
            self._send_snapshot()
        elif body == "ping":
            self.owner.send(pong=pb.Pong(nonce=message.ping.nonce))
        elif body == "hello":
            self.refuse(0, Refusal(pb.Refused.REASON_INVALID, "a second hello"))
        # A body from a later minor version is none of ours.
        self._end_if_due()

    def _hello(self, session: Session, hello: pb.Hello) -> None:
        if hello.owner_epoch <= self.owner.epoch:
            self._turn_away(session, pb.Refused.REASON_NOT_OWNER, f"owner_epoch: {self.owner.epoch} owns this worker")
            return
        self.say_goodbye("another owner took the worker")
        self._drop_all()
        self.owner.enter(session, hello.owner_epoch)
        self._send_snapshot()

    def _turn_away(self, session: Session, reason: pb.Refused.Reason, detail: str) -> None:
        self.owner.turn_away(session, refused=reports.refused(0, Refusal(reason, detail), self.pool))

    def _take_plan(self, message: pb.Plan) -> None:
        try:
            self._check_base(message)
            plan = read_plan(message, self.info, self.clock())
        except Refusal as refusal:
            self.refuse(message.plan_no, refusal)
            return
        if self.batch is None:
            self._start(plan)
        else:
            self.standing = plan

    def _check_base(self, plan: pb.Plan) -> None:
        last = self.batch or self.base
        number = last.number if last else 0
        newest = max(number, self.standing.number if self.standing else 0)
        if plan.base_batch != number or plan.plan_no <= newest:
            raise Refusal(pb.Refused.REASON_STALE, f"base_batch: {number} is the last, plan_no: {newest}")

    def _cut(self, cut: pb.Cut) -> None:
        batch = self.batch
        if batch is not None and batch.number == cut.batch:
            at = max(batch.iterations, cut.after_step)
            batch.cut_at = at if batch.cut_at is None else min(at, batch.cut_at)

    def _drop(self, keys: Sequence[RowKey]) -> None:
        if self.standing:
            self.standing.forget(frozenset(keys))
        for key in keys:
            row = self.rows.get(key)
            if row is None:
                continue
            self._finish(row, common.FINISH_REASON_CANCELLED)
            if self.batch and row in self.batch.live:
                self.batch.live.remove(row)
                self.batch.dropped.append(row)

    def _release_kv(self, keys: Sequence[RowKey]) -> None:
        running = set(self.batch.live) if self.batch else set()
        for key in keys:
            row = self.rows.get(key)
            if row is not None and row not in running:
                row.drop_kv(self.pool)

    # ---------------------------------------------------------------- the session's end

    def closed(self, session: Session) -> None:
        """The stream is gone. The rows stay for the lease; nobody is left to be told."""
        if session is not self.owner.session:
            return
        self.owner.leave()
        if self.batch is not None:
            self.layout.end(self.batch.live)
        hold(self.rows.values(), self.pool)
        self.batch = self.standing = None
        self.lease_ends_us = self.clock() + self.lease_us

    def patience_s(self) -> float | None:
        """How long the engine's thread may wait for a message; None: for ever."""
        if self.lease_ends_us is None:
            return None
        return max(0.0, (self.lease_ends_us - self.clock()) / 1e6)

    def tick(self) -> None:
        if self.lease_ends_us is not None and self.clock() >= self.lease_ends_us:
            log.info("the lease ended, rows dropped: %s", len(self.rows))
            self._drop_all()

    def say_goodbye(self, reason: str) -> None:
        """Ends the owner's session, between two iterations."""
        self.owner.send(goodbye=pb.Goodbye(reason=reason))
        self.owner.leave()
        self.batch = self.standing = None

    def _drop_all(self) -> None:
        for row in list(self.rows.values()):
            self._finish(row, common.FINISH_REASON_CANCELLED)
        self.ended.clear()
        self.batch = self.base = self.standing = None
        self.lease_ends_us = self.batch_ended_us = self.device_idle_since_us = None

    # ---------------------------------------------------------------- what the worker says

    def _send_snapshot(self) -> None:
        self.pool.take_deltas()  # the snapshot says it all
        for snapshot in reports.snapshots(self.pool.names()):
            self.owner.send(snapshot=snapshot)

    def _send_deltas(self) -> None:
        for delta in reports.deltas(*self.pool.take_deltas()):
            self.owner.send(kv_delta=delta)

    def _send_load(self) -> None:
        running = len(self.batch.live) if self.batch else 0
        self.owner.send(load=reports.load(running, self.rows.values(), self.pool, self.iterations))

    def refuse(self, plan_no: int, refusal: Refusal) -> None:
        self.owner.send(refused=reports.refused(plan_no, refusal, self.pool))
