"""The worker's loop: take a plan, iterate, report, return.

`handle` takes what the router says, `step` runs one iteration; one thread calls both, so everything a message changes
it changes between two iterations. Does not know sockets, threads, text or tensors: sessions and the runner are given.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from . import reports
from .kv_pool import KvPool, Use
from .plans import Plan, Refusal, read_plan
from .proto import common_pb2 as common
from .proto import worker_pb2 as pb
from .rows import Batch, Chunk, Row, RowKey

log = logging.getLogger(__name__)

LEASE_US = 10_000_000


class Runner(Protocol):
    """The model. One call is one forward pass over all chunks; returns a token for each chunk that draws, in order."""

    def run(self, chunks: Sequence[Chunk]) -> list[int]: ...


class Session(Protocol):
    """One router's stream as the engine sees it."""

    def send(self, message: pb.WorkerMessage) -> None: ...

    def close(self) -> None:
        """Ends the stream after what was sent."""

    @property
    def full(self) -> bool:
        """So much is unsent that no slice should run."""


class Engine:
    def __init__(
        self, runner: Runner, pool: KvPool, info: common.WorkerInfo, clock: Callable[[], int], lease_us: int = LEASE_US
    ) -> None:
        self.runner, self.pool, self.info = runner, pool, info
        self.clock, self.lease_us = clock, lease_us  # microseconds, monotonic
        self.owner: Session | None = None
        self.owner_epoch = -1
        self.lease_ends_us: int | None = None
        self.state_seq = 0
        self.rows: dict[RowKey, Row] = {}  # all that did not finish, running or held
        self.batch: Batch | None = None
        self.base: Batch | None = None  # the last that ended
        self.standing: Plan | None = None
        self.iterations = 0
        self.batch_ended_us: int | None = None
        self.device_idle_since_us: int | None = None

    # ---------------------------------------------------------------- one iteration

    @property
    def ready(self) -> bool:
        return self.batch is not None and self.owner is not None and not self.owner.full

    def step(self) -> None:
        """One iteration of the running batch, and the batch's end if this was the last."""
        batch = self.batch
        assert batch is not None
        began_us = self.clock()
        if batch.iterations == 0 and self.device_idle_since_us is not None:
            batch.idle_us = began_us - self.device_idle_since_us
        fresh: list[int] = []
        prefills = any(row.wants_prefill for row in batch.live)
        try:
            chunks = self._plan_chunks(batch, fresh)
            batch.peak_blocks = max(batch.peak_blocks, self.pool.running)
            tokens = self.runner.run(chunks)
            if len(tokens) != sum(chunk.draws for chunk in chunks):
                raise RuntimeError("the runner drew another number of tokens than asked")
        except Exception as error:
            log.exception("batch failed: %s", batch.number)
            self._fail(batch, error, fresh)
            return
        drawn = self._advance(batch, chunks, tokens)
        batch.iterations += 1
        self.iterations += 1
        self.device_idle_since_us = self.clock()
        if prefills:
            batch.prefill_us += self.device_idle_since_us - began_us
        else:
            batch.decode_us += self.device_idle_since_us - began_us
        self._send_step(batch, drawn)
        self._end_if_due(batch)

    def _plan_chunks(self, batch: Batch, fresh: list[int]) -> list[Chunk]:
        """What each row computes now. Rows share the budget in order; a prefix is looked up when its row begins."""
        budget = self.info.chunk_tokens
        chunks = []
        for row in batch.live:
            size = 1
            if row.wants_prefill:
                if budget == 0:
                    continue
                if row.computed == 0:
                    row.look_up(self.pool)
                size = min(row.uncomputed, budget, row.prefill_budget or budget)
                budget -= size
            fresh += row.grow(self.pool, row.computed + size)
            chunks.append(Chunk(row, row.computed, size, draws=size == row.uncomputed))
        return chunks

    def _advance(self, batch: Batch, chunks: Sequence[Chunk], tokens: Iterable[int]) -> list[pb.RowTokens]:
        """Writes down what the pass computed and drew; rows that ended leave."""
        draws = iter(tokens)
        drawn = []
        for row, _, size, draw in chunks:
            row.settle(self.pool)
            row.computed += size
            row.ran += size
            if not draw:
                continue
            token = next(draws)
            index = row.output_len
            row.wants_prefill = False
            row.tokens[row.known] = token
            row.known += 1
            row.emitted += 1
            if token in row.stops and index >= row.min_tokens:
                self._finish(row, common.FINISH_REASON_STOP)
            elif row.output_len == row.max_tokens:
                self._finish(row, common.FINISH_REASON_LENGTH)
            drawn.append(reports.drawn(row, token))
        batch.live = [row for row in batch.live if not row.finish]
        return drawn

    def _finish(self, row: Row, reason: common.FinishReason) -> None:
        row.finish = reason
        row.drop_kv(self.pool)
        del self.rows[row.key]

    def _fail(self, batch: Batch, error: Exception, fresh: Sequence[int]) -> None:
        """The pass failed: its rows end, and nothing it should have computed keeps a name."""
        ended, batch.live = batch.live, []
        for row in ended:
            self._finish(row, common.FINISH_REASON_ERROR)
        self.pool.forget(fresh)
        batch.iterations += 1
        self.device_idle_since_us = self.clock()
        self._send_step(batch, [reports.drawn(row, None) for row in ended])
        self._end(batch, pb.SliceReport.END_ERROR, f"{type(error).__name__}: {error}"[:500])

    def _send_step(self, batch: Batch, drawn: list[pb.RowTokens]) -> None:
        self._send_deltas()
        drawn += [reports.drawn(row, None) for row in batch.dropped]
        batch.dropped = []
        if drawn:
            self._send(step=pb.Step(batch=batch.number, step=batch.iterations, rows=drawn))

    # ---------------------------------------------------------------- from batch to batch

    def _end_if_due(self, batch: Batch) -> None:
        if not batch.live:
            self._end(batch, pb.SliceReport.END_ALL_DONE)
        elif batch.iterations >= batch.steps:
            self._end(batch, pb.SliceReport.END_STEPS)
        elif batch.cut_at is not None and batch.iterations >= batch.cut_at:
            self._end(batch, pb.SliceReport.END_CUT)
        elif batch.iterations and self.owner is not None and self.owner.full:
            self._end(batch, pb.SliceReport.END_BACKPRESSURE)

    def _end(self, batch: Batch, end: pb.SliceReport.End, error: str = "") -> None:
        """The batch is over. The standing plan starts before the report goes out, which names it."""
        self.batch, self.base = None, batch
        self.batch_ended_us = self.clock()
        plan, self.standing = self.standing, None
        refusal = self._start(plan) if plan else None
        if plan is None:
            self._hold(batch.live)
        self._send_deltas()
        if plan and refusal:
            # Before the report: the router would take a plan it sent for one that starts.
            self.refuse(plan.number, refusal)
        self._send(slice_report=reports.slice_report(batch, end, self._running, error))
        self._send_load()
        self._end_if_empty()

    def _end_if_empty(self) -> None:
        if self.batch is not None and not self.batch.live:
            self._end(self.batch, pb.SliceReport.END_ALL_DONE)

    @property
    def _running(self) -> int:
        return self.batch.number if self.batch else 0

    def _start(self, plan: Plan) -> Refusal | None:
        """Forms the plan's batch, or changes nothing but who is held."""
        known = list(self.rows.values())
        for row in known:
            row.cancel(self.pool)
        try:
            kept = self._kept(plan)
            rows = kept + plan.add
            if len(rows) > self.info.max_rows:
                raise Refusal(pb.Refused.REASON_TOO_MANY_ROWS, f"max_rows: {self.info.max_rows}")
            members = set(kept)
            self._hold(row for row in known if row not in members)
            for row in kept:
                row.move(self.pool, Use.RUNNING)
            needs = self._reserve(plan, rows)
        except Refusal as refusal:
            self._hold(known)
            return refusal
        for row, need in zip(rows, needs, strict=True):
            row.promised = need
            row.start()
        self.rows.update((row.key, row) for row in plan.add)
        for key, rank in plan.hold_ranks.items():
            if key in self.rows:
                self.rows[key].hold_rank = rank
        now_us = self.clock()
        waiting_since_us = max(plan.arrived_us, self.batch_ended_us or 0)
        self.batch = Batch(plan.number, rows, plan.steps, list(rows), queue_us=now_us - waiting_since_us)
        return None

    def _kept(self, plan: Plan) -> list[Row]:
        base = self.base.rows if self.base else []
        if plan.keep == pb.Plan.KEEP_NONE:
            keys = []
        elif plan.keep == pb.Plan.KEEP_LIST:
            keys = plan.keep_rows
            finished = {row.key for row in base if row.finish}
            unknown = [key for key in keys if key not in self.rows and key not in finished]
            if unknown:
                raise Refusal(pb.Refused.REASON_UNKNOWN_ROW, "keep_rows", unknown)
        else:
            keys = [row.key for row in base]
        twice = [row.key for row in plan.add if row.key in self.rows]
        if twice:
            raise Refusal(pb.Refused.REASON_INVALID, "add: a row the worker knows", twice)
        return [self.rows[key] for key in keys if key in self.rows and key not in plan.leave]

    def _reserve(self, plan: Plan, rows: Sequence[Row]) -> list[int]:
        """Promises every row the blocks it can need in this batch, so that nothing runs short inside. Held rows outside
        the batch lose their KV only if that is enough.
        """
        ceilings = [self.pool.blocks_for(row.positions_after(plan.steps)) for row in rows]
        if plan.ceiling_blocks and sum(ceilings) > plan.ceiling_blocks:
            raise Refusal(pb.Refused.REASON_NO_MEMORY, f"ceiling_blocks: {sum(ceilings)} wanted")
        needs = [max(0, ceiling - len(row.blocks)) for ceiling, row in zip(ceilings, rows, strict=True)]
        need = sum(needs)
        if need > self.pool.available + self.pool.held:
            raise Refusal(pb.Refused.REASON_NO_MEMORY, f"blocks: {need} wanted")
        if need > self.pool.available:
            members = set(rows)
            outside = (row for row in self.rows.values() if row.blocks and row not in members)
            for row in sorted(outside, key=lambda row: plan.hold_ranks.get(row.key, row.hold_rank)):
                row.drop_kv(self.pool)
                if need <= self.pool.available:
                    break
        self.pool.reserve(need)
        return needs

    def _hold(self, rows: Iterable[Row]) -> None:
        for row in rows:
            row.cancel(self.pool)
            row.move(self.pool, Use.HELD)

    # ---------------------------------------------------------------- what the router says

    def handle(self, session: Session, message: pb.RouterMessage) -> None:
        """Takes one message. Nothing in it can end the worker."""
        body = message.WhichOneof("body")
        if session is not self.owner:
            if body == "hello":
                self._hello(session, message.hello)
            else:
                self._turn_away(session, pb.Refused.REASON_INVALID, "the first message is no hello")
        elif body == "plan":
            self._take_plan(message.plan)
        elif body == "cut":
            self._cut(message.cut)
        elif body == "drop":
            self._drop(frozenset(RowKey.of(row) for row in message.drop.rows))
        elif body == "release_kv":
            self._release_kv(frozenset(RowKey.of(row) for row in message.release_kv.rows))
        elif body == "resync":
            self._send_snapshot()
        elif body == "ping":
            self._send(pong=pb.Pong(nonce=message.ping.nonce))
        elif body == "hello":
            self.refuse(0, Refusal(pb.Refused.REASON_INVALID, "a second hello"))
        # A body from a later minor version is none of ours.

    def _hello(self, session: Session, hello: pb.Hello) -> None:
        if hello.owner_epoch <= self.owner_epoch:
            self._turn_away(session, pb.Refused.REASON_NOT_OWNER, f"owner_epoch: {self.owner_epoch} owns this worker")
            return
        if self.owner is not None:
            self.say_goodbye("another owner took the worker")
        self._drop_all()
        self.owner, self.owner_epoch, self.state_seq = session, hello.owner_epoch, 0
        self._send_snapshot()

    def _turn_away(self, session: Session, reason: pb.Refused.Reason, detail: str) -> None:
        refused = reports.refused(0, Refusal(reason, detail), self.pool)
        session.send(pb.WorkerMessage(worker_epoch=self.info.worker_epoch, state_seq=1, refused=refused))
        session.close()

    def _take_plan(self, message: pb.Plan) -> None:
        try:
            self._check_base(message)
            plan = read_plan(message, self.info, self.clock())
            if self.batch is not None:
                self.standing = plan
                return
            refusal = self._start(plan)
        except Refusal as answer:
            refusal = answer
        if refusal is not None:
            self.refuse(message.plan_no, refusal)
        self._end_if_empty()

    def _check_base(self, plan: pb.Plan) -> None:
        last = self.batch or self.base
        number = last.number if last else 0
        newest = max(number, self.standing.number if self.standing else 0)
        if plan.base_batch != number or plan.plan_no <= newest:
            raise Refusal(pb.Refused.REASON_STALE, f"base_batch: {number} is the last, plan_no: {newest}")

    def _cut(self, cut: pb.Cut) -> None:
        batch = self.batch
        if batch is None or batch.number != cut.batch:
            return
        at = max(batch.iterations, cut.after_step)
        batch.cut_at = at if batch.cut_at is None else min(at, batch.cut_at)
        self._end_if_due(batch)

    def _drop(self, keys: frozenset[RowKey]) -> None:
        if self.standing:
            self.standing.forget(keys)
        for key in keys:
            if key in self.rows:
                row = self.rows[key]
                self._finish(row, common.FINISH_REASON_CANCELLED)
                if self.batch and row in self.batch.live:
                    self.batch.live.remove(row)
                    self.batch.dropped.append(row)
        self._end_if_empty()

    def _release_kv(self, keys: frozenset[RowKey]) -> None:
        running = set(self.batch.live) if self.batch else set()
        for key in keys:
            row = self.rows.get(key)
            if row is not None and row not in running:
                row.drop_kv(self.pool)

    # ---------------------------------------------------------------- the session's end

    def closed(self, session: Session) -> None:
        """The stream is gone. The rows stay for the lease; nobody is left to be told."""
        if session is not self.owner:
            return
        self.owner = None
        self._hold(self.rows.values())
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
        if self.owner is not None:
            self._send(goodbye=pb.Goodbye(reason=reason))
            self.owner.close()
        self.owner = self.batch = self.standing = None

    def _drop_all(self) -> None:
        for row in list(self.rows.values()):
            self._finish(row, common.FINISH_REASON_CANCELLED)
        self.batch = self.base = self.standing = None
        self.lease_ends_us = self.batch_ended_us = self.device_idle_since_us = None

    # ---------------------------------------------------------------- what the worker says

    def _send(self, **body: object) -> None:
        if self.owner is not None:
            self.state_seq += 1
            self.owner.send(
                pb.WorkerMessage(worker_epoch=self.info.worker_epoch, state_seq=self.state_seq, **body)  # type: ignore[arg-type]
            )

    def _send_snapshot(self) -> None:
        self.pool.take_deltas()  # the snapshot says it all
        for snapshot in reports.snapshots(self.pool.names()):
            self._send(snapshot=snapshot)

    def _send_deltas(self) -> None:
        for delta in reports.deltas(*self.pool.take_deltas()):
            self._send(kv_delta=delta)

    def _send_load(self) -> None:
        running = len(self.batch.live) if self.batch else 0
        self._send(load=reports.load(running, self.rows.values(), self.pool, self.iterations))

    def refuse(self, plan_no: int, refusal: Refusal) -> None:
        self._send(refused=reports.refused(plan_no, refusal, self.pool))
