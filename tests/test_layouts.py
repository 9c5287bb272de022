"""A router before real workers of either layout: the same answers, and nothing left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import MODEL, Router, Worker


def answers(layout: str, *arguments: str) -> list[tuple[str, str]]:
    """Texts and finish reasons of rows of many lengths, greedy and seeded, asked all at once."""

    def ask(router: Router, i: int) -> tuple[str, str]:
        body = {
            "model": MODEL.name,
            "prompt": f"I want to change flight number {i} " * (1 + i % 4),
            "max_tokens": 20 + i * 5,
            "temperature": 0.7 if i % 2 else 0,
            "seed": i,
        }
        choice = router.post("/v1/completions", body)["choices"][0]
        return choice["text"], choice["finish_reason"]

    with Worker("--model", str(MODEL), "--dtype", "float32", "--layout", layout, "--blocks", "400") as worker:
        with Router([worker.url], *arguments) as router, ThreadPoolExecutor(12) as clients:
            out = list(clients.map(lambda i: ask(router, i), range(12)))
            router.wait_drained()
    return out


@pytest.fixture(scope="module")
def paged() -> list[tuple[str, str]]:
    return answers("paged")


def test_a_padded_worker_answers_as_a_paged_one(paged: list[tuple[str, str]]) -> None:
    assert answers("padded") == paged
    assert len(set(paged)) > 6, "worth a comparison"
