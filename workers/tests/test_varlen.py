"""What the CUDA pass hands to torch's kernel: tables, lengths, windows and alignment, against attention written down plainly. The
kernel itself is a reference here; the real one is tried where a worker starts.
"""

from typing import Any

import pytest
import varlen_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import SCALING, WIDTH, chunks, plainly

torch = pytest.importorskip("torch")
attention = pytest.importorskip("scls_worker.attention")
varlen = pytest.importorskip("scls_worker.varlen")

CPU = torch.device("cpu")
HEADS = (4, 2, 16)


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_reference.varlen_attn)


@settings(max_examples=120, deadline=None)
@given(
    chunks=chunks,  # of each row: where its chunk starts, how many tokens it has
    ones=st.booleans(),
    block_size=st.sampled_from([1, 3, 4, 16]),
    window=st.none() | st.integers(1, 60),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    seed=st.integers(0, 1000),
)
def test_passes_are_plain_attention(
    chunks: list[tuple[int, int]],
    ones: bool,
    block_size: int,
    window: int | None,
    heads: tuple[int, int],
    seed: int,
) -> None:
    """`ones`: a token of each row, with positions and tables given as tensors, by both ways that a captured step has."""
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=random)

    if ones:
        chunks = [(start, 1) for start, _ in chunks]
    q_heads, kv_heads = heads
    needs = [-(-(start + size) // block_size) for start, size in chunks]
    shuffled = torch.randperm(sum(needs) + 2, generator=random).tolist()
    spans = [
        attention.Span([shuffled.pop() for _ in range(need)], start, size)
        for need, (start, size) in zip(needs, chunks, strict=True)
    ]
    rows = [
        tuple(noise(count, of, WIDTH) for count, of in ((size, q_heads), (end, kv_heads), (end, kv_heads)))
        for size, end in ((size, start + size) for start, size in chunks)
    ]
    expected = torch.cat(
        [plainly(*row, span.start, window, None) for row, span in zip(rows, spans, strict=True)]
    )  # [T, H, D]
    # What nobody wrote is NaN: it shows in any sum it is part of.
    pools = [tuple(torch.full(((sum(needs) + 2) * block_size, kv_heads, WIDTH), torch.nan) for _ in "kv")]
    for (_, *computed), span in zip(rows, spans, strict=True):
        slots = [block * block_size + i for block in span.blocks for i in range(block_size)][: span.start]
        for pool, of_row in zip(pools[0], computed, strict=True):
            pool[slots] = of_row[: span.start]
    if ones:
        positions = torch.tensor([span.start for span in spans])
        tables = torch.full((len(spans), max(needs) + 3), shuffled[0], dtype=torch.int32)
        for table, span in zip(tables, spans, strict=True):
            table[: len(span.blocks)] = torch.tensor(span.blocks)
        made = [of(positions, tables, block_size, pools) for of in (varlen.VarlenPass.of_ones, attention.OnesPass)]
    else:
        made = [varlen.VarlenPass.of_spans(spans, block_size, pools, CPU)]
        assert made[0].positions.tolist() == [start + i for start, size in chunks for i in range(size)]
        assert made[0].ends.tolist() == [sum(size for _, size in chunks[: i + 1]) - 1 for i in range(len(chunks))]
    packed = [torch.cat([row[what][-span.size :] for row, span in zip(rows, spans, strict=True)]) for what in range(3)]
    for here in made:
        out = here.attend(0, *(part.transpose(0, 1)[None] for part in packed), SCALING, window, None)
        torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- is it to be believed?


def refusal(
    dtype: Any = torch.bfloat16, window: int | None = 21, device: Any = CPU, capped: bool = False
) -> str | None:
    return varlen.refusal(device, dtype, 16, HEADS, window, capped)


def test_what_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("cuda")
    assert refusal() == "device cpu"
    assert refusal(torch.float32, device=there) == "float32"
    assert refusal(device=there, capped=True) == "soft cap"
    for early in (None, lambda query, key, value, window_size: None):
        monkeypatch.setattr(varlen, "varlen_attn", early)
        assert refusal(device=there) == f"torch {torch.__version__} attends over no block tables"


def tried(window: int | None = 21) -> str | None:
    return varlen.disagreement(CPU, torch.bfloat16, 16, HEADS, {None, window})


@pytest.mark.parametrize("window", [None, 5, 21, 40])
def test_a_kernel_that_computes_the_same_is_taken(window: int | None) -> None:
    assert tried(window) is None


def wrong(what: str) -> Any:
    def kernel(*args: Any, **given: Any) -> Any:
        if what == "window":
            left, right = given["window_size"]
            given["window_size"] = (left + 1 if left >= 0 else left, right)
        elif what == "length":
            given["seqused_k"] = given["seqused_k"] - 1
            args = (*args[:4], args[4] - torch.arange(len(args[4]), dtype=torch.int32), *args[5:])
        elif what == "table":
            given["block_table"] = given["block_table"].roll(1, 0)
        elif what == "nothing":
            return torch.full_like(args[0], torch.nan)
        return varlen_reference.varlen_attn(*args, **given)

    return kernel


@pytest.mark.parametrize("what", ["window", "length", "table", "nothing"])
def test_a_kernel_that_computes_something_else_is_not(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", wrong(what))
    assert "off by" in (tried() or "")


def test_what_a_kernel_says_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any, **given: Any) -> Any:
        raise RuntimeError("Paged KV cache block size must be divisible by 256\nmore of it")

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    assert tried() == "Paged KV cache block size must be divisible by 256"
