"""The real runner on a tiny random Llama, fp32: what the engine draws is what transformers' own `generate` draws."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from scls_router.proto import worker_pb2 as pb
from scls_worker.options import build, parser
from worker_harness import Router, ids_of, of, row_id, start

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
model_ = pytest.importorskip("scls_worker.model")

LIST, NONE = pb.Plan.KEEP_LIST, pb.Plan.KEEP_NONE
BLOCKS, BLOCK = 64, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_llama.write(tmp_path_factory.mktemp("tiny") / "tiny")


def options(folder: Path, *more: str) -> argparse.Namespace:
    return parser().parse_args(["--model", str(folder), "--device", "cpu", "--threads", "1", *more])


@pytest.fixture(scope="module")
def weights(folder: Path) -> Any:
    return model_.load(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def router(weights: Any) -> Router:
    runner = model_.ModelRunner(weights, BLOCKS, BLOCK)
    return Router(runner, blocks=BLOCKS, vocab_size=tiny_llama.VOCAB, max_context=256, eos_token_ids=[])


def prompt(request: int, length: int) -> list[int]:
    return [(31 * request + 17 * i + i * i) % (tiny_llama.VOCAB - 10) + 5 for i in range(length)]


def generate(plain: Any, ids: Sequence[int], count: int) -> list[int]:
    tokens = torch.tensor([list(ids)])
    # Without a mask, generate takes ids that equal the pad id for padding.
    mask = torch.ones_like(tokens)
    out = plain.generate(
        tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def row(request: int, length: int, max_tokens: int, **fields: Any) -> pb.RowStart:
    return start(request, prompt(request, length), max_tokens, **fields)


def check(router: Router, plain: Any, *rows: pb.RowStart) -> None:
    for start_ in rows:
        expected = generate(plain, ids_of(start_), start_.limits.max_tokens)
        assert router.outputs[start_.row.request, 0] == expected


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_chunked_prefill_in_mixed_batches(weights: Any, plain: Any, chunk: int) -> None:
    runner = model_.ModelRunner(weights, BLOCKS, BLOCK)
    router = Router(
        runner, blocks=BLOCKS, vocab_size=tiny_llama.VOCAB, max_context=256, eos_token_ids=[], chunk_tokens=chunk
    )
    rows = [row(1, 13, 20), row(2, 1, 9), row(3, 30, 12), row(4, 7, 25)]
    router.plan(1, steps=7, add=rows[:2])
    router.plan(2, 1, add=rows[2:])
    router.run()
    check(router, plain, *rows)
    assert len({tuple(output) for output in router.outputs.values()}) == 4
    assert len(set(router.outputs[4, 0])) > 3


def test_kv_held_dropped_and_evicted(router: Router, plain: Any) -> None:
    rows = [row(1, 13, 30), row(2, 9, 30), row(3, 21, 30)]
    router.plan(1, steps=4, add=rows)
    router.run()
    router.say(release_kv=pb.ReleaseKv(rows=[row_id(2)]))
    # A row that wants nearly all blocks: the held ones go.
    large = row(4, 200, 40)
    router.plan(2, 1, keep=NONE, add=[large])
    router.run()
    assert [len(row.blocks) for row in router.engine.rows.values()] == [0, 0, 0]
    router.plan(3, 2, keep=LIST, keep_rows=[row_id(i) for i in (1, 2, 3)])
    router.run()
    check(router, plain, *rows, large)


def test_a_warm_prefix(router: Router, plain: Any) -> None:
    first = row(1, 30, 12)
    router.plan(1, add=[first])
    router.run()
    follow_up = ids_of(first) + router.outputs[1, 0] + prompt(7, 9)
    second, third = start(2, follow_up, 12), start(3, follow_up, 12)
    router.plan(2, 1, add=[second, third])
    steps = of(router.run(), "step")
    cached = {
        row.row.request: row.cached_tokens for step in steps for row in step.rows if row.HasField("cached_tokens")
    }
    # The third shares with the second in the very pass that computes it.
    assert cached[2] == 40 and cached[3] >= 40
    check(router, plain, second, third)
    assert router.outputs[2, 0] == router.outputs[3, 0]


def test_rows_that_share_within_one_pass(router: Router, plain: Any) -> None:
    rows = [start(i, prompt(1, 15), 10) for i in (1, 2, 3)]
    router.plan(1, add=rows)
    router.step()
    assert router.engine.batch.rows[1].found == 12
    router.run()
    check(router, plain, *rows)


def test_a_row_continued_from_its_output_ids(router: Router, plain: Any) -> None:
    expected = generate(plain, prompt(1, 11), 20)
    router.plan(1, add=[row(1, 11, 20, output=expected[:7])])
    router.run()
    assert router.outputs[1, 0] == expected[7:]


def test_min_tokens_masks_stop_ids(router: Router, plain: Any) -> None:
    expected = generate(plain, prompt(1, 11), 10)
    router.plan(1, add=[row(1, 11, 10, stop_token_ids=[expected[3]], min_tokens=6)])
    router.run()
    output = router.outputs[1, 0]
    assert output[:3] == expected[:3] and expected[3] not in output[:6]


def test_draws_do_not_depend_on_slices_batches_or_places(weights: Any) -> None:
    outputs = []
    for steps, company in ((100, 0), (3, 0), (100, 3)):
        router = Router(
            model_.ModelRunner(weights, BLOCKS, BLOCK), vocab_size=tiny_llama.VOCAB, max_context=256, eos_token_ids=[]
        )
        hot = [row(1, 13, 20, temperature=0.8, seed=2**63 + 5), row(2, 13, 20, temperature=1.5, seed=7)]
        router.plan(1, steps=steps, add=[*(row(10 + i, 9, 5) for i in range(company)), *hot])
        router.run()
        while router.engine.rows:
            last = router.engine.base.number
            router.plan(last + 1, last, steps=steps)
            router.run()
        outputs.append((router.outputs[1, 0], router.outputs[2, 0]))
    assert outputs[0] == outputs[1] == outputs[2]
    # And the token index counts from the output's start, wherever it is continued.
    router = Router(
        model_.ModelRunner(weights, BLOCKS, BLOCK), vocab_size=tiny_llama.VOCAB, max_context=256, eos_token_ids=[]
    )
    router.plan(1, add=[row(1, 13, 20, temperature=0.8, seed=2**63 + 5, output=outputs[0][0][:5])])
    router.run()
    assert router.outputs[1, 0] == outputs[0][0][5:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(folder: Path, plain: Any) -> None:
    served = build(parser().parse_args(["--model", str(folder), "--device", "cuda", "--dtype", "float32"]))
    assert served.info.blocks > 64
    router = Router(
        model_.ModelRunner(served.runner.model, BLOCKS, BLOCK),
        blocks=BLOCKS,
        vocab_size=tiny_llama.VOCAB,
        max_context=256,
        eos_token_ids=[],
    )
    rows = [row(1, 13, 20), row(2, 1, 9), row(3, 30, 12)]
    router.plan(1, steps=7, add=rows[:2])
    router.plan(2, 1, add=rows[2:])
    router.run()
    check(router, plain, *rows)


def test_build_model(folder: Path) -> None:
    served = build(options(folder, "--max-context", "100", "--served-name", "a", "--served-name", "b"))
    info = served.info
    assert (info.max_context, info.blocks, list(info.eos_token_ids)) == (100, 25, [2])
    assert list(info.served_names) == ["a", "b"] and info.vocab_size == tiny_llama.VOCAB
    assert [path.name for path in served.tokenizer] == ["tokenizer.json", "generation_config.json"]
    assert (info.device, info.dtype) == ("cpu", "float32")
    again = build(options(folder)).info
    assert again.model_digest == info.model_digest and again.tokenizer_digest == info.tokenizer_digest
    assert again.worker_epoch != info.worker_epoch and list(again.served_names) == ["tiny"]
