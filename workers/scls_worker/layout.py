"""How a batch's rows lie in memory, and so what each computes next, how much KV it can need, and when that goes.

`Paged` packs rows of any length and keeps KV from batch to batch. `Padded` is one rectangle, the reference that the
papers schedule: every row as long as the longest, none leaves before the batch ends, nothing outlives it. The engine
asks; the runner knows the tensors. Does not know messages.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from scls_router.proto import common_pb2 as common

from .kv_pool import KvPool, Use
from .rows import Batch, Chunk, Row


class Layout(Protocol):
    def ceilings(self, rows: Sequence[Row], steps: int) -> list[int]:
        """Most blocks that each row of a batch can need."""

    def chunks(self, batch: Batch, known: Iterable[Row], most: int = 1) -> list[Chunk]:
        """What the next iteration computes, with blocks for it and for those that follow it in one go, `most` in all.
        `known` are all rows the worker knows.
        """

    def ahead(self, batch: Batch, most: int) -> int:
        """Iterations in one go, at most `most`, for which no row that waits has to lose its KV."""

    def forget(self) -> None:
        """What the last iteration should have computed it did not."""

    def end(self, rows: Iterable[Row]) -> None:
        """Their batch is over, and they did not end."""


def layout_of(info: common.WorkerInfo, pool: KvPool) -> Layout:
    if info.cost_shape == common.COST_SHAPE_PADDED:
        return Padded(pool)
    return Paged(pool, info.chunk_tokens)


class Paged:
    def __init__(self, pool: KvPool, chunk_tokens: int) -> None:
        self.pool, self.chunk_tokens = pool, chunk_tokens
        self.fresh: list[int] = []  # blocks that the last iteration named

    def ceilings(self, rows: Sequence[Row], steps: int) -> list[int]:
        return [self.pool.blocks_for(row.positions_after(steps)) for row in rows]

    def chunks(self, batch: Batch, known: Iterable[Row], most: int = 1) -> list[Chunk]:
        """Rows share the chunk budget in order. A row's own holds only beside rows that decode: they wait for it."""
        budget = self.chunk_tokens
        decodes = any(not row.wants_prefill for row in batch.live)
        chunks = []
        self.fresh = []
        for row in batch.live:
            size = 1
            if row.wants_prefill:
                if budget == 0:
                    continue
                row.look_up(self.pool)
                size = min(row.uncomputed, budget)
                if decodes and row.prefill_budget:
                    size = min(size, row.prefill_budget)
                budget -= size
            until = row.computed + size
            self._make_room(self.pool.blocks_for(until + most - 1) - len(row.blocks), known)
            self.fresh += row.grow(self.pool, until, most - 1)
            chunks.append(Chunk(row, row.computed, size, draws=size == row.uncomputed))
        return chunks

    def ahead(self, batch: Batch, most: int) -> int:
        room = self.pool.free + self.pool.cached
        while most > 1 and room < sum(
            max(0, self.pool.blocks_for(row.computed + most) - len(row.blocks)) for row in batch.live
        ):
            most //= 2
        return most

    def _make_room(self, blocks: int, known: Iterable[Row]) -> None:
        """Held rows lose their KV when its blocks are wanted and not before, lowest rank first."""
        while blocks > self.pool.free + self.pool.cached:
            held = (row for row in known if row.use is Use.HELD and row.blocks)
            min(held, key=lambda row: (row.hold_rank, row.key)).drop_kv(self.pool)

    def forget(self) -> None:
        self.pool.forget(self.fresh)

    def end(self, rows: Iterable[Row]) -> None:
        """What was taken ahead and not come to goes back."""
        for row in rows:
            used = self.pool.blocks_for(row.computed)
            self.pool.release(row.blocks[used:], row.use)
            del row.blocks[used:]


class Padded:
    """Row and position say where KV lies: of blocks only the number counts, and no block has a name.

    A row begins at the left, so that its positions are the rectangle's columns; what is padded lies behind its end and is
    written over when it comes there.
    """

    def __init__(self, pool: KvPool) -> None:
        self.pool = pool

    def ceilings(self, rows: Sequence[Row], steps: int) -> list[int]:
        width = max((row.positions_after(steps) for row in rows), default=0)
        return [self.pool.blocks_for(width)] * len(rows)

    def chunks(self, batch: Batch, known: Iterable[Row], most: int = 1) -> list[Chunk]:
        """First all prompts in one pass, then a token of each row. Rows that ended compute their last one again."""
        if batch.iterations == 0:
            batch.rectangle = list(batch.live)
            for row in batch.live:
                row.take_promised(self.pool)
            sizes = [row.known for row in batch.live]
            batch.pad_tokens = max(sizes) * len(sizes) - sum(sizes)
            return [Chunk(row, 0, row.known, draws=True) for row in batch.live]
        batch.invalid_tokens += len(batch.rectangle) - len(batch.live)
        return [
            Chunk(row, row.known - 2, 1, draws=False) if row.finish else Chunk(row, row.computed, 1, draws=True)
            for row in batch.rectangle
        ]

    def ahead(self, batch: Batch, most: int) -> int:
        return 1

    def forget(self) -> None:
        pass

    def end(self, rows: Iterable[Row]) -> None:
        for row in rows:
            row.drop_kv(self.pool)
