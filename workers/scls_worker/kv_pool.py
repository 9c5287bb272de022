"""KV blocks as numbers: who uses them, which are named by a hash, which may be evicted.

A block is in exactly one class: *running* (a row of the running batch uses it), *held* (only rows outside the batch
do), *cached* (no row, but named by a hash, so a prefix may find it again) or *free*. Does not know tensors, rows,
batches or messages.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple


class Use(IntEnum):
    """For whom a row keeps its blocks."""

    RUNNING = 0
    HELD = 1


class Parent(NamedTuple):
    """What a block's hash is chained to: the block before it, or for the first block (-1) the root of the chain."""

    block: int
    root: int


class Name(NamedTuple):
    """A named block's content. `ids` are its token ids as little-endian u32."""

    hash: int
    parent: Parent
    ids: bytes


class KvPool:
    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._users = ([0] * blocks, [0] * blocks)  # rows per block, by Use
        self._counts = [0, 0]  # blocks per class running, held
        self._free = list(range(blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._names: list[Name | None] = [None] * blocks
        self._by_hash: dict[int, int] = {}
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}
        # Blocks promised to rows of the running batch and not taken yet: never more than no running row uses.
        self.reserved = 0

    # ---------------------------------------------------------------- counts

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def running(self) -> int:
        return self._counts[Use.RUNNING]

    @property
    def held(self) -> int:
        return self._counts[Use.HELD]

    @property
    def available(self) -> int:
        """Blocks that can be promised now: all that no running row uses or was promised."""
        return len(self._free) + len(self._cached) + self.held - self.reserved

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    # ---------------------------------------------------------------- promises

    def reserve(self, blocks: int) -> None:
        assert 0 <= blocks <= self.available, "promised more than there is"
        self.reserved += blocks

    def cancel(self, blocks: int) -> None:
        """Gives promised blocks back that nobody took."""
        assert 0 <= blocks <= self.reserved
        self.reserved -= blocks

    # ---------------------------------------------------------------- use

    def take(self) -> int:
        """A promised block, empty, for a running row: a free one, else the least recently used cached one. Where there
        is neither, a held row has to go first.
        """
        assert self.reserved > 0, "took a block that was not promised"
        self.reserved -= 1
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unname(block)
        self._enter(block, Use.RUNNING)
        return block

    def adopt(self, blocks: Sequence[int]) -> None:
        """A running row uses blocks that the cache found, in place of as many promised ones."""
        assert len(blocks) <= self.reserved
        self.reserved -= len(blocks)
        self.share(blocks)

    def can_share(self, block: int) -> bool:
        """Sharing takes no promised block from anyone: a running row has it already, or there is one to spare."""
        return self._class(block) is Use.RUNNING or self.available > 0

    def share(self, blocks: Iterable[int]) -> None:
        """One more running row uses these named blocks."""
        for block in blocks:
            self._cached.pop(block, None)
            self._enter(block, Use.RUNNING)

    def release(self, blocks: Sequence[int], use: Use) -> None:
        """A row stops using its blocks. Named ones stay cached; the last goes first, so a chain is evicted from its
        end.
        """
        for block in reversed(blocks):
            self._leave(block, use)
            if self._users[0][block] or self._users[1][block]:
                continue
            if self._names[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def move(self, blocks: Iterable[int], source: Use, target: Use) -> None:
        """A row joins the running batch or leaves it and keeps its blocks."""
        for block in blocks:
            self._enter(block, target)
            self._leave(block, source)

    def _class(self, block: int) -> Use | None:
        if self._users[Use.RUNNING][block]:
            return Use.RUNNING
        return Use.HELD if self._users[Use.HELD][block] else None

    def _enter(self, block: int, use: Use) -> None:
        before = self._class(block)
        self._users[use][block] += 1
        self._recount(before, self._class(block))

    def _leave(self, block: int, use: Use) -> None:
        assert self._users[use][block] > 0, "released a block that was not used"
        before = self._class(block)
        self._users[use][block] -= 1
        self._recount(before, self._class(block))

    def _recount(self, before: Use | None, after: Use | None) -> None:
        if before is after:
            return
        if before is not None:
            self._counts[before] -= 1
        if after is not None:
            self._counts[after] += 1

    # ---------------------------------------------------------------- names

    def look_up(self, parent: Parent, hashes: Iterable[int], ids: Iterable[bytes]) -> list[int]:
        """The longest run of named blocks that follow `parent`. A hash with other ids or another parent is a miss."""
        found: list[int] = []
        for hash_, block_ids in zip(hashes, ids, strict=True):
            block = self._by_hash.get(hash_)
            if block is None or self._names[block] != Name(hash_, parent, block_ids):
                break
            found.append(block)
            parent = Parent(block, parent.root)
        return found

    def name(self, block: int, hash_: int, parent: Parent, ids: bytes) -> int | None:
        """Registers a full block. Returns the block that bears the name: this one, or an earlier one with the same
        content. None if the hash belongs to another content: then this block stays unnamed, and so must all that follow
        it.
        """
        name = Name(hash_, parent, ids)
        other = self._by_hash.get(hash_)
        if other is not None:
            return other if self._names[other] == name else None
        self._names[block] = name
        self._by_hash[hash_] = block
        # A name that comes and goes between two deltas is none of the router's business.
        if hash_ in self._removed:
            del self._removed[hash_]
        else:
            self._stored[hash_] = None
        return block

    def forget(self, blocks: Sequence[int]) -> None:
        """Takes the names of unused blocks away: what they hold is not what the name says."""
        for block in reversed(blocks):
            if self._class(block) is None and block in self._cached:
                del self._cached[block]
                self._unname(block)
                self._free.append(block)

    def _unname(self, block: int) -> None:
        name = self._names[block]
        assert name is not None
        self._names[block] = None
        del self._by_hash[name.hash]
        if name.hash in self._stored:
            del self._stored[name.hash]
        else:
            self._removed[name.hash] = None

    # ---------------------------------------------------------------- what the router is told

    def take_deltas(self) -> tuple[list[int], list[int]]:
        """Hashes stored and removed since the last call."""
        if not self._stored and not self._removed:
            return [], []
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def names(self) -> list[int]:
        """Hashes of all named blocks, used or not; parents before their children in no particular order of chains."""
        return list(self._by_hash)

    def check(self) -> None:
        """Raises AssertionError if a block is in two classes or none, or a count is off. For tests."""
        users = [self._class(b) for b in range(self.blocks)]
        assert self.running == users.count(Use.RUNNING) and self.held == users.count(Use.HELD)
        assert self.running + self.held + self.cached + self.free == self.blocks
        assert len(set(self._free)) == len(self._free) and not set(self._free) & set(self._cached)
        for block, use in enumerate(users):
            idle = (block in self._cached) + (self._names[block] is None and use is None)
            assert idle == (use is None), block
            name = self._names[block]
            assert name is None or self._by_hash[name.hash] == block
            # A chain is only ever shortened at its end.
            assert name is None or name.parent.block < 0 or self._names[name.parent.block] is not None
        assert set(self._free) == {b for b, use in enumerate(users) if use is None and self._names[b] is None}
        assert len(self._by_hash) == sum(name is not None for name in self._names)
        assert 0 <= self.reserved <= self.free + self.cached + self.held
