"""A router for tests: an engine on the mock runner, in process, with a clock that stands still and a session that is a
list.
"""

import struct
from collections.abc import Sequence
from typing import Any

from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb
from scls_worker.engine import Engine, Runner
from scls_worker.info import worker_info
from scls_worker.kv_pool import KvPool
from scls_worker.mock import MockRunner, next_token
from scls_worker.rows import Drawn

VOCAB = 1000
ROOT = 77


class FakeSession:
    def __init__(self) -> None:
        self.sent: list[pb.WorkerMessage] = []
        self.is_closed = False
        self.full = False

    def send(self, message: pb.WorkerMessage) -> None:
        assert not self.is_closed
        self.sent.append(message)

    def close(self) -> None:
        self.is_closed = True


class FailingRunner(MockRunner):
    """Fails where a row has the id `poison`."""

    poison = 999

    def run(self, chunks: Sequence[Any]) -> list[Drawn]:
        if any(self.poison in chunk.row.tokens[: chunk.row.known] for chunk in chunks):
            raise RuntimeError("out of luck")
        return super().run(chunks)


def make_info(blocks: int = 64, **changes: Any) -> common.WorkerInfo:
    fields: dict[str, Any] = dict(
        worker_id="w",
        served_names=["mock"],
        model_digest="m",
        tokenizer_digest="t",
        vocab_size=VOCAB,
        eos_token_ids=[2],
        max_context=100000,
        block_size=4,
        blocks=blocks,
        max_rows=8,
        chunk_tokens=16,
        device="none",
        dtype="none",
        engine="test",
    )
    return worker_info(**{**fields, **changes})


def pack(ids: Sequence[int]) -> common.TokenIds:
    return common.TokenIds(le_u32=struct.pack(f"<{len(ids)}I", *ids))


def row_id(request: int, attempt: int = 0) -> common.RowId:
    return common.RowId(request=request, attempt=attempt)


def start(
    request: int,
    prompt: Sequence[int] | int,
    max_tokens: int = 4,
    output: Sequence[int] = (),
    attempt: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    hold_rank: int = 0,
    model: str = "mock",
    prefill_budget: int = 0,
    root: int = ROOT,
    **limits: Any,
) -> pb.RowStart:
    """A prompt given as a number is that many ids of the request's own."""
    ids = [(100 * request + i) % 900 + 10 for i in range(prompt)] if isinstance(prompt, int) else prompt
    return pb.RowStart(
        row=row_id(request, attempt),
        model=model,
        hash_root=root,
        prompt_ids=pack(ids),
        output_ids=pack(output),
        sampling=common.Sampling(temperature=temperature, seed=seed),
        limits=common.Limits(max_tokens=max_tokens, **limits),
        hold_rank=hold_rank,
        prefill_budget=prefill_budget,
    )


def ids_of(row: pb.RowStart) -> list[int]:
    data = row.prompt_ids.le_u32
    return list(struct.unpack(f"<{len(data) // 4}I", data))


def mock_output(prompt: Sequence[int], count: int, vocab: int = VOCAB) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens[-1], len(tokens) - 1, vocab))
    return tokens[len(prompt) :]


class Router:
    """Speaks to one engine and remembers what came back."""

    def __init__(self, runner: Runner | None = None, blocks: int = 64, owner_epoch: int = 1, **info: Any) -> None:
        self.now_us = 0
        self.info = make_info(blocks, **info)
        self.pool = KvPool(self.info.blocks, self.info.block_size)
        self.engine = Engine(
            runner or MockRunner(self.info.vocab_size), self.pool, self.info, clock=lambda: self.now_us
        )
        self.session = FakeSession()
        self.read = 0
        self.say(hello=pb.Hello(owner_epoch=owner_epoch))
        self.hashes: set[int] = set()
        self.begins: dict[tuple[int, int], int] = {}
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.finishes: dict[tuple[int, int], int] = {}
        self.take()

    def say(self, session: FakeSession | None = None, **body: Any) -> None:
        self.engine.handle(session or self.session, pb.RouterMessage(**body))
        self.pool.check()

    def plan(self, number: int, base: int = 0, steps: int = 100, **fields: Any) -> None:
        fields.setdefault("keep", pb.Plan.KEEP_SURVIVORS)
        self.say(plan=pb.Plan(plan_no=number, base_batch=base, steps=steps, **fields))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.engine.ready
            self.engine.step()
            self.pool.check()

    def run(self) -> list[pb.WorkerMessage]:
        """Until the worker is idle; all that came since the last take."""
        while self.engine.ready:
            self.step()
        return self.take()

    def take(self) -> list[pb.WorkerMessage]:
        """What came, checked as a router would: no gap, indices of a row in order, deltas that fit the view."""
        new = self.session.sent[self.read :]
        for i, message in enumerate(new, start=self.read + 1):
            assert message.state_seq == i and message.worker_epoch == self.info.worker_epoch
            self._view(message)
        self.read += len(new)
        return new

    def _view(self, message: pb.WorkerMessage) -> None:
        if message.HasField("snapshot"):
            assert message.snapshot.last
            self.hashes = set(unpack(message.snapshot.hashes_le_u64))
        elif message.HasField("kv_delta"):
            removed, stored = unpack(message.kv_delta.removed_le_u64), unpack(message.kv_delta.stored_le_u64)
            assert self.hashes.issuperset(removed) and self.hashes.isdisjoint(stored)
            self.hashes = self.hashes.difference(removed).union(stored)
        elif message.HasField("step"):
            for row in message.step.rows:
                key = (row.row.request, row.row.attempt)
                begin = self.begins.setdefault(key, row.first_index)
                output = self.outputs.setdefault(key, [])
                assert row.first_index == begin + len(output)
                output.extend(row.ids)
                if row.finish:
                    assert key not in self.finishes
                    self.finishes[key] = row.finish


def unpack(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 8}Q", data))


def of(messages: Sequence[pb.WorkerMessage], body: str) -> list[Any]:
    return [getattr(message, body) for message in messages if message.HasField(body)]  # type: ignore[arg-type]


def kinds(messages: Sequence[pb.WorkerMessage]) -> list[str | None]:
    return [message.WhichOneof("body") for message in messages]
