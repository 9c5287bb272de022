"""The C kernel's whole forward: it is used where it should be, does not trust its own reading of a model, and gives each row
the same bits whatever runs beside it.
"""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
from native_levels import LEVELS, PATHS, machine_at
from scls_worker.attention import Span

torch = pytest.importorskip("torch")
model_ = pytest.importorskip("scls_worker.model")
forward = pytest.importorskip("scls_worker.forward")

BLOCKS, BLOCK = 48, 16


@pytest.fixture(scope="module")
def runner_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @lru_cache
    def make(name: str, dtype: str, level: str = LEVELS[-1], eager: bool = False) -> Any:
        with machine_at(level):
            return model_.ModelRunner(weights(name, dtype), BLOCKS, BLOCK, eager=eager)

    @lru_cache
    def weights(name: str, dtype: str) -> Any:
        folder = tiny_families.write(tmp_path_factory.mktemp(name) / name, name, seed=2)
        return model_.load(folder, "cpu", dtype)

    return make


def table(row: int, tokens: int) -> list[int]:
    """Blocks of a row: no two rows share one, and none are neighbours."""
    return [(row * 4 + at) * 7 % BLOCKS for at in range(-(-tokens // BLOCK))]


def draw(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tiny_families.VOCAB, length).astype(np.uint32)


@torch.inference_mode()
def logits(runner: Any, spans: list[Span], ids: list[np.ndarray]) -> Any:
    """Of each span's last token."""
    here = runner.lay(spans)
    return runner._logits(np.concatenate([ids[i] for i in here.order]), here, range(len(spans))).clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_dense_families_take_it_and_others_do_not(runner_of: Any, name: str, dtype: str) -> None:
    assert (runner_of(name, dtype).forward is not None) is (name in forward.NORMS)
    assert runner_of(name, dtype, eager=True).forward is None


@pytest.mark.parametrize(("dtype", "level"), PATHS)
@pytest.mark.parametrize("name", sorted(forward.NORMS))
def test_a_row_has_the_same_bits_in_any_company(runner_of: Any, name: str, dtype: str, level: str) -> None:
    """Alone, and beside others: prompts, chunks of prompts, single tokens, more rows than registers hold."""
    runner = runner_of(name, dtype, level)
    rng = random.Random(name)
    ids = draw(40, 1)
    alone = [logits(runner, [Span(table(0, 40), 0, 33)], [ids[:33]])]
    alone += [logits(runner, [Span(table(0, 40), at, 1)], [ids[at : at + 1]]) for at in (33, 34)]
    for company in (1, 3, 11):
        others = [(rng.randrange(1, 48 if row < 3 else 4), row) for row in range(1, company + 1)]
        for step, (start, size) in enumerate(((0, 33), (33, 1), (34, 1))):
            spans = [Span(table(row, 64), 0, length) for length, row in others]
            spans.append(Span(table(0, 40), start, size))
            beside = [draw(length, row) for length, row in others]
            got = logits(runner, spans, [*beside, ids[start : start + size]])
            assert torch.equal(got[-1], alone[step][0]), (company, step)


@pytest.mark.parametrize(("dtype", "level"), PATHS)
def test_threads_change_no_bit(runner_of: Any, dtype: str, level: str) -> None:
    runner = runner_of("qwen3", dtype, level)
    spans = [Span(table(row, 40), 0, length) for row, length in enumerate((40, 1, 17, 5))]
    ids = [draw(span.size, at) for at, span in enumerate(spans)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(logits(runner, spans, ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(("dtype", "level"), PATHS)
def test_every_level_computes_the_same_up_to_rounding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, level: str
) -> None:
    """With products longer than the stretches in which pairs are widened. The log says which level it is."""
    folder = tiny_families.write(tmp_path / "m", "llama", seed=3, intermediate_size=1552, num_hidden_layers=1)
    weights = model_.load(folder, "cpu", dtype)
    with machine_at(level), caplog.at_level("INFO"):
        ours = model_.ModelRunner(weights, BLOCKS, BLOCK)
    assert f"forward: native {level}" in caplog.text
    exact = model_.ModelRunner(model_.load(folder, "cpu", "float32"), BLOCKS, BLOCK, eager=True)
    spans = [Span(table(row, 40), 0, length) for row, length in enumerate((40, 1, 17))]
    ids = [draw(span.size, at) for at, span in enumerate(spans)]
    expected = logits(exact, spans, ids)
    off = (logits(ours, spans, ids) - expected).abs().max() / expected.std()
    assert off < {"float32": 1e-5, "bfloat16": 0.1}[dtype]


def test_what_was_read_wrongly_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model whose norms are elsewhere than the table says: transformers' code serves it."""
    weights = model_.load(tiny_families.write(tmp_path / "m", "llama", seed=3), "cpu", "float32")
    monkeypatch.setitem(
        forward.NORMS, "llama", forward.Norms("post_attention_layernorm", None, "input_layernorm", None)
    )
    with caplog.at_level("INFO"):
        runner = model_.ModelRunner(weights, BLOCKS, BLOCK)
    assert runner.forward is None
    assert "forward: transformers (its logits are off by" in caplog.text


def test_an_inner_width_that_does_not_fit_is_left_to_transformers(tmp_path: Path) -> None:
    folder = tiny_families.write(tmp_path / "m", "llama", seed=3, intermediate_size=100)
    assert model_.ModelRunner(model_.load(folder, "cpu", "float32"), BLOCKS, BLOCK).forward is None


@pytest.mark.parametrize("level", LEVELS[:3])
@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 197},
        {"hidden_size": 70, "num_attention_heads": 2, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_odd_shapes_and_biases(tmp_path: Path, changes: dict[str, Any], level: str) -> None:
    """Where vectors and panels do not come out even."""
    weights = model_.load(tiny_families.write(tmp_path / "m", "llama", seed=3, **changes), "cpu", "float32")
    with machine_at(level):
        ours = model_.ModelRunner(weights, BLOCKS, BLOCK)
    theirs = model_.ModelRunner(weights, BLOCKS, BLOCK, eager=True)
    assert ours.forward is not None
    spans = [Span(table(row, 40), 0, length) for row, length in enumerate((40, 1, 17))]
    ids = [draw(span.size, at) % 190 for at, span in enumerate(spans)]
    expected = logits(theirs, spans, ids)
    assert (logits(ours, spans, ids) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_memory_is_given_back(runner_of: Any, tmp_path: Path) -> None:
    """After `take_over` the packed weights serve alone."""
    weights = model_.load(tiny_families.write(tmp_path / "m", "qwen2", seed=3), "cpu", "float32")
    runner = model_.ModelRunner(weights, BLOCKS, BLOCK)
    spans, ids = [Span(table(0, 20), 0, 20)], [draw(20, 5)]
    before = logits(runner, spans, ids)
    runner.forward.take_over()
    linears = [module for module in weights.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all(module.weight.numel() == 0 for module in linears)
    assert torch.equal(logits(runner, spans, ids), before)
