"""Attention alone, on this machine: what decode rows read a second against what the memory gives, and what a prefill chunk
computes against torch's own fused kernel; beside both the portable path.

All takes turns in one process, and what counts is a ratio. Every call has KV of its own, so much of it in turn that no cache
holds it, as in a step that reads a model's weights between two layers.
"""

from __future__ import annotations

import argparse
import json
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from scls_worker import native
from scls_worker.attention import Pass, Span
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, WIDTH, BLOCK = 12, 4, 64, 16
AROUND = 256 << 20  # bytes before a call's KV comes again: several times a last-level cache
SCALING = WIDTH**-0.5
CPU = torch.device("cpu")


def seconds(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The median of each, taken in turns."""
    for way in ways.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - began)
    return {name: median(times) for name, times in taken.items()}


def packed(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As a layer's projections leave them: [1, heads, T, D], a token's heads side by side."""
    q, k, v = (torch.randn(1, tokens, heads, WIDTH).to(dtype).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def filled(layers: int, shape: tuple[int, int, int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """As a runner's pools, in one piece: small tensors would not get the large pages that theirs get."""
    pools = native.zeros((layers, 2, *shape), dtype).normal_()
    return [(keys, values) for keys, values in pools]


def memory() -> Callable[[], object]:
    """One long read, in large pages as KV is: more than any order of blocks can have."""
    many = native.zeros((AROUND // 4,), torch.float32)
    return many.sum


def decode(rows: int, context: int, dtype: torch.dtype, turns: int) -> dict[str, float]:
    each = -(-context // BLOCK)
    call = 2 * rows * context * KV_HEADS * WIDTH * dtype.itemsize  # bytes that must be read
    layers = -(-AROUND // call)
    shape = (rows * each * BLOCK, KV_HEADS, WIDTH)
    pools = filled(layers, shape, dtype)
    shuffled = torch.randperm(rows * each).tolist()
    spans = [Span(array("i", shuffled[i * each : (i + 1) * each]), context - 1, 1) for i in range(rows)]
    one = native.Native(pools, BLOCK).lay(spans)
    other = Pass(spans, BLOCK, pools, CPU)
    new = packed(rows, dtype)
    at = 0

    def calls(here: native.NativePass | Pass, count: int) -> Callable[[], object]:
        def run() -> None:
            nonlocal at
            for _ in range(count):
                at = (at + 1) % layers
                here.attend(at, *new, SCALING, None, None)

        return run

    # So many calls that a turn takes some milliseconds.
    count, few = max(1, (64 << 20) // call), max(1, (8 << 20) // call)
    took = seconds({"memory": memory(), "native": calls(one, count), "sdpa": calls(other, few)}, turns)
    return {
        "memory": AROUND / took["memory"],
        "native": call * count / took["native"],
        "sdpa": call * few / took["sdpa"],
        "us": took["native"] / count * 1e6,
    }


def prefill(tokens: int, before: int, dtype: torch.dtype, turns: int) -> dict[str, float]:
    blocks = -(-(tokens + before) // BLOCK)
    shape = (blocks * BLOCK, KV_HEADS, WIDTH)
    pools = filled(1, shape, dtype)
    spans = [Span(array("i", torch.randperm(blocks).tolist()), before, tokens)]
    one, other = native.Native(pools, BLOCK).lay(spans), Pass(spans, BLOCK, pools, CPU)
    q, k, v = packed(tokens, dtype)
    mask = None
    if before:
        mask = torch.ones(tokens, before + tokens, dtype=torch.bool).tril(before)
    wide = [
        torch.randn(1, KV_HEADS, before + tokens, WIDTH).to(dtype).repeat_interleave(HEADS // KV_HEADS, 1) for _ in "kv"
    ]
    pairs = tokens * before + tokens * (tokens + 1) // 2
    took = seconds(
        {
            "native": lambda: one.attend(0, q, k, v, SCALING, None, None),
            # Keys and values at hand and repeated for every head, which a layer would have to do first.
            "flash": lambda: scaled_dot_product_attention(
                q, *wide, attn_mask=mask, is_causal=not before, scale=SCALING
            ),
            "sdpa": lambda: other.attend(0, q, k, v, SCALING, None, None),
        },
        turns,
    )
    return {name: 4 * pairs * HEADS * WIDTH / each for name, each in took.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    kernel = native.kernel()
    assert kernel is not None, "scls-worker was installed without its C extension"
    figures = []
    print(f"{torch.get_num_threads()} threads, {HEADS} query and {KV_HEADS} KV heads of {WIDTH}, blocks of {BLOCK}")
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            print(f"\n{kernel.name(dtype)}, {str(dtype).removeprefix('torch.')}")
            print("decode rows x context    us a call   GB/s   of memory   x sdpa")
            for context in (256, 1024):
                for rows in (1, 8, 32, 64):
                    found = decode(rows, context, dtype, options.turns)
                    share, ratio = found["native"] / found["memory"], found["native"] / found["sdpa"]
                    print(
                        f"{rows:11d} x {context:<7d} {found['us']:12.0f} {found['native'] / 1e9:6.1f} {share:11.0%} {ratio:8.1f}"
                    )
                    figures.append({"dtype": str(dtype), "rows": rows, "context": context, **found})
            print("chunk after context      GFLOP/s   x flash   x sdpa")
            for tokens, before in ((512, 0), (64, 0), (128, 512), (16, 256)):
                found = prefill(tokens, before, dtype, options.turns)
                print(
                    f"{tokens:5d} after {before:<7d} {found['native'] / 1e9:13.0f}"
                    f" {found['native'] / found['flash']:9.2f} {found['native'] / found['sdpa']:8.2f}"
                )
                figures.append({"dtype": str(dtype), "tokens": tokens, "before": before, **found})
    if options.json:
        options.json.write_text(json.dumps({"threads": torch.get_num_threads(), "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
