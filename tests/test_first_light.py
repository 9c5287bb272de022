"""The first gate: greedy text through router and worker processes equals transformers, for every scheduler and worker count."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import MODEL, ROOT, Router, Worker
from reference import differs, greedy
from tokenizers import Tokenizer


def prompts() -> list[list[int]]:
    """Twelve pieces of real dialogues, 1 to 600 tokens."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    with gzip.open(ROOT / "models/corpus/airline_dialogues.jsonl.gz", "rt") as lines:
        sessions = [json.loads(line) for _, line in zip(range(12), lines, strict=False)]
    lengths = [1, 2, 5, 15, 16, 17, 33, 64, 100, 257, 400, 600]
    texts = ["\n".join(m["content"] or "" for m in s["messages"][i % 2 :]) for i, s in enumerate(sessions)]
    return [tokenizer.encode(text).ids[:n] for text, n in zip(texts, lengths, strict=True)]


@pytest.mark.parametrize("scheduler", ["slice", "scls", "scls --slice-len 7", "sls", "ils"])
@pytest.mark.parametrize("workers", [1, 2])
def test_greedy_equals_transformers(scheduler: str, workers: int) -> None:
    asked = prompts()
    urls = [Worker("--model", str(MODEL), "--dtype", "float32") for _ in range(workers)]
    try:
        with Router([w.url for w in urls], "--scheduler", *scheduler.split()) as router:
            model = router.request("GET", "/v1/models")[2]
            name = json.loads(model)["data"][0]["id"]

            def ask(ids: list[int]) -> list[int]:
                body = {"model": name, "prompt": ids, "max_tokens": 40, "temperature": 0, "return_token_ids": True}
                return router.post("/v1/completions", body)["choices"][0]["token_ids"]

            with ThreadPoolExecutor(12) as pool:
                answers = list(pool.map(ask, asked))
            router.wait_drained()
    finally:
        for worker in urls:
            worker.stop()
    wrong = [
        f"prompt {i}: {d}"
        for i, (p, a) in enumerate(zip(asked, answers, strict=True))
        if (d := differs(a, greedy(MODEL, p, 40))) and not d.startswith("tie")
    ]
    assert not wrong, "\n".join(wrong)
