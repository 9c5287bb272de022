"""Blocks as numbers: classes, names, eviction order, promises; unit tests and a random walk."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from scls_worker.kv_pool import KvPool, Parent, Use

ROOT = 5


def take(pool: KvPool, count: int) -> list[int]:
    pool.reserve(count)
    return [pool.take() for _ in range(count)]


def chain(pool: KvPool, ids: list[bytes], root: int = ROOT) -> list[int]:
    """A row's blocks, computed and named; hashes are the running sum of the ids."""
    blocks = take(pool, len(ids))
    for i, hash_ in enumerate(hashes(ids)):
        parent = Parent(blocks[i - 1] if i else -1, root)
        assert pool.name(blocks[i], hash_, parent, ids[i]) == blocks[i]
    return blocks


def hashes(ids: list[bytes]) -> list[int]:
    return [hash(tuple(ids[: i + 1])) for i in range(len(ids))]


def look_up(pool: KvPool, ids: list[bytes], root: int = ROOT) -> list[int]:
    return pool.look_up(Parent(-1, root), hashes(ids), ids)


A, B, C, D = b"aaaa", b"bbbb", b"cccc", b"dddd"


def test_classes_and_counts() -> None:
    pool = KvPool(8, 4)
    blocks = chain(pool, [A, B])
    assert (pool.free, pool.running, pool.held, pool.cached) == (6, 2, 0, 0)
    pool.move(blocks, Use.RUNNING, Use.HELD)
    assert (pool.free, pool.running, pool.held, pool.cached) == (6, 0, 2, 0)
    pool.reserve(1)
    pool.adopt(blocks[:1])
    # Used by both: running.
    assert (pool.free, pool.running, pool.held, pool.cached) == (6, 1, 1, 0)
    pool.release(blocks, Use.HELD)
    assert (pool.free, pool.running, pool.held, pool.cached) == (6, 1, 0, 1)
    pool.release(blocks[:1], Use.RUNNING)
    assert (pool.free, pool.running, pool.held, pool.cached) == (6, 0, 0, 2)
    pool.check()


def test_unnamed_blocks_become_free() -> None:
    pool = KvPool(2, 4)
    pool.release(take(pool, 2), Use.RUNNING)
    assert pool.free == 2 and pool.take_deltas() == ([], [])


def test_the_least_recently_used_goes_first_and_a_chain_from_its_end() -> None:
    pool = KvPool(4, 4)
    first, second = chain(pool, [A, B]), chain(pool, [C, D])
    pool.release(first, Use.RUNNING)
    pool.release(second, Use.RUNNING)
    pool.take_deltas()
    assert take(pool, 1) == [first[1]]
    assert look_up(pool, [A, B]) == first[:1]
    # Found and let go again: now the most recent.
    pool.reserve(1)
    pool.adopt(first[:1])
    pool.release(first[:1], Use.RUNNING)
    assert take(pool, 3) == [second[1], second[0], first[0]]
    assert pool.take_deltas() == ([], [hashes([A, B])[1], *reversed(hashes([C, D])), hashes([A])[0]])


def test_a_hash_with_other_ids_or_another_parent_is_a_miss() -> None:
    pool = KvPool(8, 4)
    chain(pool, [A, B])
    h = hashes([A, B])
    assert pool.look_up(Parent(-1, ROOT), h, [A, C]) != pool.look_up(Parent(-1, ROOT), h, [A, B])
    assert len(pool.look_up(Parent(-1, ROOT), h, [A, C])) == 1 and pool.look_up(Parent(-1, ROOT), h, [C, B]) == []
    assert pool.look_up(Parent(-1, ROOT + 1), h, [A, B]) == []
    # The second block's hash and ids alone are not its prefix.
    assert pool.look_up(Parent(-1, ROOT), h[1:], [B]) == []
    (block,) = take(pool, 1)
    assert pool.name(block, h[0], Parent(-1, ROOT), C) is None
    assert pool.name(block, h[1], Parent(block, ROOT), B) is None
    pool.check()


def test_one_content_has_one_name() -> None:
    pool = KvPool(8, 4)
    first = chain(pool, [A])
    (block,) = take(pool, 1)
    assert pool.name(block, hashes([A])[0], Parent(-1, ROOT), A) == first[0]
    pool.release([block], Use.RUNNING)
    assert pool.free == 7 and pool.take_deltas() == (hashes([A]), [])


def test_deltas_say_only_what_lasted() -> None:
    pool = KvPool(1, 4)
    blocks = chain(pool, [A])
    pool.release(blocks, Use.RUNNING)
    pool.release(take(pool, 1), Use.RUNNING)
    assert pool.take_deltas() == ([], [])
    pool.release(chain(pool, [A]), Use.RUNNING)
    assert pool.take_deltas() == (hashes([A]), [])
    pool.release(take(pool, 1), Use.RUNNING)
    pool.release(chain(pool, [A]), Use.RUNNING)
    assert pool.take_deltas() == ([], [])


def test_forget() -> None:
    pool = KvPool(4, 4)
    blocks = chain(pool, [A, B])
    pool.forget(blocks)
    assert look_up(pool, [A, B]) == blocks  # in use: their row decides
    pool.release(blocks, Use.RUNNING)
    pool.forget(blocks)
    assert look_up(pool, [A]) == [] and pool.free == 4 and pool.take_deltas() == ([], [])
    pool.check()


def test_promises() -> None:
    pool = KvPool(3, 4)
    pool.reserve(2)
    assert pool.available == 1
    with pytest.raises(AssertionError):
        pool.reserve(2)
    pool.take()
    pool.cancel(1)
    assert pool.available == 2
    with pytest.raises(AssertionError):
        pool.take()


class Walk(RuleBasedStateMachine):
    """Rows come, share, leave and return at random over a small pool and few contents, so that hits are common."""

    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.pool = KvPool(12, 4)
        self.view: set[int] = set()
        self.live: dict[int, tuple[list[int], Use]] = {}
        self.next_row = 0

    @rule(target=rows, ids=st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=5), tail=st.booleans())
    def begin(self, ids: list[bytes], tail: bool) -> int:
        pool = self.pool
        need = len(ids) + tail
        self.next_row += 1
        if need > pool.free + pool.cached:
            return -1
        pool.reserve(need)
        blocks = look_up(pool, ids)
        pool.adopt(blocks)
        for i in range(len(blocks), len(ids)):
            blocks.append(pool.take())
            parent = Parent(blocks[i - 1] if i else -1, ROOT)
            assert pool.name(blocks[i], hashes(ids)[i], parent, ids[i]) == blocks[i]
        if tail:
            blocks.append(pool.take())
        assert look_up(pool, ids) == blocks[: len(ids)]
        self.live[self.next_row] = (blocks, Use.RUNNING)
        return self.next_row

    @rule(row=rows)
    def move(self, row: int) -> None:
        if row in self.live:
            blocks, use = self.live[row]
            self.pool.move(blocks, use, Use(1 - use))
            self.live[row] = (blocks, Use(1 - use))

    @rule(row=consumes(rows))
    def end(self, row: int) -> None:
        if row in self.live:
            self.pool.release(*self.live.pop(row))

    @rule()
    def report(self) -> None:
        stored, removed = self.pool.take_deltas()
        assert self.view.issuperset(removed) and self.view.isdisjoint(stored)
        self.view = self.view.difference(removed).union(stored)
        assert self.view == set(self.pool.names())

    @invariant()
    def sound(self) -> None:
        self.pool.check()
        used = {block for blocks, _ in self.live.values() for block in blocks}
        assert self.pool.running + self.pool.held == len(used)
        assert self.pool.reserved == 0

    def teardown(self) -> None:
        for blocks, use in self.live.values():
            self.pool.release(blocks, use)
        assert self.pool.running == self.pool.held == 0


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
