"""A row as the worker holds it: its tokens so far, its blocks, its limits; and the batch it runs in.

Does not know how a token is computed or who is told about it.
"""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scls_router import hash_blocks
from scls_router.proto import common_pb2 as common

from .kv_pool import KvPool, Parent, Use
from .seen import Seen


class RowKey(NamedTuple):
    request: int
    choice: int
    attempt: int

    @classmethod
    def of(cls, row: common.RowId) -> "RowKey":
        return cls(row.request, row.choice, row.attempt)

    def id(self) -> common.RowId:
        return common.RowId(request=self.request, choice=self.choice, attempt=self.attempt)


@dataclass(frozen=True, slots=True)
class Draw:
    """How a row's next token is drawn: `Sampling` of the contract, checked. The defaults change nothing."""

    temperature: float = 0.0  # 0: greedy
    seed: int = 0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # an id comes once
    logprobs: int | None = None  # None: none. 0: of the drawn token. k: of the k most likely ones too
    min_tokens: int = 0
    forbidden: tuple[int, ...] = ()  # before the row has `min_tokens`

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def plain(self) -> bool:
        """The token is a function of logits, temperature, seed and place, and nothing is told beside it."""
        filters = self.temperature > 0 and (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0)
        told = self.logprobs is not None
        return not (filters or told or self.penalises or self.logit_bias or self.min_tokens)


class Drawn(NamedTuple):
    token: int
    logprobs: common.TokenLogprobs | None = None


@dataclass(slots=True, eq=False)
class Row:
    key: RowKey
    hash_root: int
    tokens: NDArray[np.uint32]  # [prompt_len + max_tokens]; the first `known` are prompt and output so far
    known: int
    prompt_len: int
    max_tokens: int
    min_tokens: int = 0
    stops: frozenset[int] = frozenset()
    draw: Draw = Draw()
    seen: Seen | None = None  # from its first draw, where the draw penalises
    prefill_budget: int = 0
    hold_rank: int = 0

    use: Use = Use.RUNNING
    computed: int = 0  # KV positions
    wants_prefill: bool = True  # until it draws, and again when its KV is lost
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    promised: int = 0
    hashes: list[int] = field(default_factory=list)
    # Leading blocks that are the pool's own for their hash. Naming ends for good at a hash that has another content.
    named: int = 0
    nameable: bool = True
    # Full blocks of this iteration whose content the pool had already: (place, the pool's block).
    doubles: list[tuple[int, int]] = field(default_factory=list)

    finish: common.FinishReason = common.FINISH_REASON_UNSPECIFIED
    # Prompt tokens found in the cache; None once it was told.
    cached_prompt: int | None = 0
    # Since the start of the batch.
    ran: int = 0
    found: int = 0
    emitted: int = 0
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.draw.plain and not self.min_tokens

    @property
    def output_len(self) -> int:
        return self.known - self.prompt_len

    @property
    def uncomputed(self) -> int:
        return self.known - self.computed

    def positions_after(self, steps: int) -> int:
        """KV positions the row can have after that many iterations: the last token drawn is not computed."""
        return self.known + min(steps, self.max_tokens - self.output_len) - 1

    def counted(self) -> Seen | None:
        """What a penalty weighs of the tokens so far; None where none is asked for."""
        if not self.draw.penalises:
            return None
        if self.seen is None:
            # Only repetition looks at the prompt, which may be long.
            prompt = self.tokens[: self.prompt_len] if self.draw.repetition_penalty != 1.0 else self.tokens[:0]
            self.seen = Seen(prompt.tolist(), len(self.tokens))
        self.seen.follow(self.tokens[self.prompt_len : self.known])
        return self.seen

    def start(self) -> None:
        """A batch starts: what its report will say of this row begins at zero."""
        self.ran = self.found = self.emitted = 0

    # ---------------------------------------------------------------- KV

    def look_up(self, pool: KvPool) -> None:
        """Takes what the cache has of the row's next whole blocks. Asked before every chunk of its prefill: another row
        may have computed them meanwhile. At least one token stays to be computed: its logits give the next one.
        """
        done, whole = len(self.blocks), (self.known - 1) // pool.block_size
        if self.computed != done * pool.block_size or self.named != done or done >= whole:
            return
        self._chain(whole, pool.block_size)
        ids = (self._ids(place, pool.block_size) for place in range(done, whole))
        found = pool.look_up(self._parent(done), self.hashes[done:whole], ids)
        pool.adopt(found)
        self.promised -= len(found)
        self.blocks.extend(found)
        self.named += len(found)
        tokens = len(found) * pool.block_size
        self.computed += tokens
        self.found += tokens
        if self.cached_prompt is not None:
            self.cached_prompt = min(self.cached_prompt + tokens, self.prompt_len)

    def grow(self, pool: KvPool, positions: int, ahead: int = 0) -> list[int]:
        """Takes blocks up to `positions`, and `ahead` more, and names those that become full at `positions`, whose tokens are
        known. Returns the blocks named now.

        They are named before they are computed, so that a later row of the same iteration finds them: a pass writes all
        KV of a layer before it reads any.
        """
        while len(self.blocks) * pool.block_size < positions + ahead:
            self.blocks.append(pool.take())
            self.promised -= 1
        fresh = []
        full = positions // pool.block_size
        if self.nameable and self.named < full:
            self._chain(full, pool.block_size)
        while self.nameable and self.named < full:
            place = self.named
            block = pool.name(
                self.blocks[place], self.hashes[place], self._parent(place), self._ids(place, pool.block_size)
            )
            if block == self.blocks[place]:
                fresh.append(block)
            elif block is not None and pool.can_share(block):
                pool.share([block])
                self.doubles.append((place, block))
            else:
                self.nameable = False
                break
            self.named += 1
        return fresh

    def take_promised(self, pool: KvPool) -> None:
        """All blocks at once, none of which will have a name."""
        self.nameable = False
        for _ in range(self.promised):
            self.blocks.append(pool.take())
        self.promised = 0

    def settle(self, pool: KvPool) -> None:
        """After the pass: the row lets go of blocks whose content the pool had already, and uses the pool's."""
        for place, block in self.doubles:
            double, self.blocks[place] = self.blocks[place], block
            pool.release([double], self.use)
        self.doubles.clear()

    def cancel(self, pool: KvPool) -> None:
        """Gives back what was promised for a batch that is over."""
        pool.cancel(self.promised)
        self.promised = 0

    def drop_kv(self, pool: KvPool) -> None:
        self.cancel(pool)
        pool.release([block for _, block in self.doubles], Use.RUNNING)
        pool.release(self.blocks, self.use)
        self.doubles.clear()
        del self.blocks[:]
        self.computed = self.named = 0
        self.nameable = self.wants_prefill = True
        if self.cached_prompt is not None:
            self.cached_prompt = 0

    def move(self, pool: KvPool, use: Use) -> None:
        if self.use is not use:
            pool.move(self.blocks, self.use, use)
            self.use = use

    def _parent(self, place: int) -> Parent:
        if place == 0:
            return Parent(-1, self.hash_root)
        doubles = dict(self.doubles)
        return Parent(doubles.get(place - 1, self.blocks[place - 1]), self.hash_root)

    def _chain(self, blocks: int, block_size: int) -> None:
        done = len(self.hashes)
        if done < blocks:
            parent = self.hashes[-1] if self.hashes else self.hash_root
            ids = self.tokens[done * block_size : blocks * block_size]
            self.hashes.extend(hash_blocks(parent, ids.tobytes(), block_size))

    def _ids(self, place: int, block_size: int) -> bytes:
        return self.tokens[place * block_size : (place + 1) * block_size].tobytes()


class Chunk(NamedTuple):
    """What one row computes in one iteration: `size` tokens from position `start`. If nothing is left then, it draws one; in a
    burst it goes on with that."""

    row: Row
    start: int
    size: int
    draws: bool


@dataclass(slots=True, eq=False)
class Batch:
    number: int  # the plan's
    rows: list[Row]  # as it started
    steps: int
    live: list[Row]
    rectangle: list[Row] = field(default_factory=list)  # padded: all rows that an iteration computes, ended ones too
    dropped: list[Row] = field(default_factory=list)  # since the last iteration
    iterations: int = 0
    cut_at: int | None = None
    # Microseconds.
    queue_us: int = 0
    idle_us: int = 0
    prefill_us: int = 0
    decode_us: int = 0
    peak_blocks: int = 0
    # Padded: cells of the prompt pass that hold no token, and tokens computed for rows that had ended.
    pad_tokens: int = 0
    invalid_tokens: int = 0
