"""`torch.nn.attention.varlen.varlen_attn` written down plainly, for block tables: it has no CPU kernel of its own. As strict as
the strictest of the kernels behind it about what it is given.
"""

from typing import Any

import torch


def varlen_attn(
    query: Any,  # [T, H, D]
    key: Any,  # [pages, page, Hkv, D]
    value: Any,
    cu_seq_q: Any,  # [N + 1]
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,  # [N]
    block_table: Any = None,  # [N, W]
    num_splits: int | None = None,
) -> Any:
    rows, width = block_table.shape
    _, page, kv_heads, _ = key.shape
    for given in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert given.dtype == torch.int32 and given.is_contiguous()
    assert cu_seq_q.shape == cu_seq_k.shape == (rows + 1,) and seqused_k.shape == (rows,)
    assert query.is_contiguous() and query.shape[0] == int(cu_seq_q[-1])
    assert int(cu_seq_k[-1]) == int(seqused_k.sum())
    assert -(-max_k // page) == width and int(seqused_k.max()) <= max_k
    assert int((cu_seq_q[1:] - cu_seq_q[:-1]).max()) <= max_q
    assert enable_gqa or query.shape[1] == kv_heads
    left, right = window_size
    assert right == 0 and scale is not None
    out = torch.empty_like(query)
    for row in range(rows):
        first, end, seen = int(cu_seq_q[row]), int(cu_seq_q[row + 1]), int(seqused_k[row])
        at = torch.arange(seen)
        slots = block_table[row].long()[at // page] * page + at % page
        k, v = (pool.flatten(0, 1)[slots].repeat_interleave(query.shape[1] // kv_heads, 1) for pool in (key, value))
        # The last query sees the last key.
        place = torch.arange(end - first)[:, None] + seen - (end - first)
        mask = at <= place
        if left >= 0:
            mask &= at >= place - left
        scores = torch.einsum("thd,lhd->htl", query[first:end], k) * scale
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        out[first:end] = torch.einsum("htl,lhd->thd", weights, v)
    return out
