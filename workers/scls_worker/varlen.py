"""torch's attention over variable lengths and block tables as a pass over blocks: the fast way on CUDA, where `attention.Pass`
is the portable one.

KV stays where it lies; the kernel gets tables, lengths and a window. What it takes differs with GPU, cuDNN and torch (that
of torch 2.15: cuDNN, on Hopper and Blackwell, blocks of a power of two and no windows; FlashAttention 2, blocks of a
multiple of 256), so it is not looked up but tried: `refusal` computes small passes both ways before anything is served.
Knows blocks as numbers, no rows, no model.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import Pass, Span, slots_of, to
from .config import first_line

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

DTYPES = (torch.bfloat16, torch.float16)
NEEDED = ("block_table", "seqused_k", "enable_gqa")  # of the kernel's arguments; early versions lack some
# How far the kernel may be from `Pass`, over the standard deviation: both round to the pools' type. A length or a window
# that is off by one is off by more.
MOST_OFF = 0.1


class VarlenPass:
    """Where an iteration's tokens write and read: the packed order is that of the spans."""

    def __init__(
        self,
        pools: Sequence[tuple[Tensor, Tensor]],  # per layer K, V: [slots, Hkv, D]
        block_size: int,
        positions: Tensor,  # [T]
        written: Tensor,  # [T], slots
        firsts: Tensor,  # [N + 1], where each span's tokens begin, int32
        tables: Tensor,  # [N, W], int32
        longest: int,  # tokens of the longest span, or more
    ) -> None:
        self.pools, self.block_size = pools, block_size
        self.positions, self.written, self.firsts, self.tables = positions, written, firsts, tables
        self.longest = longest
        self.order = range(len(tables))
        self.ends = firsts[1:].long() - 1  # [N]
        self.lengths = (positions[self.ends] + 1).int()  # [N], that a span's last token sees
        # KV is found by tables and lengths; FlashAttention 2 wants these too.
        self.sums = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0, dtype=torch.int32)])
        self.room = tables.shape[1] * block_size  # cuDNN wants exactly the tables' width

    @classmethod
    def of_spans(
        cls, spans: Sequence[Span], block_size: int, pools: Sequence[tuple[Tensor, Tensor]], device: torch.device
    ) -> "VarlenPass":
        sizes = [span.size for span in spans]
        at = np.concatenate([np.arange(span.start, span.start + span.size) for span in spans])
        blocks = [-(-(span.start + span.size) // block_size) for span in spans]
        # Powers of two: cuDNN makes a plan for each pair of bounds.
        tables = np.zeros((len(spans), power_of_two(max(blocks))), dtype=np.int32)
        for table, span, count in zip(tables, spans, blocks, strict=True):
            table[:count] = span.blocks[:count]
        into = tables[np.repeat(np.arange(len(spans)), sizes), at // block_size].astype(np.int64)
        return cls(
            pools,
            block_size,
            positions=to(at, device),
            written=to(into * block_size + at % block_size, device),
            firsts=to(np.cumsum([0, *sizes], dtype=np.int32), device),
            tables=to(tables, device),
            longest=power_of_two(max(sizes)),
        )

    @classmethod
    def of_ones(
        cls, positions: Tensor, tables: Tensor, block_size: int, pools: Sequence[tuple[Tensor, Tensor]]
    ) -> "VarlenPass":
        """One token a row, made on the device of what lies there: as a captured step has it."""
        firsts = torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device)
        return cls(pools, block_size, positions, slots_of(positions, tables, block_size), firsts, tables, 1)

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
        assert softcap is None, "the kernel knows no soft cap"
        keys, values = self.pools[layer]  # [slots, Hkv, D]
        keys[self.written] = key[0].transpose(0, 1)
        values[self.written] = value[0].transpose(0, 1)
        blocks = (-1, self.block_size, *keys.shape[1:])
        # The kernel counts what lies behind a token, we the token too. A window that cuts nothing is none: not every
        # kernel knows windows.
        behind = -1 if window is None or window >= self.room else window - 1
        out = varlen_attn(
            query[0].transpose(0, 1).contiguous(),
            keys.view(blocks),
            values.view(blocks),
            self.firsts,
            self.sums,
            self.longest,
            self.room,
            scale=scaling,
            window_size=(behind, 0),
            enable_gqa=query.shape[1] != keys.shape[1],
            seqused_k=self.lengths,
            block_table=self.tables,
        )
        assert isinstance(out, Tensor)
        return out[None]


def power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def refusal(
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    heads: tuple[int, int, int],
    window: int | None,
    capped: bool,
) -> str | None:
    """Why the kernel does not serve a model with these heads (queries', keys', their width); None: it does."""
    if device.type != "cuda":
        return f"device {device.type}"
    if dtype not in DTYPES:
        return str(dtype).removeprefix("torch.")
    if capped:
        return "soft cap"
    if varlen_attn is None or not set(NEEDED) <= set(inspect.signature(varlen_attn).parameters):
        return f"torch {torch.__version__} attends over no block tables"
    return disagreement(device, dtype, block_size, heads, {None, window})


@torch.inference_mode()
def disagreement(
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    heads: tuple[int, int, int],
    windows: Iterable[int | None],
) -> str | None:
    """What the kernel computes against `Pass`: single tokens, and a chunk beside one, before each window's edge and behind
    it. What nobody may see is large, so that it shows.
    """
    q_heads, kv_heads, width = heads
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    for window in windows:
        # A row of blocks and a bit, and one that goes over the window's edge.
        lengths = (2 * block_size + 3, max(block_size, window or 0) + 5)
        blocks = [-(-length // block_size) for length in lengths]
        tables = [range(1, 1 + blocks[0]), range(sum(blocks), blocks[0], -1)]
        for size in (1, 4):
            spans = [
                Span(tables[0], lengths[0] - 1, 1),
                Span(tables[1], lengths[1] - size, size),
            ]
            pool = torch.full((((sum(blocks) + 1) * block_size), kv_heads, width), 100.0, device=device, dtype=dtype)
            for table, length in zip(tables, lengths, strict=True):
                slots = [table[at // block_size] * block_size + at % block_size for at in range(length)]
                pool[to(np.array(slots), device)] = noise(length, kv_heads, width)
            tokens = 1 + size
            q, k, v = (noise(1, count, tokens, width) for count in (q_heads, kv_heads, kv_heads))
            made: list[Tensor] = []
            for of_spans in (Pass, VarlenPass.of_spans):
                here: Any = of_spans(spans, block_size, [(pool.clone(), pool.clone())], device)
                try:
                    made.append(here.attend(0, q, k, v, width**-0.5, window, None).float())
                except Exception as error:  # whatever a kernel says that cannot serve
                    return first_line(error)
            off = float((made[1] - made[0]).abs().max() / made[0].std())
            if not off <= MOST_OFF:
                return f"off by {off:.2g} of the outputs' spread, window {window}"
    return None
