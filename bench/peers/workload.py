"""The seeded workload of all peer benchmarks: who holds what, and which prompts come.

64 system prompts of a quarter of a prompt's blocks, chosen by Zipf; sessions of four turns under one of them, each held
whole by one worker and with probability 1/2 in part by a second. Of the queries 70 % continue a session after some
turn, 20 % open one under a system prompt, 10 % hit nothing. Integers only, so that every language draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MASK = (1 << 64) - 1
GROUPS, TURNS = 64, 4
SYSTEM, SESSION, FRESH = 1 << 60, 2 << 60, 3 << 60
VOCABULARY = 128_000
BLOCK = 16


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


class Rng:
    """splitmix64."""

    def __init__(self, seed: int, stream: int) -> None:
        self.state = (seed ^ (stream * 0xD1B54A32D192ED03)) & MASK

    def below(self, n: int) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        return (mix(self.state) * n) >> 64


def tokens(blocks: list[int]) -> npt.NDArray[np.int64]:
    """Token ids of blocks by their names, shape ``[len(blocks) * BLOCK]``."""
    base = np.array(blocks, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = base[:, None] + np.arange(BLOCK, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z % np.uint64(VOCABULARY)).astype(np.int64).reshape(-1)


@dataclass
class Stored:
    """A worker holds the blocks [start, end) of a session."""

    worker: int
    session: int
    start: int
    end: int


class Workload:
    def __init__(self, workers: int, blocks: int, distinct: int, queries: int, seed: int = 7) -> None:
        self.blocks = blocks
        self.system = blocks // 4
        n = -(-(distinct - GROUPS * self.system) // (blocks - self.system))
        bounds, total = [], 0
        for g in range(GROUPS):
            total += 5354228880 // (g + 1)
            bounds.append(total)

        def zipf(rng: Rng) -> int:
            u = rng.below(bounds[-1])
            return next(g for g, bound in enumerate(bounds) if u < bound)

        rng = Rng(seed, 1)
        self.groups: list[int] = []
        self.stores: list[Stored] = []
        seen: set[tuple[int, int]] = set()
        for s in range(n):
            group, home = zipf(rng), rng.below(workers)
            holders = [(home, TURNS)]
            if rng.below(2) == 0 and workers > 1:
                holders.append(((home + 1 + rng.below(workers - 1)) % workers, 1 + rng.below(TURNS - 1)))
            for worker, turns in holders:
                if (worker, group) not in seen:
                    seen.add((worker, group))
                    self.stores.append(Stored(worker, s, 0, self.system))
                for turn in range(1, turns + 1):
                    self.stores.append(Stored(worker, s, self.turn_end(turn - 1), self.turn_end(turn)))
            self.groups.append(group)
        rng = Rng(seed, 2)
        self.queries: list[list[int]] = []
        for i in range(queries):
            u = rng.below(100)
            if u < 70:
                s = rng.below(n)
                hit = self.turn_end(1 + rng.below(TURNS))
                known = self.session(s)[:hit]
            elif u < 90:
                known = [SYSTEM | zipf(rng) << 20 | b for b in range(self.system)]
            else:
                known = []
            self.queries.append(known + [FRESH | i << 20 | b for b in range(len(known), blocks)])

    def turn_end(self, turn: int) -> int:
        return self.system + (self.blocks - self.system) * turn // TURNS

    def session(self, s: int) -> list[int]:
        """Names of a session's blocks."""
        head = [SYSTEM | self.groups[s] << 20 | b for b in range(self.system)]
        return head + [SESSION | s << 20 | b for b in range(self.system, self.blocks)]
