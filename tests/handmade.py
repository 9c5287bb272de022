"""A worker made by hand for one test: it announces what it is told to, and says only what the test makes it say."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import grpc
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb
from scls_router.proto import worker_pb2_grpc

# What the contract asks of a message without a bound.
CHUNK = 1 << 20


class HandmadeWorker(worker_pb2_grpc.WorkerServicer):
    """Answers `Hello` with a snapshot of `hashes`, and then nothing."""

    def __init__(
        self,
        info: common.WorkerInfo,
        hashes: bytes = b"",
        options: tuple[tuple[str, int], ...] = (),
        chunk: int = CHUNK,
    ) -> None:
        self.info, self.hashes, self.chunk = info, hashes, chunk
        self.sessions = 0
        self._over = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8), options=options)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self.url = f"grpc://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def GetInfo(self, request: pb.GetInfoRequest, context: grpc.ServicerContext) -> common.WorkerInfo:
        return self.info

    def GetTokenizer(self, request: pb.GetTokenizerRequest, context: grpc.ServicerContext) -> Iterator[pb.FileChunk]:
        return iter(())

    def Session(
        self, messages: Iterator[pb.RouterMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.WorkerMessage]:
        self.sessions += 1
        starts = range(0, len(self.hashes), self.chunk) or [0]
        numbers = itertools.count(1)
        for chunk, start in enumerate(starts):
            part = pb.Snapshot(
                chunk=chunk, last=start == starts[-1], hashes_le_u64=self.hashes[start : start + self.chunk]
            )
            yield pb.WorkerMessage(worker_epoch=self.info.worker_epoch, state_seq=next(numbers), snapshot=part)
        while context.is_active():
            if self._over.wait(0.05):
                break

    def __enter__(self) -> HandmadeWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.stop(None)
