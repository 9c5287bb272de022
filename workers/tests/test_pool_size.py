"""How many blocks a GPU's pool gets. The numbers behind it are measured where there is one."""

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from scls_worker.options import parser

torch = pytest.importorskip("torch")
memory = pytest.importorskip("scls_worker.memory")
model_ = pytest.importorskip("scls_worker.model")

GIB = 1 << 30


def test_passes_and_a_margin_come_before_the_pool() -> None:
    block = 1 << 20
    spare = round(1 / memory.CUDA_SPARE)
    free = spare * 1024 * block
    # All but the margin and the passes, and a few blocks less, which no row has.
    assert memory.fitting(free, [0, 0], block, gathers=False) == pytest.approx((spare - 1) * 1024, rel=0.05)
    without = memory.fitting(free, [0, 0], block, gathers=False)
    assert memory.fitting(free, [100 * block, 28 * block], block, gathers=False) == without - 128
    # KV that is gathered is there twice.
    assert memory.fitting(free, [0, 0], block, gathers=True) == int(free * memory.CUDA_GATHERED) // block - memory.SPARE


@given(free=st.integers(0, 200 * GIB), peaks=st.lists(st.integers(0, 50 * GIB), max_size=2), gathers=st.booleans())
def test_property_it_fits_or_is_one_block(free: int, peaks: list[int], gathers: bool) -> None:
    block = 2 << 20
    blocks = memory.fitting(free, peaks, block, gathers)
    assert blocks == 1 or (blocks + memory.SPARE) * block + sum(peaks) <= free


def test_the_passes_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest there are: all rows, and a chunk of the budget; and they run."""
    weights = model_.load(tiny_llama.write(tmp_path / "m"), "cpu", "float32")
    options = parser().parse_args(["--model", str(tmp_path / "m"), "--chunk-tokens", "100", "--max-rows", "9"])
    seen: list[list[Any]] = []

    def peak(runner: Any, chunks: Any) -> int:
        assert len(runner.run(chunks)) == len(chunks)
        seen.append(chunks)
        return 1000 * len(chunks)

    class Device(str):
        type = "cuda"

    class Cuda:
        """A model that says it lies on a GPU."""

        config, dtype, device = weights.config, weights.dtype, Device()

    monkeypatch.setattr(memory, "peak_of", peak)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, 2 * GIB))
    made: list[int] = []

    def probe(blocks: int) -> Any:
        made.append(blocks)
        return model_.ModelRunner(weights, blocks, options.block_size, eager=True)

    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    expected = memory.fitting(GIB, [1000, 9000], 16 * token, gathers=True)
    assert memory.default_blocks(Cuda(), options, 256, probe) == expected
    assert made == [9] and [[chunk.size for chunk in chunks] for chunks in seen] == [[100], [1] * 9]
