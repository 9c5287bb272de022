"""Exactness, CPU fp32: whatever the slices, workers, batches and caches do, greedy tokens are transformers' own.

Batches are driven by hand over the Session contract, so nothing here depends on timing. `make test` runs a pairwise
cover of the factors (each pair of values of any two factors occurs); `make soak` runs the full product.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness import MODEL, Worker
from reference import differs, greedy
from scls_router.proto import worker_pb2 as pb
from session import Row, Session
from transformers import AutoConfig, AutoModelForCausalLM

LIMIT = 24  # output tokens; S = "limit" is one slice for all of them
FACTORS: dict[str, list] = {
    "length": [1, 2, 15, 16, 17, 31, 64, 100, 200, 333, 480, 600],
    "slice": [1, 7, 16, 64, LIMIT],
    "workers": [1, 2],
    "kv": ["held", "dropped"],
    "cache": ["cold", "warm"],
    "batch": ["alone", "mixed"],
    "layout": ["paged", "padded"],
    "model": ["random-gqa", "random-gemma2", "random-moe", "embedded"],
}
RANDOM = {  # small ones of families that differ most in what a pass has to do
    "random-gqa": ("llama", {"num_key_value_heads": 2, "num_hidden_layers": 3}),
    "random-gemma2": (
        "gemma2",
        {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "sliding_window": 50,  # of every other layer; no multiple of a block
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
        },
    ),
    "random-moe": (
        "qwen3_moe",
        {
            "num_key_value_heads": 4,
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    ),
}
Case = tuple
_numbers = itertools.count(1)
_ties: list[str] = []
_ran = 0


def pairwise(seed: int = 0) -> list[Case]:
    """Greedy cover: cases until every pair of values of any two factors occurs in one."""
    rng = random.Random(seed)
    values = list(FACTORS.values())
    pairs = list(itertools.combinations(range(len(values)), 2))
    missing = {(i, j, a, b) for i, j in pairs for a in values[i] for b in values[j]}
    cases: list[Case] = []
    while missing:
        i, j, a, b = min(missing, key=str)
        candidates = []
        for _ in range(200):
            case = [rng.choice(v) for v in values]
            case[i], case[j] = a, b
            candidates.append(tuple(case))
        covers = [{(i, j, case[i], case[j]) for i, j in pairs} & missing for case in candidates]
        best = max(range(len(covers)), key=lambda k, covers=covers: len(covers[k]))
        missing -= covers[best]
        cases.append(candidates[best])
    return cases


@dataclass
class Fleet:
    model: Path
    vocab: int
    sessions: list[Session]
    workers: list[Worker]


class Fleets(dict[tuple[str, str], Fleet]):
    """Two workers of a model and layout, in processes of their own, from the first case that wants them. Two such
    fleets are kept: a process of torch takes memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, key: tuple[str, str]) -> Fleet:
        layout, name = key
        path = MODEL if name == "embedded" else write_random(self.folder / name, *RANDOM[name])
        arguments = ["--model", str(path), "--layout", layout, "--dtype", "float32", "--blocks", "400"]
        while len(self) > 1:
            self.stop(next(iter(self)))
        with ThreadPoolExecutor() as at_once:
            workers = list(at_once.map(lambda _: Worker(*arguments), range(2)))
        sessions = [Session(worker.url) for worker in workers]
        [session.snapshot() for session in sessions]
        self[key] = Fleet(path, sessions[0].info.vocab_size, sessions, workers)
        return self[key]

    def stop(self, key: tuple[str, str]) -> None:
        fleet = self.pop(key)
        [session.close() for session in fleet.sessions]
        [worker.stop() for worker in fleet.workers]


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleets]:
    fleets = Fleets(tmp_path_factory.mktemp("models"))
    yield fleets
    for key in list(fleets):
        fleets.stop(key)


def write_random(folder: Path, family: str, changes: dict) -> Path:
    torch.manual_seed(2)
    common = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    config = AutoConfig.for_model(family, **{**common, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    # random models need some tokenizer to be served
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((MODEL / file).read_bytes())
    return folder


def ids(seed: int, length: int, vocab: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, vocab) for _ in range(length)]


def generate(fleet: Fleet, case: Case) -> tuple[list[int], list[int]]:
    """One row through the case; returns its prompt and its output."""
    length, steps, workers, kv, cache, batch, layout, _ = case
    number = next(_numbers)
    root = number  # a root of its own: cold unless warmed below
    prompt = ids(length, length, fleet.vocab)
    row = Row(prompt, LIMIT, number, ignore_eos=False, hash_root=root)
    used = fleet.sessions[:workers]
    if cache == "warm":
        for session in used:
            other = Row(prompt, 2, next(_numbers), hash_root=root)
            session.run(add=[other], steps=2)
    beside = (
        [Row(ids(number + i, n, fleet.vocab), 500, next(_numbers), ignore_eos=True) for i, n in enumerate([3, 90, 250])]
        if batch == "mixed"
        else []
    )
    home = None
    hit = -1  # tokens found cached in the first slice
    for turn in itertools.count():
        if row.finish:
            break
        # with two workers the row moves after every second slice, so that its KV is both held and left behind
        session = used[turn // 2 % workers]
        if session is home:
            if kv == "dropped":
                session.send(release_kv=pb.ReleaseKv(rows=[row.id]))
            session.run(keep=[row, *beside], steps=steps)
            continue
        if home:  # it moves with its output, as a new attempt; the rows beside it begin anew there
            home.send(drop=pb.Drop(rows=[r.id for r in (row, *beside)]))
            for r in (row, *beside):
                r.attempt += 1
            for r in beside:
                r.output = []
        report = session.run(add=[*beside[:1], row, *beside[1:]], steps=steps)
        if not home:
            hit = next(r.cached for r in report.rows if r.row.request == row.request)
        home = session
    assert home
    home.send(drop=pb.Drop(rows=[b.id for b in beside]))
    # a prompt of at most one block's tokens has no whole block that may be taken from a cache, and a rectangle has none
    assert hit == ((length - 1) // 16 * 16 if (cache, layout) == ("warm", "paged") else 0)
    return prompt, row.output


def check(fleets: Fleets, case: Case) -> None:
    global _ran
    fleet = fleets[case[-2:]]
    prompt, output = generate(fleet, case)
    _ran += 1
    wrong = differs(output, greedy(fleet.model, prompt, LIMIT))
    if wrong and wrong.startswith("tie"):
        _ties.append(f"{case}: {wrong}")
        print("accepted:", _ties[-1])
    else:
        assert wrong is None, f"{dict(zip(FACTORS, case, strict=True))}: {wrong}"
    assert len(_ties) * 50 <= max(_ran, 50), f"too many ties: {_ties}"


CASES = sorted(pairwise(), key=lambda case: (FACTORS["model"].index(case[-1]), case[-2]))  # fleet by fleet


def test_the_cover_is_small_enough() -> None:
    assert len(CASES) <= 110


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_greedy_is_exact(fleets: Fleets, case: Case) -> None:
    check(fleets, case)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_greedy_is_exact_for_the_full_product(fleets: Fleets) -> None:
    models, layouts, *others = reversed(FACTORS.values())
    for model, layout, *rest in itertools.product(models, layouts, *others):
        case = (*reversed(rest), layout, model)
        # No KV outlives a rectangle: there is nothing to hold, drop or find.
        if case[-2] == "paged" or ("dropped" not in case and "warm" not in case):
            check(fleets, case)


EVERY_FIELD = dict(
    top_k=50,
    top_p=0.95,
    min_p=0.02,
    repetition_penalty=1.2,
    presence_penalty=0.6,
    frequency_penalty=0.4,
    logit_bias={7: 2.0, 11: -100.0},
    logprobs=2,
)


@pytest.mark.parametrize("sampling", [{}, EVERY_FIELD], ids=["temperature", "every-field"])
def test_seeded_sampling_is_the_same_for_every_slice_batch_worker_and_layout(fleets: Fleets, sampling: dict) -> None:
    fleet, padded = fleets["paged", "embedded"], fleets["padded", "embedded"]
    sessions = [*fleet.sessions, *padded.sessions]
    prompt = ids(5, 40, fleet.vocab)

    def drawn(steps: int, mixed: bool, at: int, seed: int = 1234, **more: object) -> Row:
        """One row to its end; where `more` has an output, another worker has drawn that."""
        session = sessions[at]
        row = Row(prompt, LIMIT, next(_numbers), temperature=0.9, seed=seed, sampling=sampling, min_tokens=4, **more)
        beside = [Row(ids(i, 30 + i, fleet.vocab), 100, next(_numbers)) for i in range(3)] if mixed else []
        session.run(add=[*beside, row], steps=steps)
        while not row.finish:
            session.run(keep="survivors", steps=steps)
        session.send(drop=pb.Drop(rows=[b.id for b in beside]))
        return row

    first = drawn(64, False, 0, hash_root=next(_numbers))
    for steps, mixed, at in [(1, False, 1), (7, True, 0), (16, True, 1), (5, True, 2), (64, False, 3)]:
        again = drawn(steps, mixed, at, hash_root=next(_numbers))
        assert again.output == first.output
        assert [t.chosen for t in again.logprobs] == pytest.approx([t.chosen for t in first.logprobs], abs=1e-4)
    for at in (1, 2):
        moved = drawn(5, False, at, hash_root=next(_numbers), output=first.output[:9])
        assert moved.output == first.output
    other = drawn(64, False, 0, seed=1235)
    assert other.output != first.output, "another seed draws otherwise"
    assert other.output != greedy(fleet.model, prompt, LIMIT).ids
