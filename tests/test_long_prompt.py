"""A prompt of nearly the whole context beside eight streams on a real worker: spread over slices, and nobody's tokens change."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from harness import MODEL, Router, Worker
from reference import differs, greedy
from test_first_light import prompts

LONG = 7_900
STREAM = 60


def test_a_long_prompt_beside_streams_is_exact() -> None:
    pieces = prompts()
    streams = pieces[2:10]
    whole = [id_ for piece in pieces * 8 for id_ in piece][:LONG]
    assert len(whole) == LONG
    with Worker("--model", str(MODEL), "--dtype", "float32", "--chunk-tokens", "128") as worker:
        with Router([worker.url]) as router:  # type: ignore[attr-defined]
            name = json.loads(router.request("GET", "/v1/models")[2])["data"][0]["id"]

            def ask(ids: list[int], max_tokens: int) -> tuple[list[int], int]:
                body = {"model": name, "prompt": ids, "max_tokens": max_tokens, "temperature": 0}
                answer = router.post(
                    "/v1/completions", {**body, "return_token_ids": True, "ignore_eos": max_tokens == STREAM}
                )
                return answer["choices"][0]["token_ids"], answer["scls"]["slices"]

            with ThreadPoolExecutor(9) as pool:
                asked = [pool.submit(ask, ids, STREAM) for ids in streams]
                long = pool.submit(ask, whole, 24)
                answers = [one.result()[0] for one in asked]
                answer, slices = long.result()
            router.wait_drained()
    assert all(len(ids) == STREAM for ids in answers)
    # eos is drawn over in the streams, so each is compared as far as the reference goes
    found = [
        differs(got[: len(want.ids)], want)
        for got, p in zip(answers, streams, strict=True)
        if (want := greedy(MODEL, p, STREAM))
    ]
    found.append(differs(answer, greedy(MODEL, whole, 24)))
    wrong = [one for one in found if one and not one.startswith("tie")]
    assert not wrong, wrong
    assert slices >= 3, slices
