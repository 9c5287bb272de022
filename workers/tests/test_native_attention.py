"""The C kernel against SDPA over blocks and against attention written down plainly, at every level this machine has."""

import ctypes
import logging
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
attention = pytest.importorskip("scls_worker.attention")
native = pytest.importorskip("scls_worker.native")
model_ = pytest.importorskip("scls_worker.model")

CPU = torch.device("cpu")
# Who runs the tests has a compiler: tools/setup.sh asks for one.
assert native.kernel() is not None, "no C extension, or an old one: make build"
LEVELS = range(native.kernel().level + 1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Rows:
    """Rows with a past, and a pass over their next tokens, laid for the kernel at any level and for SDPA."""

    def __init__(
        self,
        chunks: Sequence[tuple[int, int]],  # of each row: where its chunk starts, how many tokens it has
        dtype: Any,
        heads: tuple[int, int] = (4, 2),
        width: int = 16,
        block: int = 16,
        window: int | None = None,
        softcap: float | None = None,
        seed: int = 0,
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.chunks, self.dtype, self.heads, self.width = chunks, dtype, heads, width
        self.block, self.window, self.softcap = block, window, softcap
        self.scaling = 1.2 * width**-0.5
        needs = [-(-(start + size) // block) for start, size in chunks]
        # The last blocks are nobody's.
        shuffled = torch.randperm(sum(needs) + 2, generator=self.random).tolist()
        self.tables = [array("i", [shuffled.pop() for _ in range(need)]) for need in needs]
        self.slots = (sum(needs) + 2) * block
        self.known = [self.noise(start + size) for start, size in chunks]  # q, k, v of each row

    def noise(self, tokens: int) -> list[Any]:
        q_heads, kv_heads = self.heads
        return [
            torch.randn((tokens, heads, self.width), generator=self.random).to(self.dtype)
            for heads in (q_heads, kv_heads, kv_heads)
        ]

    def pools(self) -> Any:
        # What nobody wrote is NaN: it shows in any sum it is part of, masked or not.
        shape = (self.slots, self.heads[1], self.width)
        return [tuple(torch.full(shape, torch.nan, dtype=self.dtype) for _ in "kv")]

    def run(self, lay: Any, spans: Sequence[Any], order: Sequence[int] | None = None) -> dict[int, Any]:
        """Of each row in `order` (all) the outputs of its span [T, H, D]."""
        order = range(len(spans)) if order is None else order
        here = lay(spans)
        mine = [(order[i], spans[i]) for i in here.order]
        packed = [
            torch.cat([self.known[row][what][s.start : s.start + s.size] for row, s in mine]) for what in range(3)
        ]
        q, k, v = (tensor[None].transpose(1, 2) for tensor in packed)
        out = here.attend(0, q, k, v, self.scaling, self.window, self.softcap)[0]
        assert here.positions.tolist() == [s.start + i for _, s in mine for i in range(s.size)]
        assert here.ends.tolist() == [sum(s.size for _, s in mine[: i + 1]) - 1 for i in range(len(mine))]
        parts = out.split([s.size for _, s in mine])
        return {row: part for (row, _), part in zip(mine, parts, strict=True)}

    def both(self, lay: Any) -> list[Any]:
        """Outputs of the chunks, their past having been computed in a pass before."""
        past = [
            (row, attention.Span(table, 0, start))
            for row, (table, (start, _)) in enumerate(zip(self.tables, self.chunks, strict=True))
            if start
        ]
        if past:
            self.run(lay, [span for _, span in past], [row for row, _ in past])
        spans = [attention.Span(table, *chunk) for table, chunk in zip(self.tables, self.chunks, strict=True)]
        outs = self.run(lay, spans)
        return [outs[row] for row in range(len(spans))]

    def native(self, level: int | None = None) -> list[Any]:
        return self.both(native.Native(self.pools(), self.block, level).lay)

    def sdpa(self) -> list[Any]:
        pools = self.pools()
        return self.both(lambda spans: attention.Pass(spans, self.block, pools, CPU))

    def plainly(self) -> list[Any]:
        """In double precision, of the numbers as they are stored."""
        outs = []
        for (q, k, v), (start, size) in zip(self.known, self.chunks, strict=True):
            q, k, v = q.double(), k.double(), v.double()
            group = self.heads[0] // self.heads[1]
            out = torch.empty_like(q[start:])
            for t in range(size):
                at = start + t
                low = 0 if self.window is None else max(0, at + 1 - self.window)
                for head in range(self.heads[0]):
                    scores = k[low : at + 1, head // group] @ q[at, head] * self.scaling
                    if self.softcap is not None:
                        scores = self.softcap * torch.tanh(scores / self.softcap)
                    out[t, head] = torch.softmax(scores, 0) @ v[low : at + 1, head // group]
            outs.append(out)
        return outs

    def check(self, outs: Sequence[Any]) -> None:
        for mine, theirs in zip(outs, self.plainly(), strict=True):
            error = (mine.double() - theirs).abs().max()
            # bfloat16 has 8 bits, and the weights are rounded to it too.
            assert error < (5e-6 if self.dtype == torch.float32 else 0.04), error


chunks = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1, 14, 15, 16, 17, 31, 200, 255, 256, 300, 530]) | st.integers(0, 80),
        st.sampled_from([1, 1, 1, 2, 3, 8, 16, 17, 40]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(
    chunks=chunks,
    dtype=st.sampled_from(sorted(DTYPES)),
    level=st.sampled_from(LEVELS),
    block=st.sampled_from([16, 32, 48]),
    window=st.none() | st.integers(1, 600),
    softcap=st.sampled_from([None, None, 0.5, 30.0]),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1), (7, 1), (16, 2)]),
    width=st.sampled_from([16, 32, 48, 64, 80, 96, 128, 256]),
    seed=st.integers(0, 1000),
)
# A row of one token; a window of one, of a row exactly, one more and one less, and over the edge of two chunks.
@example(
    chunks=[(0, 1)], dtype="bfloat16", level=0, block=16, window=None, softcap=None, heads=(4, 2), width=64, seed=0
)
@example(chunks=[(300, 1)], dtype="float32", level=0, block=16, window=1, softcap=None, heads=(4, 2), width=16, seed=0)
@example(chunks=[(20, 9)], dtype="float32", level=0, block=16, window=28, softcap=None, heads=(4, 2), width=16, seed=0)
@example(chunks=[(20, 9)], dtype="float32", level=0, block=16, window=29, softcap=None, heads=(4, 2), width=16, seed=0)
@example(chunks=[(20, 9)], dtype="float32", level=0, block=16, window=30, softcap=0.5, heads=(4, 2), width=16, seed=0)
@example(
    chunks=[(250, 40)], dtype="bfloat16", level=0, block=16, window=8, softcap=None, heads=(4, 2), width=16, seed=0
)
def test_the_kernel_is_plain_attention(
    chunks: list[tuple[int, int]],
    dtype: str,
    level: int,
    block: int,
    window: int | None,
    softcap: float | None,
    heads: tuple[int, int],
    width: int,
    seed: int,
) -> None:
    rows = Rows(chunks, DTYPES[dtype], heads, width, block, window, softcap, seed)
    rows.check(rows.native(level))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("window", [None, 40])
def test_it_agrees_with_sdpa_over_blocks(level: int, dtype: Any, window: int | None) -> None:
    rows = Rows([(300, 1), (0, 45), (17, 1), (250, 30), (700, 1)], dtype, (12, 4), 64, 32, window)
    for mine, theirs in zip(rows.native(level), rows.sdpa(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "chunks", [[(3000, 1)], [(1000, 1), (5, 1)], [(40, 300), (9, 1), (600, 1)], [(7, 1)] * 40], ids=str
)
def test_threads_change_nothing(threads: Any, dtype: Any, window: int | None, chunks: Any) -> None:
    """Nor do splits of a long context, which are made only where there are threads for them."""
    rows = Rows(chunks, dtype, (6, 2), 32, window=window)
    threads(1)
    alone = rows.native()
    for count in (2, 3, 8):
        threads(count)
        for mine, theirs in zip(rows.native(), alone, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_row_is_the_same_in_company_in_chunks_and_token_by_token(level: int, dtype: Any) -> None:
    """Bit for bit: the order of its sums is that of positions, whoever else is in the pass."""
    rows = Rows([(0, 290), (400, 1), (3, 20)], dtype, (6, 2), 32)
    together = rows.native(level)[0]
    lay = native.Native(rows.pools(), 16, level).lay
    parts = []
    for start in range(0, 280, 70):
        parts += [rows.run(lay, [attention.Span(rows.tables[0], start, 70)], [0])[0]]
    parts += [rows.run(lay, [attention.Span(rows.tables[0], at, 1)], [0])[0] for at in range(280, 290)]
    assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_see_what_others_write_in_the_same_pass(threads: Any, dtype: Any) -> None:
    """A row that finds its first blocks in the cache while another still computes them."""
    threads(2)
    rows = Rows([(0, 40), (32, 9)], dtype)
    for both, first in zip(rows.known[1], rows.known[0], strict=True):
        both[:32] = first[:32]
    rows.tables[1][:2] = rows.tables[0][:2]
    lay = native.Native(rows.pools(), 16).lay
    # The reader before the writer, and no pass before this one.
    spans = [attention.Span(rows.tables[1], 32, 9), attention.Span(rows.tables[0], 0, 40)]
    outs = rows.run(lay, spans, [1, 0])
    rows.check([outs[0], outs[1]])


def test_a_nan_of_its_own_shows(threads: Any) -> None:
    """What a model computes wrongly is not to look right."""
    for dtype in DTYPES.values():
        rows = Rows([(0, 20), (0, 20)], dtype)
        for what in range(3):
            rows.known[0][what][3] = torch.nan
        broken, other = rows.native()
        assert broken[3:].isnan().any(-1).all(-1)[0] and broken[10:].isnan().all()
        assert not other.isnan().any()


def test_tensors_may_lie_in_any_way(threads: Any) -> None:
    rows = Rows([(0, 30)], torch.float32, (4, 2), 32)
    q, k, v = rows.known[0]
    expected = rows.native()[0]
    here = native.Native(rows.pools(), 16).lay([attention.Span(list(rows.tables[0]), 0, 30)])
    joined = torch.cat([q, k, v], dim=1)  # as of one projection for all three
    parts = joined[None].transpose(1, 2).split([4, 2, 2], dim=1)
    assert torch.equal(here.attend(0, *parts, rows.scaling, None, None)[0], expected)
    across = (tensor.permute(1, 2, 0).contiguous().permute(0, 2, 1)[None] for tensor in (q, k, v))  # D strided
    assert torch.equal(here.attend(0, *across, rows.scaling, None, None)[0], expected)


def test_the_operator_finds_its_pass_and_has_a_shape_for_compilers() -> None:
    rows = Rows([(0, 20)], torch.float32)
    expected = rows.native()[0]
    q, k, v = (tensor[None].transpose(1, 2) for tensor in rows.known[0])
    number = attention.new_runner()
    attention.passes[number] = native.Native(rows.pools(), 16).lay([attention.Span(rows.tables[0], 0, 20)])

    def layer(q: Any, k: Any, v: Any) -> Any:
        return torch.ops.scls.attend(q * 1, k, v, number, 0, rows.scaling, None, None) + 0

    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(q, k, v)[0], expected)
    del attention.passes[number]
    fake = torch.ops.scls.attend(q.to("meta"), k.to("meta"), v.to("meta"), number, 0, rows.scaling, None, None)
    assert fake.shape == (1, 20, 4, 16) and fake.dtype == torch.float32


# ---------------------------------------------------------------- which path runs


@pytest.mark.parametrize(
    ("changes", "block", "padded", "line"),
    [
        ({}, 16, False, f"native {native.LEVELS[min(native.kernel().level, 2)]}"),
        ({}, 4, False, "sdpa (block size 4)"),
        ({"head_dim": 24}, 16, False, "sdpa (head width 24)"),
        ({}, 16, True, "sdpa (padded layout)"),
    ],
)
def test_the_log_says_which_path_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: Any, block: int, padded: bool, line: str
) -> None:
    weights = model_.load(tiny_llama.write(tmp_path / "m", **changes), "cpu", "float32")
    with caplog.at_level(logging.INFO):
        runner = model_.ModelRunner(weights, 8, block, padded)
    assert caplog.records[0].message.split(", ")[0] == f"attention: {line}"
    model_.try_out(runner)


def test_without_the_extension_the_portable_path_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = model_.load(tiny_llama.write(tmp_path / "m"), "cpu", "float32")
    for find in (lambda name: None, lambda name: type("Spec", (), {"origin": str(tmp_path / "none.so")})):
        native.kernel.cache_clear()
        monkeypatch.setattr(native.importlib.util, "find_spec", find)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            runner = model_.ModelRunner(weights, 8, 16)
        assert [record.message for record in caplog.records] == ["attention: sdpa (no C extension of this version)"]
        model_.try_out(runner)
        monkeypatch.undo()
        native.kernel.cache_clear()
    assert native.kernel() is not None


def test_without_torchs_openmp_one_thread_computes_the_same(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads(2)
    rows = Rows([(0, 60), (300, 1)], torch.bfloat16)
    expected = rows.native()
    monkeypatch.setattr(native.kernel(), "parallel", None)
    assert native.kernel().name(torch.float32, 0).endswith(", one thread")
    for mine, theirs in zip(rows.native(), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_an_extension_of_other_sources_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field more on one side would shift all that follow."""

    class Longer(ctypes.Structure):
        _fields_ = (*native.Call._fields_, ("more", ctypes.c_int64))

    monkeypatch.setattr(native, "Call", Longer)
    native.kernel.cache_clear()
    assert native.kernel() is None
    monkeypatch.undo()
    native.kernel.cache_clear()
    assert native.kernel() is not None
