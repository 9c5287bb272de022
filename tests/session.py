"""A router's side of the Session contract, driven by hand: tests decide every batch, so nothing depends on timing."""

from __future__ import annotations

import itertools
import queue
import threading
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from scls_router import hash_blocks
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb
from scls_router.proto import worker_pb2_grpc

_epochs = itertools.count(1)
Report = pb.SliceReport


def ids_of(ids: Iterable[int]) -> common.TokenIds:
    return common.TokenIds(le_u32=array("I", ids).tobytes())


def hashes_of(packed: bytes) -> list[int]:
    return list(array("Q", packed))


@dataclass
class Row:
    """A row as the test knows it."""

    prompt: list[int]
    max_tokens: int
    request: int
    attempt: int = 0
    choice: int = 0
    output: list[int] = field(default_factory=list)
    finish: int = common.FINISH_REASON_UNSPECIFIED
    cached: int | None = None
    logprobs: list[common.TokenLogprobs] = field(default_factory=list)
    temperature: float = 0.0
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)  # the other fields of Sampling
    ignore_eos: bool = True
    stops: tuple[int, ...] = ()
    min_tokens: int = 0
    prefill_budget: int = 0
    hash_root: int = 7

    @property
    def id(self) -> common.RowId:
        return common.RowId(request=self.request, choice=self.choice, attempt=self.attempt)

    @property
    def key(self) -> tuple[int, int, int]:
        return (self.request, self.choice, self.attempt)

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def start(self, model: str) -> pb.RowStart:
        return pb.RowStart(
            row=self.id,
            model=model,
            hash_root=self.hash_root,
            prompt_ids=ids_of(self.prompt),
            output_ids=ids_of(self.output),
            sampling=common.Sampling(temperature=self.temperature, seed=self.seed, **self.sampling),
            limits=common.Limits(
                max_tokens=self.max_tokens,
                min_tokens=self.min_tokens,
                ignore_eos=self.ignore_eos,
                stop_token_ids=self.stops,
            ),
            prefill_budget=self.prefill_budget,
        )


class Session:
    """One open session; checks epochs, sequence numbers, token indices and block truth of all that arrives."""

    def __init__(self, url: str, owner_epoch: int | None = None) -> None:
        self.channel = grpc.insecure_channel(
            url.removeprefix("grpc://"), options=[("grpc.max_receive_message_length", 16 << 20)]
        )
        stub = worker_pb2_grpc.WorkerStub(self.channel)
        self.stub = stub
        self.info: common.WorkerInfo = stub.GetInfo(pb.GetInfoRequest(), timeout=20)
        self.commands: queue.Queue[pb.RouterMessage | None] = queue.Queue()
        self.inbox: queue.Queue[pb.WorkerMessage | None] = queue.Queue()
        self.cmd_seq = itertools.count(1)
        self.plan_no = 0
        self.last_batch = 0
        self.next_seq = 1
        self.rows: dict[tuple[int, int, int], Row] = {}
        self.blocks: set[int] = set()
        self.load: pb.Load | None = None
        self.refusals: list[pb.Refused] = []
        self.steps: list[pb.Step] = []
        self.stream = stub.Session(iter(self.commands.get, None))
        threading.Thread(target=self._read, daemon=True).start()
        epoch = next(_epochs) if owner_epoch is None else owner_epoch
        self.owner_epoch = epoch
        self.send(hello=pb.Hello(router_id="test", owner_epoch=epoch, proto_minor=0))

    def _read(self) -> None:
        try:
            for message in self.stream:
                self.inbox.put(message)
        except grpc.RpcError:
            pass
        self.inbox.put(None)

    def close(self) -> None:
        self.commands.put(None)
        self.stream.cancel()
        self.channel.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- sending

    def send(self, **body: object) -> None:
        self.commands.put(pb.RouterMessage(cmd_seq=next(self.cmd_seq), **body))  # type: ignore[arg-type]

    def ceiling(self, rows: Iterable[Row], steps: int) -> int:
        size = self.info.block_size
        ends = (min(row.tokens + steps, len(row.prompt) + row.max_tokens) - 1 for row in rows)
        return sum(-(-end // size) for end in ends)

    def plan(
        self,
        *,
        add: Iterable[Row] = (),
        keep: Iterable[Row] | str | None = None,
        leave: Iterable[Row] = (),
        steps: int = 8,
        base: int | None = None,
        ceiling: int = 1 << 20,
        ranks: dict[tuple[int, int, int], int] | None = None,
    ) -> int:
        """Sends a plan; ``keep`` is a list of rows, "survivors" or None."""
        self.plan_no += 1
        add = list(add)
        for row in add:
            self.rows[row.key] = row
        plan = pb.Plan(
            plan_no=self.plan_no,
            base_batch=self.last_batch if base is None else base,
            keep=pb.Plan.KEEP_NONE if keep is None else pb.Plan.KEEP_LIST,
            add=[row.start(self.info.served_names[0]) for row in add],
            leave=[row.id for row in leave],
            steps=steps,
            ceiling_blocks=ceiling,
            hold_ranks=[pb.HoldRank(row=self.rows[key].id, rank=rank) for key, rank in (ranks or {}).items()],
        )
        if keep == "survivors":
            plan.keep = pb.Plan.KEEP_SURVIVORS
        elif keep is not None:
            plan.keep_rows.extend(row.id for row in keep if not isinstance(row, str))
        self.send(plan=plan)
        return self.plan_no

    # -- receiving

    def receive(self, timeout: float = 30) -> pb.WorkerMessage | None:
        """The next message, checked and taken into account. None: the stream ended."""
        message = self.inbox.get(timeout=timeout)
        if message is None:
            return None
        assert message.worker_epoch == self.info.worker_epoch
        assert message.state_seq == self.next_seq, f"seq {message.state_seq}, not {self.next_seq}"
        self.next_seq += 1
        kind = message.WhichOneof("body")
        if kind == "snapshot":
            if message.snapshot.chunk == 0:
                self.blocks = set()
            self.blocks |= set(hashes_of(message.snapshot.hashes_le_u64))
        elif kind == "kv_delta":
            removed = hashes_of(message.kv_delta.removed_le_u64)
            assert set(removed) <= self.blocks, "a block was removed that was not there"
            self.blocks -= set(removed)
            stored = hashes_of(message.kv_delta.stored_le_u64)
            assert not set(stored) & self.blocks, "a block was stored twice"
            self.blocks |= set(stored)
            assert len(self.blocks) <= self.info.blocks, "more blocks than announced"
        elif kind == "step":
            self.steps.append(message.step)
            for tokens in message.step.rows:
                row = self.rows[(tokens.row.request, tokens.row.choice, tokens.row.attempt)]
                assert tokens.first_index == len(row.output), "token indices in order, each once"
                assert len(tokens.logprobs) == (len(tokens.ids) if "logprobs" in row.sampling else 0)
                row.output.extend(tokens.ids)
                row.logprobs.extend(tokens.logprobs)
                if tokens.HasField("cached_tokens") and row.cached is None:
                    row.cached = tokens.cached_tokens
                row.finish = tokens.finish or row.finish
        elif kind == "load":
            self.load = message.load
        elif kind == "refused":
            self.refusals.append(message.refused)
        return message

    def until(self, kind: str, timeout: float = 30) -> pb.WorkerMessage:
        """Receives up to and with the next message of a kind."""
        while True:
            message = self.receive(timeout)
            assert message is not None, f"the stream ended before {kind}"
            if message.WhichOneof("body") == kind:
                return message

    def snapshot(self) -> None:
        while not self.until("snapshot").snapshot.last:
            pass

    def report(self) -> Report:
        """The next slice report; its batch is the base of the next plan unless told otherwise."""
        report = self.until("slice_report").slice_report
        self.last_batch = report.batch
        assert report.peak_blocks <= self.info.blocks
        return report

    def run(self, **plan: object) -> Report:
        """One batch alone: plan it, wait for its end."""
        number = self.plan(**plan)  # type: ignore[arg-type]
        report = self.report()
        assert report.batch == number and report.next_batch == 0
        self.until("load")
        return report

    def chain(self, row: Row) -> list[int]:
        """Hashes of the whole blocks of the row's tokens whose KV is computed."""
        return hash_blocks(row.hash_root, (row.prompt + row.output)[: row.tokens - 1], self.info.block_size)
