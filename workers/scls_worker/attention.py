"""Attention over KV in blocks, for rows packed one behind the other: what transformers calls in each layer.

A pass is made once an iteration and says where each token's KV goes and which KV it sees; the layers only gather. `Pass`
is that of blocks, `rectangle.Rectangle` of a padded batch: plain SDPA, the same on every device. `native.NativePass` is
the fast one of blocks on a CPU, `varlen.VarlenPass` on CUDA. Knows blocks as numbers, no rows, no model.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# What may come along in a layer's keyword arguments and changes nothing here.
HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_router_logits", "cache_position", "return_dict"}
)


class Attention(Protocol):
    """What a pass does in each layer."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, H, T, D]
        key: Tensor,  # [1, Hkv, T, D]
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [1, T, H, D]
        """All KV of a layer is written before any is read: rows see each other's."""


# The pass that runs now, by runner: what a layer's call finds there. A number is all that a compiled forward has to carry.
passes: dict[int, Attention] = {}
new_runner = itertools.count().__next__

# Opaque to torch.compile: which pass it is, and where KV lies, is seen only when it runs.
library: Any = torch.library.Library("scls", "DEF")  # type: ignore[no-untyped-call]
library.define(
    "attend(Tensor query, Tensor key, Tensor value, int runner, int layer, float scaling, int? window, float? softcap)"
    " -> Tensor"
)


def run_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runner: int,
    layer: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return passes[runner].attend(layer, query, key, value, scaling, window, softcap)


def fake_attend(query: Tensor, *others: Any) -> Tensor:
    _, heads, tokens, width = query.shape
    return query.new_empty(1, tokens, heads, width)


library.impl("attend", run_attend, "CompositeExplicitAutograd")
torch.library.register_fake("scls::attend", fake_attend, lib=library)


def attend(
    module: Any,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    scls: int | None = None,  # the runner
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    A row's KV outside the window stays where it is: another layer may see all of it, and a prefix is found whole.
    """
    assert scls is not None, "the model runs through scls_worker.model only"
    unknown = [name for name, value in others.items() if value is not None and name not in HARMLESS]
    if unknown:
        raise NotImplementedError(f"attention argument: {', '.join(sorted(unknown))}")
    return torch.ops.scls.attend(query, key, value, scls, module.layer_idx, scaling, sliding_window, softcap), None


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


class Ones(NamedTuple):
    slots: Tensor  # [N, L]
    mask: Tensor  # [N, 1, 1, L]


class Sight(NamedTuple):
    """What the packed tokens see through one window: the gathers of a layer, and their masks."""

    ones: Ones | None
    prefills: list[Prefill]


class Pass:
    """Where an iteration's tokens write and read. Chunks of one token come first in the packed order, all in one
    gather.
    """

    def __init__(
        self, spans: Sequence[Span], block_size: int, pools: Sequence[tuple[Tensor, Tensor]], device: torch.device
    ) -> None:
        self.pools = pools  # per layer K, V: [slots, Hkv, D]
        self.block_size, self.device = block_size, device
        ones = [i for i, span in enumerate(spans) if span.size == 1]
        self.order = ones + [i for i, span in enumerate(spans) if span.size > 1]  # packed order
        self.ones = len(ones)
        self.spans = [spans[i] for i in self.order]
        at = np.concatenate([np.arange(s.start, s.start + s.size) for s in self.spans])
        self.positions = to(at, device)  # [T]
        self.ends = to(np.cumsum([span.size for span in self.spans]) - 1, device)  # [rows], the last token of each
        self.tables = [np.asarray(span.blocks, dtype=np.int64) for span in self.spans]
        # The block of each token, then its slot.
        into = [np.array([span.blocks[span.start // block_size] for span in self.spans[: self.ones]], dtype=np.int64)]
        for span, table in zip(self.spans[self.ones :], self.tables[self.ones :], strict=True):
            into.append(table[np.arange(span.start, span.start + span.size) // block_size])
        self.written = to(np.concatenate(into) * block_size + at % block_size, device)  # [T]
        self.longest = max(span.start + span.size for span in self.spans)
        self._sights: dict[int | None, Sight] = {}

    def sight(self, window: int | None) -> Sight:
        """What a layer sees whose tokens look back over the last `window` positions, their own among them; None: over
        all. Made for the first layer that asks: all layers of a model share one or two.
        """
        if window is not None and window >= self.longest:
            window = None
        if window not in self._sights:
            self._sights[window] = self._look(window)
        return self._sights[window]

    def _look(self, window: int | None) -> Sight:
        size = self.block_size
        # The first block that a span sees anything of. Gathers begin there, whole blocks at a time.
        bases = [0 if window is None else max(0, span.start + 1 - window) // size for span in self.spans]
        seen = [
            (span, table[base : -(-(span.start + span.size) // size)], base * size)
            for span, table, base in zip(self.spans, self.tables, bases, strict=True)
        ]
        prefills = []
        first = self.ones
        for span, table, base in seen[self.ones :]:
            length = span.start + span.size - base
            mask = None
            cut = window is not None and window < span.start + span.size
            if span.start or cut:
                mask = torch.ones(span.size, length, dtype=torch.bool, device=self.device).tril(span.start - base)
            if mask is not None and window is not None:
                mask = mask.triu(span.start - base - window + 1)
            slots = (table[:, None] * size + np.arange(size)).reshape(-1)[:length]
            prefills.append(Prefill(first, first + span.size, to(slots, self.device), mask))
            first += span.size
        return Sight(self._look_of_ones(seen[: self.ones], window) if self.ones else None, prefills)

    def _look_of_ones(self, seen: Sequence[tuple[Span, NDArray[np.int64], int]], window: int | None) -> Ones:
        size = self.block_size
        table = np.zeros((len(seen), max(len(blocks) for _, blocks, _ in seen)), dtype=np.int64)
        for row, (_, blocks, _) in zip(table, seen, strict=True):
            row[: len(blocks)] = blocks
        lengths = np.array([span.start + 1 - base for span, _, base in seen])
        longest = int(lengths.max())
        slots = (table[:, :, None] * size + np.arange(size)).reshape(len(seen), -1)[:, :longest]
        # Behind its end a row reads its last slot again: a mask does not keep another row's NaN out of a sum.
        for row_slots, length in zip(slots, lengths, strict=True):
            row_slots[length:] = row_slots[length - 1]
        at = np.arange(longest)
        mask = at < lengths[:, None]
        if window is not None:
            mask &= at >= lengths[:, None] - window
        return Ones(to(slots, self.device), to(mask, self.device)[:, None, None, :])

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        keys, values = self.pools[layer]  # [slots, Hkv, D]
        keys[self.written] = key[0].transpose(0, 1)
        values[self.written] = value[0].transpose(0, 1)

        sight = self.sight(window)
        query = query[0].transpose(0, 1)  # [T, H, D]
        tokens, heads, width = query.shape
        kv_heads = keys.shape[1]
        out = query.new_empty(tokens, heads, width)
        if sight.ones is not None:
            n, length = sight.ones.slots.shape
            flat = sight.ones.slots.view(-1)
            k = keys.index_select(0, flat).view(n, length, kv_heads, width).transpose(1, 2)  # [N, Hkv, L, D]
            v = values.index_select(0, flat).view(n, length, kv_heads, width).transpose(1, 2)
            # The query heads of one KV head see the same keys: they stand in for query positions, and nothing is
            # repeated.
            q = query[:n].reshape(n, kv_heads, heads // kv_heads, width)
            o = weigh(q, k, v, sight.ones.mask, scaling, softcap)
            out[:n] = o.reshape(n, heads, width)
        for first, last, slots, mask in sight.prefills:
            k = keys.index_select(0, slots).transpose(0, 1)[None]  # [1, Hkv, L, D]
            v = values.index_select(0, slots).transpose(0, 1)[None]
            k = k.repeat_interleave(heads // kv_heads, 1)
            v = v.repeat_interleave(heads // kv_heads, 1)
            q = query[first:last].transpose(0, 1)[None]  # [1, H, T, D]
            o = weigh(q, k, v, mask, scaling, softcap)
            out[first:last] = o[0].transpose(0, 1)
        return out[None]


class OnesPass(Pass):
    """One token a row, made on the device of what lies there: a step that is captured once and runs for any rows. It reads
    whole tables, whose width should be near what the longest row needs.
    """

    def __init__(
        self, positions: Tensor, tables: Tensor, block_size: int, pools: Sequence[tuple[Tensor, Tensor]]
    ) -> None:  # [N], [N, W]
        self.pools, self.block_size, self.device = pools, block_size, positions.device
        self.positions, self.block_table = positions, tables
        self.written = slots_of(positions, tables, block_size)
        self.longest = tables.shape[1] * block_size
        self._sights = {}

    def _look(self, window: int | None) -> Sight:
        size = self.block_size
        at = torch.arange(self.longest, device=self.device)
        last = self.positions[:, None]
        slots = (self.block_table.long()[:, :, None] * size + torch.arange(size, device=self.device)).flatten(1)
        mask = at <= last
        if window is not None:
            mask &= at > last - window
        # As in `Pass`: what a row does not see it reads from its own last slot.
        return Sight(Ones(torch.where(mask, slots, self.written[:, None]), mask[:, None, None, :]), [])


def slots_of(positions: Tensor, tables: Tensor, block_size: int) -> Tensor:  # [N], [N, W] -> [N]
    blocks = tables.gather(1, (positions // block_size)[:, None])[:, 0]
    return blocks.long() * block_size + positions % block_size


def to(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def weigh(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
    """SDPA, or the same with scores bent towards at most `softcap`, which SDPA does not know: [.., T, D]."""
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    # In place: the scores of a long chunk are the largest thing there is.
    scores = (q @ k.transpose(-1, -2)).mul_(scaling / softcap).tanh_().mul_(softcap)  # [.., T, L]
    return torch.softmax(scores.masked_fill_(~mask, float("-inf")), dim=-1, dtype=torch.float32).to(v.dtype) @ v
