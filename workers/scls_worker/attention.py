"""Attention over KV in blocks, for rows packed one behind the other: what transformers calls in each layer.

`Pass` is made once an iteration and says where each token's KV goes and which KV it sees; the layers only gather. This
is the reference: plain SDPA over gathered KV, the same on every device. Knows blocks as numbers, no rows, no model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# What may come along in a layer's keyword arguments and changes nothing here.
HARMLESS = frozenset({"position_ids", "use_cache", "output_attentions", "cache_position", "return_dict"})


class Span(NamedTuple):
    """One chunk: `size` tokens from position `start` of a row with these blocks."""

    blocks: Sequence[int]
    start: int
    size: int


class Prefill(NamedTuple):
    first: int  # of the packed tokens
    last: int
    slots: Tensor  # [L]
    mask: Tensor | None  # [T, L]; None: causal from the row's first token


class Pass:
    """Where an iteration's tokens write and read. Chunks of one token come first in the packed order, all in one
    gather.
    """

    def __init__(
        self, spans: Sequence[Span], block_size: int, pools: Sequence[tuple[Tensor, Tensor]], device: torch.device
    ) -> None:
        self.pools = pools  # per layer K, V: [slots, Hkv, D]
        ones = [i for i, span in enumerate(spans) if span.size == 1]
        self.order = ones + [i for i, span in enumerate(spans) if span.size > 1]  # packed order
        packed = [spans[i] for i in self.order]
        self.positions = _to(np.concatenate([np.arange(s.start, s.start + s.size) for s in packed]), device)  # [T]
        self.ends = _to(np.cumsum([span.size for span in packed]) - 1, device)  # [rows], the last token of each

        tables = [np.asarray(span.blocks, dtype=np.int64) for span in packed]
        offsets = np.arange(block_size)
        self.ones = len(ones)
        written: list[NDArray[np.int64]] = []
        if ones:
            lengths = np.array([span.start + 1 for span in packed[: self.ones]])
            wide = -(-int(lengths.max()) // block_size)
            table = np.zeros((self.ones, wide), dtype=np.int64)
            for row, blocks in zip(table, tables[: self.ones], strict=True):
                row[: min(wide, len(blocks))] = blocks[:wide]
            longest = int(lengths.max())
            slots = (table[:, :, None] * block_size + offsets).reshape(self.ones, -1)[:, :longest]
            written.append(slots[np.arange(self.ones), lengths - 1])
            self.ones_slots = _to(slots, device)  # [N, L]
            seen = np.arange(longest)[None, :] < lengths[:, None]
            self.ones_mask = _to(seen, device)[:, None, None, :]  # [N, 1, 1, L]
        self.prefills: list[Prefill] = []
        first = self.ones
        for span, blocks in zip(packed[self.ones :], tables[self.ones :], strict=True):
            length = span.start + span.size
            row_slots = (blocks[:, None] * block_size + offsets).reshape(-1)[:length]
            written.append(row_slots[span.start :])
            mask = None
            if span.start:
                mask = torch.ones(span.size, length, dtype=torch.bool, device=device).tril(span.start)
            self.prefills.append(Prefill(first, first + span.size, _to(row_slots, device), mask))
            first += span.size
        self.written = _to(np.concatenate(written), device)  # [T]


def _to(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def attend(
    module: Any,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    scls: Pass | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. All KV of a layer is written before any is read: rows see each other's."""
    assert scls is not None, "the model runs through scls_worker.model only"
    unknown = [name for name, value in others.items() if value is not None and name not in HARMLESS]
    if unknown:
        raise NotImplementedError(f"attention argument: {', '.join(sorted(unknown))}")
    keys, values = scls.pools[module.layer_idx]  # [slots, Hkv, D]
    keys[scls.written] = key[0].transpose(0, 1)
    values[scls.written] = value[0].transpose(0, 1)

    query = query[0].transpose(0, 1)  # [T, H, D]
    tokens, heads, width = query.shape
    kv_heads = keys.shape[1]
    out = query.new_empty(tokens, heads, width)
    if scls.ones:
        n, length = scls.ones_slots.shape
        flat = scls.ones_slots.view(-1)
        k = keys.index_select(0, flat).view(n, length, kv_heads, width).transpose(1, 2)  # [N, Hkv, L, D]
        v = values.index_select(0, flat).view(n, length, kv_heads, width).transpose(1, 2)
        # The query heads of one KV head see the same keys: they stand in for query positions, and nothing is repeated.
        q = query[:n].reshape(n, kv_heads, heads // kv_heads, width)
        o = scaled_dot_product_attention(q, k, v, attn_mask=scls.ones_mask, scale=scaling)
        out[:n] = o.reshape(n, heads, width)
    for first, last, slots, mask in scls.prefills:
        k = keys.index_select(0, slots).transpose(0, 1)[None]  # [1, Hkv, L, D]
        v = values.index_select(0, slots).transpose(0, 1)[None]
        k = k.repeat_interleave(heads // kv_heads, 1)
        v = v.repeat_interleave(heads // kv_heads, 1)
        q = query[first:last].transpose(0, 1)[None]  # [1, H, T, D]
        o = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        out[first:last] = o[0].transpose(0, 1)
    return out[None], None  # [1, T, H, D]
