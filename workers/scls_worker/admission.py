"""Who is in a plan's batch, and whether their KV fits: decided when the plan starts, all of it or nothing.

Knows rows and blocks. Does not know messages, iterations or who is told.
"""

from collections.abc import Iterable, Mapping, Sequence, Set

from scls_router.proto import worker_pb2 as pb

from .kv_pool import KvPool, Use
from .layout import Layout
from .plans import Plan, Refusal
from .rows import Row, RowKey


def admit(
    plan: Plan,
    base: Sequence[Row],
    rows: Mapping[RowKey, Row],
    ended: Set[RowKey],
    pool: KvPool,
    layout: Layout,
    max_rows: int,
) -> list[Row]:
    """The rows of the plan's batch, each with blocks promised for as far as it can come. Raises Refusal, and then all
    rows are held as they are.

    `base` are the rows of the batch that ended last, `rows` all that did not end, `ended` those that did since that
    batch started.
    """
    for row in rows.values():
        row.cancel(pool)
    try:
        kept = _kept(plan, base, rows, ended)
        batch = kept + plan.add
        if len(batch) > max_rows:
            raise Refusal(pb.Refused.REASON_TOO_MANY_ROWS, f"max_rows: {max_rows}")
        members = set(kept)
        hold((row for row in rows.values() if row not in members), pool)
        for row in kept:
            row.move(pool, Use.RUNNING)
        _reserve(plan, batch, layout.ceilings(batch, plan.steps), pool)
    except Refusal:
        hold(rows.values(), pool)
        raise
    return batch


def hold(rows: Iterable[Row], pool: KvPool) -> None:
    """The rows are in no batch now. They keep their KV and nothing that was promised."""
    for row in rows:
        row.cancel(pool)
        row.move(pool, Use.HELD)


def _kept(plan: Plan, base: Sequence[Row], rows: Mapping[RowKey, Row], ended: Set[RowKey]) -> list[Row]:
    keys: list[RowKey] = []
    if plan.keep == pb.Plan.KEEP_SURVIVORS:
        keys = [row.key for row in base]
    elif plan.keep == pb.Plan.KEEP_LIST:
        keys = plan.keep_rows
        unknown = [key for key in keys if key not in rows and key not in ended]
        if unknown:
            raise Refusal(pb.Refused.REASON_UNKNOWN_ROW, "keep_rows", unknown)
    twice = [row.key for row in plan.add if row.key in rows]
    if twice:
        raise Refusal(pb.Refused.REASON_INVALID, "add: a row the worker knows", twice)
    return [rows[key] for key in keys if key in rows and key not in plan.leave]


def _reserve(plan: Plan, batch: Sequence[Row], ceilings: Sequence[int], pool: KvPool) -> None:
    """Promises every row the blocks it can need, so that nothing runs short inside the batch."""
    if plan.ceiling_blocks and sum(ceilings) > plan.ceiling_blocks:
        raise Refusal(pb.Refused.REASON_NO_MEMORY, f"ceiling_blocks: {sum(ceilings)} wanted")
    needs = [max(0, ceiling - len(row.blocks)) for ceiling, row in zip(ceilings, batch, strict=True)]
    if sum(needs) > pool.available:
        raise Refusal(pb.Refused.REASON_NO_MEMORY, f"blocks: {sum(needs)} wanted")
    pool.reserve(sum(needs))
    for row, blocks in zip(batch, needs, strict=True):
        row.promised = blocks
