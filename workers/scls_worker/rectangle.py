"""Attention over one padded KV tensor a layer: the other `Pass`, of rows as long as the longest.

Plain SDPA without block tables, so also what the paged one is compared with. A row begins in column 0, so a token's column
is its position. Knows no rows, no model.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .attention import to, weigh


class Rectangle:
    """One iteration over `len(starts)` rows: all prompts from column 0 on, or one token of each row.

    The KV tensors lie in the pools' memory, so that what a worker has is what it announced.
    """

    def __init__(
        self,
        starts: Sequence[int],
        sizes: Sequence[int],
        width: int,
        pools: Sequence[tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        self.rows, self.length, self.device = len(starts), max(sizes), device
        assert self.length == 1 or not any(starts), "prompts are computed in one pass, from their beginning"
        self.pools, self.width = pools, width  # per layer K, V: [slots, Hkv, D]
        self.order = range(self.rows)
        self.begins = to(np.asarray(starts), device)  # [N]
        self.places = torch.arange(self.rows, device=device)
        self.positions = (self.begins[:, None] + torch.arange(self.length, device=device)).view(-1)  # [N * L]
        self.ends = to(np.arange(self.rows) * self.length + np.asarray(sizes) - 1, device)  # [N], of the flat tokens
        self.seen = max(starts) + self.length
        self._masks: dict[int | None, Tensor | None] = {}

    def mask(self, window: int | None) -> Tensor | None:
        """Of one window; None: causal from the first column. What lies behind a row's end is never seen."""
        if window is not None and window >= self.seen:
            window = None
        if window not in self._masks:
            self._masks[window] = self._look(window)
        return self._masks[window]

    def _look(self, window: int | None) -> Tensor | None:
        if self.length > 1:
            if window is None:
                return None
            mask = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device)
            return mask.tril().triu(1 - window)  # [L, L], the same for all rows
        at = torch.arange(self.seen, device=self.device)
        mask = at <= self.begins[:, None]
        if window is not None:
            mask &= at > self.begins[:, None] - window
        return mask[:, None, None, :]  # [N, 1, 1, seen]

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, H, N * L, D]
        key: Tensor,  # [1, Hkv, N * L, D]
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [1, N * L, H, D]
        _, heads, _, wide = query.shape
        kv_heads = key.shape[1]
        group = heads // kv_heads
        k, v = (self._write(pool, new) for pool, new in zip(self.pools[layer], (key, value), strict=True))
        q = query[0].view(heads, self.rows, self.length, wide).transpose(0, 1)  # [N, H, L, D]
        if self.length == 1:
            # The query heads of one KV head see the same keys: they stand in for query positions.
            q = q.reshape(self.rows, kv_heads, group, wide)
        else:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = weigh(q, k, v, self.mask(window), scaling, softcap)
        return out.reshape(self.rows, heads, self.length, wide).transpose(1, 2).reshape(1, -1, heads, wide)

    def _write(self, pool: Tensor, new: Tensor) -> Tensor:  # [1, Hkv, N * L, D] -> [N, Hkv, seen, D]
        """The layer's rectangle as far as this pass sees it, with the new columns in it."""
        _, kv_heads, _, wide = new.shape
        shape = (self.rows, kv_heads, self.width, wide)
        whole = pool.view(-1)[: self.rows * kv_heads * self.width * wide].view(shape)
        columns = new[0].view(kv_heads, self.rows, self.length, wide).transpose(0, 1)  # [N, Hkv, L, D]
        if self.length > 1:
            whole[:, :, : self.length] = columns
        else:
            whole[self.places, :, self.begins] = columns[:, :, 0]
        if self.seen == self.length:
            # A batch begins. A mask does not keep an earlier batch's NaN out of a sum.
            whole[:, :, self.length :] = 0
        return whole[:, :, : self.seen]
