"""The C kernel's draws and bursts: what they draw is what torch's code draws, but for the last bit of a logarithm, and a burst
is its passes one by one.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import tiny_families
from hypothesis import given, settings
from hypothesis import strategies as st
from scls_worker.engine import Interrupt
from scls_worker.rows import Chunk, Draw, Row, RowKey

torch = pytest.importorskip("torch")
model_ = pytest.importorskip("scls_worker.model")
sampling = pytest.importorskip("scls_worker.sampling")
native = pytest.importorskip("scls_worker.native")

BLOCKS, BLOCK = 64, 16


@pytest.fixture(scope="module")
def runner_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    kernel = native.kernel()
    if kernel is None or kernel.level < native.LEVELS.index("avx512"):
        pytest.skip("needs the C extension and AVX-512")

    @lru_cache
    def make(name: str, **changes: int) -> Any:
        folder = tiny_families.write(tmp_path_factory.mktemp(name) / name, name, seed=2, **changes)
        return model_.ModelRunner(model_.load(folder, "cpu", "float32"), BLOCKS, BLOCK)

    return make


def row(
    number: int, length: int, temperature: float = 0.0, stops: frozenset[int] = frozenset(), most: int = 200
) -> Row:
    """One whose prompt is computed but for its last token."""
    tokens = np.zeros(length + most, dtype=np.uint32)
    tokens[:length] = np.random.default_rng(number).integers(0, tiny_families.VOCAB, length)
    made = Row(
        RowKey(number, 0, 0), 0, tokens, length, length, most, stops=stops, draw=Draw(temperature, seed=number * 7)
    )
    made.blocks.extend((number * 5 + at) * 11 % BLOCKS for at in range(5))
    return made


def prefill(runner: Any, rows: list[Row]) -> None:
    for one in rows:
        if one.known > 1:
            runner.run([Chunk(one, 0, one.known - 1, draws=False)])
        one.computed = one.known - 1


def single(runner: Any, rows: list[Row], passes: int) -> list[list[int]]:
    told = []
    for _ in range(passes):
        drawn = runner.run([Chunk(one, one.computed, 1, draws=True) for one in rows])
        told.append([one.token for one in drawn])
        for one, token in zip(rows, told[-1], strict=True):
            one.tokens[one.known] = token
            one.known += 1
            one.computed += 1
    return told


SOME = ((20, 0.0), (1, 0.8), (33, 1.0), (16, 0.0), (17, 0.01))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3"])
def test_a_burst_is_its_passes(runner_of: Any, name: str) -> None:
    runner = runner_of(name)
    rows = [row(at, *some) for at, some in enumerate(SOME)]
    prefill(runner, rows)
    expected = single(runner, rows, 24)
    again = [row(at, *some) for at, some in enumerate(SOME)]
    prefill(runner, again)
    got: list[list[int]] = []
    for most in (1, 5, 2, 16):
        passes = runner.burst([Chunk(one, one.computed, 1, draws=True) for one in again], most, Interrupt())
        assert len(passes) == most
        got += passes
        for one, tokens in zip(again, zip(*passes, strict=True), strict=True):
            one.tokens[one.known : one.known + most] = tokens
            one.known += most
            one.computed += most
    assert got == expected
    assert len({tuple(drawn) for drawn in got}) > 1


def test_a_stop_ends_a_burst(runner_of: Any) -> None:
    runner = runner_of("llama")
    rows = [row(at, *some) for at, some in enumerate(SOME)]
    prefill(runner, rows)
    expected = single(runner, rows, 12)
    stop = expected[4][2]
    first = next(at for at, drawn in enumerate(expected) if stop in drawn)
    again = [
        row(at, *some, stops=frozenset({5000 + at, stop}) if at == 1 else frozenset()) for at, some in enumerate(SOME)
    ]
    prefill(runner, again)
    passes = runner.burst([Chunk(one, one.computed, 1, draws=True) for one in again], 12, Interrupt())
    assert passes == expected[: first + 1]


def test_who_interrupts_waits_for_one_pass_and_no_more(runner_of: Any) -> None:
    runner = runner_of("llama")
    rows = [row(at, *some) for at, some in enumerate(SOME)]
    prefill(runner, rows)
    interrupt = Interrupt()
    interrupt.set()
    chunks = [Chunk(one, one.computed, 1, draws=True) for one in rows]
    assert len(runner.burst(chunks, 20, interrupt)) == 1


def test_where_logits_are_bent_there_are_no_bursts(runner_of: Any) -> None:
    assert runner_of("gemma2").forward is not None and runner_of("gemma2").burst is None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700), st.integers(0, 2**64 - 1), st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0])
)
def test_property_the_kernel_draws_what_torch_draws(vocab: int, seed: int, place: int, temperature: float) -> None:
    kernel = native.kernel()
    if kernel is None or kernel.level < native.LEVELS.index("avx512"):
        pytest.skip("needs the C extension and AVX-512")
    logits = torch.from_numpy(np.random.default_rng(seed % 1000).normal(0, 3, (3, vocab)).astype(np.float32))
    logits[1, :] = 0.5  # of equals the first, where nothing is drawn
    logits[2, vocab // 2] = math.nan if temperature == 0 else -math.inf
    logits[2, 0] = 9.0
    expected, scores = drawn_by_torch(logits, seed, place, temperature)
    for i, token in enumerate(drawn_by_kernel(kernel, logits, seed, place, temperature)):
        if token != expected[i]:  # so close that a rounding decides
            assert temperature > 0 and abs(scores[i, token] - scores[i, expected[i]]) < 1e-5, (i, token, expected[i])


def drawn_by_torch(logits: Any, seed: int, place: int, temperature: float) -> tuple[list[int], Any]:
    wants = [sampling.Want(Draw(temperature, seed=seed + i & (2**64 - 1)), place + i) for i in range(len(logits))]
    expected = [one.token for one in sampling.draw_tokens(logits.clone(), wants)]
    if temperature == 0:
        return expected, logits
    keys = torch.tensor([sampling._signed(sampling.row_key(want.draw.seed, want.place)) for want in wants])
    heated = (logits - logits.amax(-1, keepdim=True)) / temperature
    return expected, heated - sampling._race(keys, logits.shape[-1]).log()


def drawn_by_kernel(kernel: Any, logits: Any, seed: int, place: int, temperature: float) -> list[int]:
    from scls_worker import forward

    rows = [row(i, 1, temperature) for i in range(len(logits))]
    for i, one in enumerate(rows):
        one.draw = Draw(temperature, seed=seed + i & (2**64 - 1))
        one.prompt_len = 1 - place - i  # so that this is the token's place
    decoder = forward._Decoder(threads=1)
    decoder.head.n = logits.shape[-1]
    draws = forward._Drawing(rows, 1)
    kernel.library.scls_draw(
        forward.byref(decoder), forward.byref(draws.call), forward.c_void_p(logits.data_ptr()), len(logits)
    )
    drawn: list[int] = draws.drawn[0].tolist()
    return drawn


def test_draws_follow_the_probabilities() -> None:
    """Ten thousand draws from five ids: each as often as its probability says, to four standard deviations."""
    kernel = native.kernel()
    if kernel is None or kernel.level < native.LEVELS.index("avx512"):
        pytest.skip("needs the C extension and AVX-512")
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])
    wanted = torch.softmax(logits[0] / 0.7, -1).tolist()
    count = 10_000
    drawn = np.bincount([drawn_by_kernel(kernel, logits, 12345, place, 0.7)[0] for place in range(count)], minlength=5)
    for got, p in zip(drawn, wanted, strict=True):
        assert abs(got - count * p) < 4 * math.sqrt(count * p * (1 - p))
