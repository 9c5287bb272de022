"""What the worker says, as messages: steps, reports, load, refusals, hashes in chunks. Knows no state but what it is
given.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb

from .kv_pool import KvPool
from .plans import Refusal
from .rows import Batch, Drawn, Row

# No message passes 1 MiB; a little is left for the rest of it.
HASHES_A_CHUNK = (1 << 17) - 1024


def _pack(hashes: Sequence[int]) -> bytes:
    return np.array(hashes, dtype="<u8").tobytes()


def _chunks(hashes: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(hashes), HASHES_A_CHUNK):
        yield hashes[start : start + HASHES_A_CHUNK]


def snapshots(hashes: Sequence[int]) -> Iterator[pb.Snapshot]:
    chunks = list(_chunks(hashes)) or [[]]
    for i, chunk in enumerate(chunks):
        yield pb.Snapshot(chunk=i, last=i + 1 == len(chunks), hashes_le_u64=_pack(chunk))


def deltas(stored: Sequence[int], removed: Sequence[int]) -> Iterator[pb.KvDelta]:
    if len(stored) + len(removed) <= HASHES_A_CHUNK:
        if stored or removed:
            yield pb.KvDelta(stored_le_u64=_pack(stored), removed_le_u64=_pack(removed))
        return
    for chunk in _chunks(removed):
        yield pb.KvDelta(removed_le_u64=_pack(chunk))
    for chunk in _chunks(stored):
        yield pb.KvDelta(stored_le_u64=_pack(chunk))


def row_tokens(row: Row, drawn: Drawn | None) -> pb.RowTokens:
    """One row's part of a Step: the token it drew just now, or none where it ended without."""
    tokens = pb.RowTokens(row=row.key.id(), first_index=row.output_len, finish=row.finish)
    if drawn is None:
        return tokens
    tokens.first_index -= 1
    tokens.ids.append(drawn.token)
    if drawn.logprobs is not None:
        tokens.logprobs.append(drawn.logprobs)
    if row.cached_prompt is not None:
        tokens.cached_tokens = row.cached_prompt
        row.cached_prompt = None
    return tokens


def row_burst(row: Row, first: int, drawn: Sequence[int]) -> pb.RowTokens:
    """The tokens that a row, which decodes, drew from index `first` of its output on."""
    return pb.RowTokens(row=row.key.id(), first_index=first, ids=drawn, finish=row.finish)


def row_report(row: Row) -> pb.RowReport:
    done = row.finish != common.FINISH_REASON_UNSPECIFIED
    return pb.RowReport(
        row=row.key.id(),
        computed=row.ran,
        cached=row.found,
        emitted=row.emitted,
        finish=row.finish,
        kv=pb.RowReport.KV_HELD if row.blocks else pb.RowReport.KV_DROPPED,
        prefill_left=row.uncomputed if row.wants_prefill and not done else 0,
        blocks=len(row.blocks),
    )


def slice_report(batch: Batch, end: pb.SliceReport.End, error: str) -> pb.SliceReport:
    """Made before the next batch starts: its rows count from zero again. Who starts is filled in then."""
    return pb.SliceReport(
        batch=batch.number,
        end=end,
        steps=batch.iterations,
        rows=[row_report(row) for row in batch.rows],
        prefill_us=batch.prefill_us,
        decode_us=batch.decode_us,
        queue_us=batch.queue_us,
        idle_us=batch.idle_us,
        peak_blocks=batch.peak_blocks,
        pad_tokens=batch.pad_tokens,
        invalid_tokens=batch.invalid_tokens,
        error=error,
    )


def refused(plan_no: int, refusal: Refusal, pool: KvPool) -> pb.Refused:
    return pb.Refused(
        plan_no=plan_no,
        reason=refusal.reason,
        detail=refusal.detail,
        free_blocks=pool.free,
        held_blocks=pool.held,
        cached_blocks=pool.cached,
        rows=[key.id() for key in refusal.rows],
    )


def load(running: int, rows: Iterable[Row], pool: KvPool, iterations: int) -> pb.Load:
    """`held_rows` are rows outside the running batch that have KV here."""
    with_kv = sum(1 for row in rows if row.blocks and row.use)
    return pb.Load(
        running_rows=running,
        held_rows=with_kv,
        free_blocks=pool.free,
        running_blocks=pool.running,
        held_blocks=pool.held,
        cached_blocks=pool.cached,
        iterations=iterations,
    )
