"""Decode steps on the device: the very step that a graph captures, called, draws what single passes draw; for all families,
greedy and by chance, in bursts of any length, beside rows that are not there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import varlen_reference
from scls_router.proto import worker_pb2 as pb
from scls_worker.folder import FAMILIES
from scls_worker.rows import Chunk, Draw, Row, RowKey
from tiny_families import VOCAB
from worker_harness import Router, of, start

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
model_ = pytest.importorskip("scls_worker.model")
graphs_ = pytest.importorskip("scls_worker.graphs")
varlen = pytest.importorskip("scls_worker.varlen")
sampling = pytest.importorskip("scls_worker.sampling")

BLOCK, BLOCKS = 4, 128
CAPPED = ("gemma2",)


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    made: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in made:
            folder = tiny_families.write(tmp_path_factory.mktemp(name) / name, name, seed=1)
            made[name] = model_.load(folder, "cpu", "float32")
        return made[name]

    return load


def runner_of(weights: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As on CUDA, but for the kernel and the capture. What nobody wrote is NaN."""
    runner = model_.ModelRunner(weights, BLOCKS + graphs_.SPARE, BLOCK, eager=True)
    for pool in (pool for pools in runner.pools for pool in pools):
        pool.fill_(torch.nan)
    if way == "single":
        return runner
    if way == "varlen":
        monkeypatch.setattr(varlen, "varlen_attn", varlen_reference.varlen_attn)
        runner.varlen = True
    runner.graphs = graphs_.Graphs(weights, runner.number, runner._lay_ones, spare=BLOCKS)
    runner.burst = runner.graphs.burst
    return runner


def talk(runner: Any, rows: Sequence[pb.RowStart], steps: int) -> Router:
    router = Router(
        runner, blocks=BLOCKS, block_size=BLOCK, vocab_size=VOCAB, max_context=256, eos_token_ids=[], max_rows=16
    )
    router.plan(1, steps=steps, add=rows)
    router.run()
    while router.engine.rows:
        last = router.engine.base.number
        keys = [key.id() for key in router.engine.rows]
        router.plan(last + 1, last, steps=steps, keep=pb.Plan.KEEP_LIST, keep_rows=keys)
        router.run()
    assert all(not report.error for report in of(router.session.sent, "slice_report"))
    return router


def rows(count: int, temperatures: Sequence[float]) -> list[pb.RowStart]:
    made = []
    for i in range(count):
        prompt = [(31 * i + 17 * j + j * j) % (VOCAB - 10) + 5 for j in range(3 + 5 * i % 13)]
        heat = temperatures[i % len(temperatures)]
        made.append(start(i + 1, prompt, 9 + 4 * (i % 4), temperature=heat, seed=2**64 - 1 - i))
    return made


@pytest.mark.parametrize("way", ["sdpa", "varlen"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families(weights_of: Any, name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "varlen" and name in CAPPED:
        pytest.skip("the kernel knows no soft cap")
    weights, asked = weights_of(name), rows(5, (0.0, 0.0, 0.8))
    alone = talk(runner_of(weights, "single", monkeypatch), asked, 100)
    runner = runner_of(weights, way, monkeypatch)
    assert talk(runner, asked, 100).outputs == alone.outputs
    assert runner.graphs.passes > 15 and runner.graphs.waits < runner.graphs.passes / 2
    # Rows leave: eight places, then four, two, one; with chance and, behind it, without.
    assert {key[0] for key in runner.graphs.steps} >= {8, 4}


@pytest.mark.parametrize("temperatures", [(0.0,), (0.7,), (0.0, 1.3, 0.2)])
@pytest.mark.parametrize(("count", "steps"), [(1, 100), (2, 3), (3, 7), (9, 100), (11, 5)])
def test_bursts_and_buckets_change_nothing(
    weights_of: Any, count: int, steps: int, temperatures: Sequence[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, asked = weights_of("qwen3"), rows(count, temperatures)
    alone = talk(runner_of(weights, "single", monkeypatch), asked, 100)
    assert sum(len(set(output)) for output in alone.outputs.values()) > 4 * count
    # A stop in the middle of one row: what it draws behind it is nobody's.
    for row, output in zip(asked[1:], list(alone.outputs.values())[1:], strict=True):
        row.limits.stop_token_ids.append(output[4])
    alone = talk(runner_of(weights, "single", monkeypatch), asked, steps)
    together = talk(runner_of(weights, "sdpa", monkeypatch), asked, steps)
    assert together.outputs == alone.outputs and together.finishes == alone.finishes
    assert sorted(together.pool.names()) == sorted(alone.pool.names())


def test_rows_that_are_not_plain_draw_as_they_did(weights_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, asked = weights_of("llama"), rows(4, (0.0, 0.9))
    asked[1].sampling.top_k = 5
    asked[2].sampling.presence_penalty = 0.7
    alone = talk(runner_of(weights, "single", monkeypatch), asked, 100)
    assert talk(runner_of(weights, "sdpa", monkeypatch), asked, 100).outputs == alone.outputs


def test_single_passes_take_the_same_steps(weights_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a batch at iteration level runs, or one of slow steps."""
    weights, asked = weights_of("llama"), rows(3, (0.0, 0.9))
    alone = talk(runner_of(weights, "single", monkeypatch), asked, 100)
    runner = runner_of(weights, "sdpa", monkeypatch)
    runner.burst = None
    assert talk(runner, asked, 100).outputs == alone.outputs
    assert runner.graphs.passes == runner.graphs.waits > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(tmp_path: Path) -> None:
    weights = model_.load(tiny_families.write(tmp_path / "m", "qwen3", seed=1), "cuda", "float32")
    asked = rows(11, (0.0, 0.0, 0.8))
    alone = talk(model_.ModelRunner(weights, BLOCKS, BLOCK, eager=True), asked, 100)
    runner = model_.ModelRunner(weights, BLOCKS, BLOCK)
    assert talk(runner, asked, 7).outputs == alone.outputs
    assert runner.graphs.captures and all(step.graph is not None for step in runner.graphs.steps.values())
    runner.graphs.compile_behind().join()
    assert talk(runner, asked, 100).outputs == alone.outputs
    assert runner.graphs.forward is not weights


def test_numbers_that_lie_on_the_device_draw_the_same() -> None:
    random = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(64, 300, generator=random)
    draws = [Draw(temperature=(0.0, 0.01, 0.7, 4.0)[i % 4], seed=(2**64 - i) % 2**64 // (1 + i % 3)) for i in range(64)]
    wants = [sampling.Want(draw, 1000 * i) for i, draw in enumerate(draws)]
    expected = [drawn.token for drawn in sampling.draw_tokens(logits.clone(), wants)]
    seeds = torch.tensor([sampling.seed_key(draw.seed) for draw in draws])
    heat = torch.tensor([[draw.temperature] for draw in draws])
    drawn = sampling.draw_plainly(logits, seeds, 1000 * torch.arange(64), heat)
    assert drawn.tolist() == expected and len(set(expected)) > 30


def test_buckets() -> None:
    buckets = [graphs_.bucket(rows) for rows in range(1, 66)]
    assert sorted(set(buckets)) == [1, 2, 4, 8, *range(16, 73, 8)]
    assert all(rows <= bucket < 2 * rows for rows, bucket in enumerate(buckets, 1))


# ---------------------------------------------------------------- one burst


def chunks_of(lengths: Sequence[int], blocks: int = 8) -> list[Chunk]:
    made = []
    for i, length in enumerate(lengths):
        ids = (np.arange(length + 60, dtype=np.uint32) * 7 + i) % VOCAB
        row = Row(RowKey(i, 0, 0), 0, ids.astype(np.uint32), length, length, 60)
        row.blocks.extend(range(i * blocks, (i + 1) * blocks))
        made.append(Chunk(row, length - 1, 1, draws=True))
    return made


def test_a_burst_ends_early_when_somebody_speaks(weights_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(weights_of("llama"), "sdpa", monkeypatch)
    chunks = chunks_of([1])
    whole = runner.burst(chunks, 29, None)
    assert len(whole) == 29
    early = runner.burst(chunks, 29, True)
    assert early == whole[: graphs_.LOT]
    assert runner.graphs.waits == 2 and runner.graphs.passes == 29 + graphs_.LOT


def test_a_burst_is_no_longer_than_its_buffer(weights_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_, "MOST", 5)
    runner = runner_of(weights_of("llama"), "sdpa", monkeypatch)
    assert len(runner.burst(chunks_of([1]), 29, None)) == 5


def test_rows_that_are_not_there_touch_their_own_block_alone(weights_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(weights_of("llama"), "sdpa", monkeypatch)
    runner.burst(chunks_of([1, 1, 1]), 6, None)
    for keys, values in runner.pools:
        for pool in (keys, values):
            touched = (~pool.isnan()).flatten(1).any(1).nonzero()[:, 0].tolist()
            rows = [i * 8 * BLOCK + at for i in range(3) for at in range(6)]
            assert touched == [*rows, BLOCKS * BLOCK]


@pytest.mark.parametrize("how", ["right", "wrong", "failing"])
def test_what_is_compiled_runs_when_it_is_done_and_draws_the_same(
    weights_of: Any, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = torch.compile

    def compile_(model: Any, dynamic: bool) -> Any:
        if how == "failing":
            raise RuntimeError("no C compiler")
        compiled = real(model, dynamic=dynamic, backend="aot_eager", fullgraph=True)

        def forward(**given: Any) -> Any:
            out = compiled(**given)
            out.logits *= 1.1 if how == "wrong" else 1
            return out

        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    runner = runner_of(weights_of("llama"), "sdpa", monkeypatch)
    one, three = chunks_of([1]), chunks_of([1, 1, 1])
    expected = [runner.burst(chunks, 9, None) for chunks in (one, three)]
    with caplog.at_level("INFO"):
        runner.graphs.compile_behind().join()
    assert ("not compiled" in caplog.text) is (how != "right")
    assert [runner.burst(chunks, 9, None) for chunks in (one, three)] == expected
    assert (runner.graphs.forward is runner.model) is (how != "right")
    # What was made of the family's own code is gone.
    assert all(step.forward is runner.graphs.forward for step in runner.graphs.steps.values())


class Captured:
    """A capture on a device without graphs: replaying it calls the step."""

    def __init__(self, step: Any, wrong: bool) -> None:
        self.step, self.wrong = step, wrong

    def replay(self) -> None:
        self.step.run()
        if self.wrong:
            self.step.out += 1


@pytest.mark.parametrize("how", ["right", "wrong", "failing"])
def test_a_graph_is_believed_only_if_it_draws_the_same(
    weights_of: Any, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def capture(step: Any, pool: Any) -> None:
        if how == "failing":
            raise RuntimeError("operation not permitted when stream is capturing")
        step.graph = Captured(step, how == "wrong")

    class Event:
        def record(self) -> None:
            pass

        synchronize = record

    weights, chunks = weights_of("llama"), chunks_of([1, 1, 1])
    expected = runner_of(weights, "sdpa", monkeypatch).burst(chunks, 20, None)
    monkeypatch.setattr(graphs_.Step, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    runner = runner_of(weights, "sdpa", monkeypatch)
    runner.graphs.captures = True
    assert runner.burst(chunks, 20, None) == expected
    (step,) = runner.graphs.steps.values()
    assert (step.graph is not None) is runner.graphs.captures is (how == "right")
    assert ("graphs: none from now on" in caplog.text) is (how != "right")
    # Three lots: the first is waited for while the second runs.
    assert runner.graphs.waits == (2 if how == "right" else 1)
