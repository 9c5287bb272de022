"""One router's stream between two threads: the engine's, which sends and never waits, and the event loop's, which
writes.

Nothing is dropped: a ring that is full makes the engine end its slice and wait for room. Does not know what messages
mean.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from scls_router.proto import worker_pb2 as pb


class StreamSession:
    def __init__(self, capacity: int, on_room: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._capacity = capacity
        self._on_room = on_room
        self._ring: deque[pb.WorkerMessage] = deque()
        self._wake = asyncio.Event()
        self._full = False
        self._closed = False

    # ---------------------------------------------------------------- the engine's thread

    def send(self, message: pb.WorkerMessage) -> None:
        if self._closed:
            return
        self._ring.append(message)
        if len(self._ring) >= self._capacity:
            self._full = True
        self._notify()

    def close(self) -> None:
        self._closed = True
        self._notify()

    @property
    def full(self) -> bool:
        """From the time the ring is full until half of it is written: not a slice for every message that leaves."""
        return self._full

    def _notify(self) -> None:
        # The loop is gone only when the process ends.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    # ---------------------------------------------------------------- the event loop

    @property
    def overflowing(self) -> bool:
        """Answers to what the router sends pile up unread: take no more from it."""
        return len(self._ring) >= 2 * self._capacity

    async def outgoing(self) -> AsyncIterator[pb.WorkerMessage]:
        while True:
            while self._ring:
                message = self._ring.popleft()
                if self._full and len(self._ring) <= self._capacity // 2:
                    self._full = False
                    self._on_room()
                yield message
            if self._closed:
                return
            self._wake.clear()
            # Between the look at the ring and the clear, the engine may have sent.
            if not self._ring and not self._closed:
                await self._wake.wait()
