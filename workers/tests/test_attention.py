"""`attend` over KV in blocks and in a rectangle against attention written down plainly, for random rows, chunks, windows and caps."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
attention = pytest.importorskip("scls_worker.attention")
rectangle = pytest.importorskip("scls_worker.rectangle")

WIDTH, SCALING = 8, 0.3
CPU = torch.device("cpu")


def plainly(q: Any, k: Any, v: Any, first: int, window: int | None, softcap: float | None) -> Any:
    """One row's queries [T, H, D] from position `first` on, over all its keys and values [L, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for t in range(q.shape[0]):
        at = first + t
        low = 0 if window is None else max(0, at + 1 - window)
        for head in range(q.shape[1]):
            scores = k[low : at + 1, head // group] @ q[t, head] * SCALING
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[t, head] = torch.softmax(scores, 0) @ v[low : at + 1, head // group]
    return out


chunks = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 2, 3, 5, 8, 13, 29])), min_size=1, max_size=5)


@settings(max_examples=120, deadline=None)
@given(
    chunks=chunks,  # of each row: where its chunk starts, how many tokens it has
    block_size=st.sampled_from([1, 3, 4, 16]),
    windows=st.lists(st.none() | st.integers(1, 60), min_size=1, max_size=3),  # of each layer
    softcap=st.sampled_from([None, 0.5, 30.0]),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    seed=st.integers(0, 1000),
)
# A window one short of a row, of a row exactly, and one longer.
@example(chunks=[(0, 8)], block_size=4, windows=[7, 8, 9], softcap=None, heads=(4, 2), seed=0)
@example(chunks=[(8, 5), (12, 1)], block_size=4, windows=[12, 13, 14], softcap=None, heads=(4, 2), seed=0)
def test_attend_is_plain_attention(
    chunks: list[tuple[int, int]],
    block_size: int,
    windows: list[int | None],
    softcap: float | None,
    heads: tuple[int, int],
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=random)

    q_heads, kv_heads = heads
    needs = [-(-(start + size) // block_size) for start, size in chunks]
    shuffled = torch.randperm(sum(needs) + 2, generator=random).tolist()
    spans = []
    for need, (start, size) in zip(needs, chunks, strict=True):
        spans.append(attention.Span([shuffled.pop() for _ in range(need)], start, size))
    # What nobody wrote is NaN: it shows in any sum it is part of, masked or not.
    shape = ((sum(needs) + 2) * block_size, kv_heads, WIDTH)
    pools = [(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in windows]
    here = attention.Pass(spans, block_size, pools, CPU)
    slots = [[block * block_size + i for block in span.blocks for i in range(block_size)] for span in spans]
    for layer, window in enumerate(windows):
        rows = [
            (noise(size, q_heads, WIDTH), noise(start + size, kv_heads, WIDTH), noise(start + size, kv_heads, WIDTH))
            for start, size in chunks
        ]
        for (_, k, v), mine, span in zip(rows, slots, spans, strict=True):
            for pool, computed in zip(pools[layer], (k, v), strict=True):
                pool[mine[: span.start]] = computed[: span.start]
        packed = [torch.cat([rows[i][what][-spans[i].size :] for i in here.order]) for what in range(3)]
        attention.passes[0] = here
        out, _ = attention.attend(
            SimpleNamespace(layer_idx=layer),
            *(tensor.transpose(0, 1)[None] for tensor in packed),
            None,
            scaling=SCALING,
            scls=0,
            sliding_window=window,
            softcap=softcap,
        )
        expected = [plainly(*rows[i], spans[i].start, window, softcap) for i in here.order]
        torch.testing.assert_close(out[0], torch.cat(expected), rtol=1e-4, atol=1e-5)


@settings(max_examples=120, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    steps=st.integers(0, 6),
    spare=st.integers(0, 9),
    window=st.none() | st.integers(1, 40),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    seed=st.integers(0, 1000),
)
@example(prompts=[8, 3], steps=2, spare=0, window=8, softcap=None, heads=(4, 2), seed=0)
@example(prompts=[1, 1], steps=2, spare=0, window=1, softcap=None, heads=(4, 2), seed=0)
def test_a_rectangle_is_plain_attention(
    prompts: list[int],
    steps: int,
    spare: int,
    window: int | None,
    softcap: float | None,
    heads: tuple[int, int],
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    n, width = len(prompts), max(prompts) + steps + spare
    tokens = [length + steps for length in prompts]
    q, k, v = (
        [torch.randn((count, of, WIDTH), generator=random) for count in tokens] for of in (q_heads, kv_heads, kv_heads)
    )
    # What an earlier batch left is NaN: it shows in any sum it is part of, masked or not.
    pools = [tuple(torch.full((n * width + spare, kv_heads, WIDTH), torch.nan) for _ in "kv")]
    for step in range(steps + 1):
        starts = [0] * n if step == 0 else [length + step - 1 for length in prompts]
        sizes = prompts if step == 0 else [1] * n
        here = rectangle.Rectangle(starts, sizes, width, pools, CPU)
        assert here.positions.view(n, -1)[:, 0].tolist() == starts

        def cells(rows: list[Any], at: list[int] = starts, counts: list[int] = sizes) -> Any:  # [1, H, N * L, D]
            part = torch.zeros(n, max(counts), *rows[0].shape[1:])
            for cell, row, first, count in zip(part, rows, at, counts, strict=True):
                cell[:count] = row[first : first + count]
            return part.flatten(0, 1).transpose(0, 1)[None]

        attention.passes[0] = here
        out, _ = attention.attend(
            SimpleNamespace(layer_idx=0),
            cells(q),
            cells(k),
            cells(v),
            None,
            scaling=SCALING,
            scls=0,
            sliding_window=window,
            softcap=softcap,
        )
        rows = out[0].view(n, max(sizes), q_heads, WIDTH)
        for i, (first, count) in enumerate(zip(starts, sizes, strict=True)):
            end = first + count
            expected = plainly(q[i][first:end], k[i][:end], v[i][:end], first, window, softcap)
            torch.testing.assert_close(rows[i, :count], expected, rtol=1e-4, atol=1e-5)


def test_a_window_is_looked_up_once_a_pass_and_not_where_it_cuts_nothing() -> None:
    here = attention.Pass([attention.Span([0, 1], 5, 1), attention.Span([2, 3, 4], 0, 9)], 4, [], CPU)
    assert here.sight(6) is here.sight(6)
    assert here.sight(9) is here.sight(None) and here.sight(6) is not here.sight(None)
    # Gathers begin at the block where the first seen position lies.
    assert here.sight(2).ones.slots.tolist() == [[4, 5]]
    assert here.sight(3).ones.slots.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("argument", ["s_aux", "position_bias"])
def test_arguments_that_are_not_understood_are_refused(argument: str) -> None:
    pools = [(torch.zeros(4, 1, WIDTH), torch.zeros(4, 1, WIDTH))]
    here = attention.Pass([attention.Span([0], 0, 1)], 4, pools, CPU)
    one = torch.zeros(1, 1, 1, WIDTH)
    module = SimpleNamespace(layer_idx=0)
    attention.passes[0] = here
    attention.attend(module, one, one, one, None, scaling=1.0, scls=0, **{argument: None})
    with pytest.raises(NotImplementedError, match=argument):
        attention.attend(module, one, one, one, None, scaling=1.0, scls=0, **{argument: torch.zeros(1)})
