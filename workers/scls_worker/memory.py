"""How many KV blocks a device holds: of a CPU a fixed share, of a GPU what is left beside the largest passes, measured.

Knows runners as something that computes chunks.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .config import kv_shape
from .graphs import SPARE
from .options import CONTEXTS_A_POOL
from .rows import Chunk, Draw, Row, RowKey

log = logging.getLogger(__name__)

CPU_POOL_BYTES = 1 << 30
# Of a GPU's free memory, for what nobody measured: fragments, contexts of libraries, captured graphs themselves.
CUDA_SPARE = 0.08
# Where KV is gathered (SDPA, and a padded batch), a layer's keys and values of all rows are there twice, and a chunk's
# repeated for all heads.
CUDA_GATHERED = 0.6


def default_blocks(model: Any, options: argparse.Namespace, max_context: int, probe: Callable[[int], Any]) -> int:
    """`probe` makes a runner of so many blocks, which goes again."""
    config = model.config.get_text_config()
    heads, width = kv_shape(config)
    token_bytes = 2 * int(config.num_hidden_layers) * heads * width * model.dtype.itemsize
    block_bytes = options.block_size * token_bytes
    if model.device.type != "cuda":
        wanted = -(-CONTEXTS_A_POOL * max_context // options.block_size)
        return int(max(1, min(wanted, CPU_POOL_BYTES // block_bytes)))
    chunk, rows = min(options.chunk_tokens, max_context - 1), options.max_rows
    runner = probe(max(rows, -(-chunk // options.block_size)))
    peaks = [peak_of(runner, chunks) for chunks in (chunk_of(chunk, options.block_size), rows_of(rows))]
    gathers = options.layout == "padded" or not runner.varlen
    del runner
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    log.info("memory: %d MiB free, the largest passes take %s", free >> 20, " and ".join(str(at >> 20) for at in peaks))
    return fitting(free, peaks, block_bytes, gathers)


def fitting(free: int, peaks: Sequence[int], block_bytes: int, gathers: bool) -> int:
    """Blocks beside passes that need so many bytes, which add up: a captured step keeps its memory to itself."""
    room = int(free * (1 - CUDA_SPARE)) - sum(peaks)
    if gathers:
        room = min(room, int(free * CUDA_GATHERED))
    return max(1, room // block_bytes - SPARE)


def peak_of(runner: Any, chunks: Sequence[Chunk]) -> int:
    """Bytes that a pass takes beside what is there already."""
    runner.run(chunks)  # what the first call loads stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.run(chunks)
    return int(torch.cuda.max_memory_allocated() - before)


def chunk_of(tokens: int, block_size: int) -> list[Chunk]:
    return [Chunk(row_of(0, tokens, range(-(-tokens // block_size))), 0, tokens, draws=True)]


def rows_of(rows: int) -> list[Chunk]:
    return [Chunk(row_of(at, 1, range(at, at + 1)), 0, 1, draws=True) for at in range(rows)]


def row_of(number: int, tokens: int, blocks: range) -> Row:
    """It draws by chance, which takes more than to be greedy."""
    ids = np.ones(tokens + 1, dtype=np.uint32)
    row = Row(RowKey(number, 0, 0), 0, ids, tokens, tokens, max_tokens=1, draw=Draw(temperature=1.0))
    row.blocks.extend(blocks)
    return row
