"""Every family on a tiny random model, fp32: greedy tokens are transformers' own, and logits equal up to rounding."""

import argparse
import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
from native_levels import LEVELS, machine_at
from scls_router.proto import worker_pb2 as pb
from scls_worker.errors import StartupError
from scls_worker.folder import FAMILIES, check_family
from scls_worker.forward import NORMS
from scls_worker.options import build, parser
from tiny_families import VOCAB
from worker_harness import Router, ids_of, of, row_id, start

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
model_ = pytest.importorskip("scls_worker.model")
attention = pytest.importorskip("scls_worker.attention")
rectangle = pytest.importorskip("scls_worker.rectangle")

LIST, NONE = pb.Plan.KEEP_LIST, pb.Plan.KEEP_NONE
TOKENS = 256  # that a pool holds
# Where transformers itself can hardly tell its two best tokens apart, nothing more is asked of a row.
TIE = 1e-4


def options(folder: Path, *more: str) -> argparse.Namespace:
    return parser().parse_args(["--model", str(folder), "--device", "cpu", "--threads", "1", *more])


class Family:
    """One model twice: in our runner, and in transformers with its own attention and cache."""

    def __init__(self, folder: Path, block: int = 4, level: str | None = None) -> None:
        self.folder, self.block, self.level = folder, block, level  # of the whole forward; None: transformers' own
        self.weights = model_.load(folder, "cpu", "float32")
        # Eager: SDPA knows no soft cap, and a reference should be simple.
        self.plain = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def router(self, chunk_tokens: int = 16, padded: bool = False) -> Router:
        return Router(
            self.runner(padded),
            blocks=TOKENS // self.block,
            block_size=self.block,
            vocab_size=VOCAB,
            max_context=256,
            eos_token_ids=[],
            chunk_tokens=chunk_tokens,
            padded=padded,
        )

    def runner(self, padded: bool = False) -> Any:
        eager = self.level is None
        with machine_at(self.level or LEVELS[-1]):
            runner = model_.ModelRunner(self.weights, TOKENS // self.block, self.block, padded, eager)
        assert padded or (runner.native is not None) is (self.block == 16)
        assert (runner.forward is not None) is (not padded and not eager)
        return runner

    def check(self, router: Router, *rows: pb.RowStart) -> None:
        for row in rows:
            self.check_output(ids_of(row), router.outputs[row.row.request, 0], row.limits.max_tokens)

    def check_output(self, ids: Sequence[int], output: list[int], count: int) -> None:
        tokens = torch.tensor([list(ids)])
        answer = self.plain.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        expected = answer.sequences[0, len(ids) :].tolist()
        assert len(output) == count
        for i, (ours, theirs) in enumerate(zip(output, expected, strict=True)):
            if ours != theirs:
                best = answer.logits[i][0].topk(2).values
                assert best[0] - best[1] < TIE, f"token {i}: {output[i:]}, not {expected[i:]}"
                return


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)

    @lru_cache
    def make(name: str, block: int = 4, level: str | None = None) -> Family:
        return Family(tiny_families.write(tmp_path_factory.mktemp(name) / name, name, seed=1), block, level)

    return make


# Blocks of 4 go through SDPA, blocks of 16 through the kernel's attention, or its whole forward at some level.
PATHS = [(name, *how) for name in FAMILIES for how in ((4, None), (16, None))]
PATHS += [(name, 16, level) for name in FAMILIES if name in NORMS for level in LEVELS[:3]]


@pytest.fixture(params=PATHS, ids=lambda path: "-".join(map(str, path)))
def family(request: pytest.FixtureRequest, family_of: Any) -> Family:
    made: Family = family_of(*request.param)
    return made


def prompt(request: int, length: int) -> list[int]:
    return [(31 * request + 17 * i + i * i) % (VOCAB - 10) + 5 for i in range(length)]


def row(request: int, length: int, max_tokens: int, **fields: Any) -> pb.RowStart:
    return start(request, prompt(request, length), max_tokens, **fields)


# 5 is no multiple of a block, and chunks of it end inside every window; 64 takes any prompt here whole.
@pytest.mark.parametrize("chunk", [1, 5, 64, "padded"])
def test_slices_of_mixed_batches(family: Family, chunk: int | str) -> None:
    router = family.router(padded=True) if chunk == "padded" else family.router(int(chunk))
    rows = [row(1, 13, 20), row(2, 1, 12), row(3, 30, 12), row(4, 7, 18)]
    router.plan(1, steps=7, add=rows[:2])
    router.plan(2, 1, steps=3, add=rows[2:])
    router.run()
    while router.engine.rows:
        last = router.engine.base.number
        router.plan(last + 1, last, steps=5)
        router.run()
    family.check(router, *rows)
    # The outputs are worth a comparison.
    assert sum(len(set(output)) for output in router.outputs.values()) > 20


def test_kv_dropped_and_prefixes_found(family: Family) -> None:
    router = family.router()
    first, other = row(1, 26, 14), row(2, 9, 20)
    router.plan(1, steps=4, add=[first, other])
    router.run()
    router.say(release_kv=pb.ReleaseKv(rows=[row_id(2)]))
    router.plan(2, 1, keep=LIST, keep_rows=[row_id(1), row_id(2)])
    router.run()
    # What was computed outside a window is found all the same.
    follow_up = ids_of(first) + router.outputs[1, 0] + prompt(7, 9)
    second, third = start(3, follow_up, 12), start(4, follow_up, 12)
    router.plan(3, 2, keep=NONE, add=[second, third])
    steps = of(router.run(), "step")
    cached = {row.row.request: row.cached_tokens for s in steps for row in s.rows if row.HasField("cached_tokens")}
    found = 39 // family.block * family.block
    assert cached[3] == found and cached[4] >= found
    family.check(router, first, other, second, third)


def test_logits_up_to_rounding_and_the_same_in_company_as_alone(family: Family) -> None:
    """Rows prefilled in random chunks, all rows in one pass, and each alone in passes of its own."""
    rng = random.Random(0)
    prompts = [prompt(request, length) for request, length in enumerate([37, 2, 24, 11])]
    together = Prefill(family, prompts)
    alone = [Prefill(family, [ids]) for ids in prompts]
    with torch.inference_mode():
        expected = [family.plain(torch.tensor([ids])).logits[0] for ids in prompts]
    scale = max(logits.abs().max() for logits in expected)
    while sizes := {
        i: rng.randint(1, min(13, len(prompts[i]) - done))
        for i, done in enumerate(together.done)
        if done < len(prompts[i])
    }:
        for i, logits in together.run(sizes).items():
            mine = alone[i].run({0: sizes[i]})[0]
            theirs = expected[i][together.done[i] - 1]
            torch.testing.assert_close(logits, theirs, rtol=0, atol=float(2e-5 * scale))
            torch.testing.assert_close(logits, mine, rtol=0, atol=float(2e-5 * scale))


def test_logits_of_a_rectangle_up_to_rounding(family: Family) -> None:
    """All prompts in one pass, then a token of each row at a time, over what an earlier batch has left: NaN."""
    prompts = [prompt(request, length) for request, length in enumerate([33, 2, 24, 11])]
    sizes = [len(ids) - 3 if len(ids) > 4 else 1 for ids in prompts]
    runner = family.runner(padded=True)
    for pool in (pool for pools in runner.pools for pool in pools):
        pool.fill_(torch.nan)
    with torch.inference_mode():
        expected = [family.plain(torch.tensor([ids])).logits[0] for ids in prompts]
    scale = max(logits.abs().max() for logits in expected)
    for step in range(4):
        starts = (
            [0] * 4 if step == 0 else [min(size + step, len(ids)) - 1 for size, ids in zip(sizes, prompts, strict=True)]
        )
        counts = sizes if step == 0 else [1] * 4
        here = rectangle.Rectangle(starts, counts, 36, runner.pools, runner.device)
        cells = [
            (ids[first:][:count] + [7] * 40)[: max(counts)]
            for ids, first, count in zip(prompts, starts, counts, strict=True)
        ]
        with torch.inference_mode():
            logits = runner._logits(np.array(cells, dtype=np.uint32).reshape(-1), here, range(4))
        for mine, theirs, first, count in zip(logits, expected, starts, counts, strict=True):
            torch.testing.assert_close(mine, theirs[first + count - 1], rtol=0, atol=float(2e-5 * scale))


class Prefill:
    def __init__(self, family: Family, prompts: list[list[int]]) -> None:
        self.runner, self.prompts = family.runner(), prompts
        self.done = [0] * len(prompts)
        each = TOKENS // family.block // len(prompts)
        self.blocks = [list(range(i * each, (i + 1) * each))[::-1] for i in range(len(prompts))]

    @torch.inference_mode()
    def run(self, sizes: dict[int, int]) -> dict[int, Any]:
        """That many further tokens of these rows in one pass; the logits of the last token of each."""
        rows = list(sizes)
        spans = [attention.Span(self.blocks[i], self.done[i], sizes[i]) for i in rows]
        here = self.runner.lay(spans)
        ids = [id_ for at in here.order for id_ in self.prompts[rows[at]][spans[at].start :][: spans[at].size]]
        logits = self.runner._logits(np.array(ids, dtype=np.uint32), here, range(len(rows)))
        for i in rows:
            self.done[i] += sizes[i]
        return {rows[at]: logits[place] for place, at in enumerate(here.order)}


def test_a_family_is_built_from_its_folder(family: Family) -> None:
    served = build(options(family.folder, "--max-context", "100", "--block-size", "4"))
    # A window makes no row shorter: the pool holds four rows of full length for any family.
    assert (served.info.vocab_size, served.info.max_context, served.info.blocks) == (VOCAB, 100, 100)
    assert list(served.info.eos_token_ids) == [2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("padded", [False, True])
def test_on_cuda(family: Family, padded: bool) -> None:
    blocks = TOKENS // family.block
    runner = model_.ModelRunner(model_.load(family.folder, "cuda", "float32"), blocks, family.block, padded)
    router = Router(
        runner,
        blocks=blocks,
        block_size=family.block,
        vocab_size=VOCAB,
        max_context=256,
        eos_token_ids=[],
        chunk_tokens=5,
        padded=padded,
    )
    rows = [row(1, 13, 20), row(2, 1, 12), row(3, 30, 12)]
    router.plan(1, add=rows)
    router.run()
    family.check(router, *rows)


def test_bfloat16_runs(family_of: Any) -> None:
    """Not compared: bfloat16 tokens depend on the batch. But every path has to keep its types."""
    for name in ("gemma2", "mixtral"):
        weights = model_.load(family_of(name).folder, "cpu", "bfloat16")
        for padded in (False, True):
            runner = model_.ModelRunner(weights, 16, 16, padded)
            router = Router(
                runner, blocks=16, block_size=16, vocab_size=VOCAB, max_context=256, eos_token_ids=[], padded=padded
            )
            router.plan(1, add=[row(1, 13, 5), row(2, 30, 5)])
            router.run()
            assert [len(output) for output in router.outputs.values()] == [5, 5]


# ---------------------------------------------------------------- rotary embeddings that look at the longest position


@pytest.mark.parametrize("rope", ["longrope", "dynamic", "yarn"])
def test_rope_of_packed_rows(tmp_path: Path, rope: str) -> None:
    """Served as far as its frequencies are constant, and there it is exact beside a row of any length."""
    changes: dict[str, Any] = {
        "longrope": {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + i for i in range(8)],
            },
        },
        "dynamic": {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0},
        },
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    }[rope]
    name = "phi3" if rope == "longrope" else "qwen3"
    if name == "phi3":
        changes["partial_rotary_factor"] = 1.0
    folder = tiny_families.write(tmp_path / rope, name, **changes)
    if rope == "longrope":
        with pytest.raises(StartupError, match=r"longrope(.|\n)*--max-context 64$"):
            build(options(folder))
    served = build(options(folder, "--max-context", "64"))
    assert served.info.max_context == 64
    family = Family(folder)
    for padded in (False, True):
        router = family.router(padded=padded)
        rows = [row(1, 50, 14), row(2, 3, 9), row(3, 20, 20)]
        router.plan(1, add=rows)
        router.run()
        family.check(router, *rows)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "images"),
        ("gpt_oss", "attention sinks"),
        ("deepseek_v3", "latent"),
        ("qwen3_next", "recurrent state"),
        ("llama4_text", "chunks"),
        ("gemma3n_text", "shared between layers"),
        ("gpt2", "positions"),
        ("bert", "encoder"),
        ("cohere", "never checked"),
        ("granite", "never checked"),
        (None, "never checked"),
    ],
)
def test_other_families_are_refused_by_name_and_reason(name: str | None, reason: str) -> None:
    with pytest.raises(StartupError, match=f"model_type: {name} .*{reason}(.|\n)*served are: .*qwen3_moe"):
        check_family({"model_type": name})


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("embedding model", {"use_bidirectional_attention": True}),
        ("embedding model", {"is_causal": False}),
        ("sliding_window is no number of tokens: 0", {"sliding_window": 0}),
        ("quantized weights are not supported: gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("quantized weights are not supported: compression_config", {"compression_config": {}}),
        ("cannot read .*config.json", {"num_attention_heads": "many"}),
    ],
)
def test_what_a_config_makes_of_a_family(tmp_path: Path, text: str, changes: dict[str, Any]) -> None:
    folder = tiny_families.write(tmp_path / "m", "gemma3_text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(StartupError, match=text):
        build(options(folder))
