"""Sampling through the engine, on logits made up from the tokens so far: wherever a row's slices end and whoever goes
on with it, its penalties weigh the same tokens, so it draws the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from scls_router.proto import worker_pb2 as pb
from scls_worker.mock import splitmix64
from scls_worker.rows import Chunk, Drawn
from worker_harness import Router, ids_of, of, row_id, start

torch = pytest.importorskip("torch")
sampling = pytest.importorskip("scls_worker.sampling")

V = 40
SAMPLING: dict[str, Any] = dict(
    top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.9, logprobs=3
)


def logits_after(tokens: Sequence[int]) -> Any:  # [V]
    """Always the same few favourites, so that without penalties a row repeats itself."""
    noise = torch.randn(V, generator=torch.Generator().manual_seed(splitmix64(tokens[-1] << 32 | len(tokens)) >> 1))
    return torch.linspace(4.0, -4.0, V) + noise


class LogitsRunner:
    def run(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        rows = [chunk.row for chunk in chunks if chunk.draws]
        if not rows:
            return []
        wants = [sampling.Want(row.draw, row.output_len, row.counted()) for row in rows]
        return sampling.draw_tokens(
            torch.stack([logits_after(row.tokens[: row.known].tolist()) for row in rows]), wants
        )


def new_router(chunk_tokens: int = 16) -> Router:
    return Router(LogitsRunner(), vocab_size=V, eos_token_ids=[], chunk_tokens=chunk_tokens)


def sampled(request: int, temperature: float = 0.9, output: Sequence[int] = (), attempt: int = 0) -> pb.RowStart:
    prompt = [(7 * request + i * i) % V for i in range(21)]
    row = start(request, prompt, 24, output, attempt, temperature, seed=2**64 - request, min_tokens=24)
    row.limits.stop_token_ids.append(1)
    for field, value in SAMPLING.items():
        setattr(row.sampling, field, value)
    row.sampling.logit_bias.update({0: -2.0, 39: 5.0})
    return row


def finish(router: Router, steps: int = 100, between: Callable[[Router], None] = lambda _: None) -> None:
    router.run()
    while router.engine.rows:
        between(router)
        last = router.engine.base.number
        router.plan(last + 1, last, steps=steps, keep=pb.Plan.KEEP_LIST, keep_rows=[k.id() for k in router.engine.rows])
        router.run()


def undisturbed(row: pb.RowStart) -> list[int]:
    router = new_router(chunk_tokens=1000)
    router.plan(1, add=[row])
    finish(router)
    return router.outputs[row.row.request, row.row.attempt]


def by_hand(row: pb.RowStart) -> list[int]:
    """Greedy, everything counted anew for every token."""
    knobs, tokens = row.sampling, ids_of(row)
    prompt_len = len(tokens)
    while len(tokens) < prompt_len + row.limits.max_tokens:
        scores, output = logits_after(tokens), tokens[prompt_len:]
        scores[1] = -torch.inf
        for id_, bias in knobs.logit_bias.items():
            scores[id_] += bias
        for id_ in set(tokens):
            scores[id_] *= knobs.repetition_penalty if scores[id_] < 0 else 1 / knobs.repetition_penalty
        for id_ in set(output):
            scores[id_] -= knobs.presence_penalty + knobs.frequency_penalty * output.count(id_)
        tokens.append(int(scores.argmax()))
    return tokens[prompt_len:]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_slices_chunks_and_lost_kv_change_nothing(temperature: float) -> None:
    rows = [sampled(i, temperature) for i in (1, 2, 3)]
    expected = [undisturbed(row) for row in rows]
    assert len({tuple(output) for output in expected}) == 3

    def lose_one(router: Router) -> None:
        router.say(release_kv=pb.ReleaseKv(rows=[row_id(2)]))

    for steps, chunk_tokens, between in ((1, 16, lambda _: None), (3, 5, lose_one), (7, 1, lose_one)):
        router = new_router(chunk_tokens)
        router.plan(1, steps=steps, add=[rows[0]])
        router.run()
        router.plan(2, 1, steps=steps, add=[*rows[1:], start(9, [3, 5, 8], 40)])
        finish(router, steps, between)
        assert [router.outputs[i, 0] for i in (1, 2, 3)] == expected


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("at", [0, 1, 10, 23])
def test_another_worker_goes_on_alike(temperature: float, at: int) -> None:
    expected = undisturbed(sampled(1, temperature))
    router = new_router(chunk_tokens=7)
    router.plan(1, steps=2 + at, add=[sampled(1, temperature)])  # of the first three, the last draws
    router.run()
    assert router.outputs.get((1, 0), []) == expected[:at]
    other = new_router(chunk_tokens=4)
    other.plan(1, steps=5, add=[sampled(1, temperature, expected[:at], attempt=1)])
    finish(other, 5)
    assert other.outputs[1, 1] == expected[at:]


def test_greedy_rows_are_penalised_as_by_hand() -> None:
    row = sampled(5, temperature=0.0)
    assert undisturbed(row) == by_hand(row)
    free = start(5, ids_of(row), 24)
    assert undisturbed(free) != undisturbed(row), "the penalties matter here"
    assert len(set(undisturbed(free))) < len(set(undisturbed(row)))


def test_only_what_a_penalty_weighs_is_counted() -> None:
    router = new_router()
    plain, presence, repetition = (start(i, [3, 5, 8, 5], 9) for i in (1, 2, 3))
    presence.sampling.presence_penalty = 0.5
    repetition.sampling.repetition_penalty = 1.5
    router.plan(1, steps=3, add=[plain, presence, repetition])
    router.run()
    rows = router.engine.base.rows
    assert rows[0].seen is None
    # The third token is drawn, and not yet weighed.
    assert sum(rows[1].seen.times) == 2 and set(rows[1].seen.ids) == set(router.outputs[2, 0][:2])
    assert sum(rows[2].seen.times) == 2 and set(rows[2].seen.ids) == {3, 5, 8, *router.outputs[3, 0][:2]}


def test_logprobs_travel_with_their_tokens() -> None:
    asks, silent = sampled(1), start(2, [3, 5, 8], 24)
    router = new_router()
    router.plan(1, steps=10, add=[silent, asks])
    finish(router)
    tokens = ids_of(asks)
    for part in (part for step in of(router.session.sent, "step") for part in step.rows):
        assert len(part.logprobs) == (len(part.ids) if part.row.request == 1 else 0)
        if part.row.request == 1:
            raw = logits_after(tokens).log_softmax(-1)
            (told,), (token,) = part.logprobs, part.ids
            assert told.chosen == pytest.approx(raw[token].item(), abs=1e-5)
            assert list(told.top_ids) == raw.topk(3).indices.tolist()
            tokens.append(token)
    assert tokens[-24:] == router.outputs[1, 0]
