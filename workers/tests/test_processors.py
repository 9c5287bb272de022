"""Each step of a draw against transformers' own logits processor, and all of them against a LogitsProcessorList.

Presence and frequency have none in transformers: OpenAI's formula, in plain Python, stands in.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scls_worker.rows import Draw
from scls_worker.seen import Seen

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sampling = pytest.importorskip("scls_worker.sampling")
from transformers.generation import (  # noqa: E402
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

NO_IDS = torch.zeros(1, 0, dtype=torch.long)
# torch's first call of a kind takes long.
patient = settings(deadline=None)
VOCABS = [1, 2, 7, 64, 500, 3000]  # the last is wider than the first look for a nucleus


def logits_of(seed: int, vocab: int, spread: float, ties: bool) -> Any:  # [V]
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread
    return (logits * 2).round() / 2 if ties else logits


def unit(exclude_min: bool = False) -> Any:
    """Numbers from 0 to 1 as they arrive: the contract's floats have 32 bits."""
    return st.floats(0, 1, width=32, exclude_min=exclude_min, allow_subnormal=False)


some_logits = st.builds(
    logits_of, st.integers(0, 2**32), st.sampled_from(VOCABS), st.sampled_from([0.01, 1.0, 5.0]), st.booleans()
)
few_ids = st.lists(st.integers(0, 499), max_size=30)


def relative(logits: Any) -> Any:  # [V] -> [1, V]
    return (logits - logits.max())[None]


@patient
@given(some_logits, st.integers(1, 600))
def test_top_k(logits: Any, top_k: int) -> None:
    ours = sampling.keep_top_k(logits[None], [min(top_k, len(logits))])
    assert torch.equal(ours, TopKLogitsWarper(top_k)(NO_IDS, logits[None]))


def near_the_border(scores: Any, top_p: float) -> bool:
    """Rounding decides whether a sum of probabilities reaches top_p."""
    sums = scores.double().softmax(-1).sort().values.cumsum(-1)
    return bool(((sums - (1 - top_p)).abs() < 1e-5).any())


@patient
@given(some_logits, unit(exclude_min=True))
def test_top_p(logits: Any, top_p: float) -> None:
    scores = relative(logits)
    assume(not near_the_border(scores, top_p))
    ours, theirs = sampling.keep_top_p(scores, [top_p]), TopPLogitsWarper(top_p)(NO_IDS, scores)
    # Which of equals stay is for torch.sort to say in theirs: as many do.
    assert torch.equal(ours.sort().values, theirs.sort().values)
    assert torch.equal(ours, theirs) or len(logits.unique()) < len(logits)


def test_top_p_of_wide_and_narrow_nuclei_in_one_batch() -> None:
    narrow, wide = relative(logits_of(0, 3000, 5.0, False)), relative(logits_of(1, 3000, 0.01, False))
    scores = torch.cat([narrow, wide, narrow])
    kept = sampling.keep_top_p(scores, [0.9, 0.9, 0.5])
    sizes = kept.isfinite().sum(-1).tolist()
    assert sizes[2] < sizes[0] < sampling.NUCLEUS < sizes[1]
    for i, top_p in enumerate((0.9, 0.9, 0.5)):
        assert torch.equal(kept[i : i + 1], TopPLogitsWarper(top_p)(NO_IDS, scores[i : i + 1]))
        assert torch.equal(kept[i : i + 1], sampling.keep_top_p(scores[i : i + 1], [top_p]))


def test_top_p_of_equals_keeps_the_lower_ids() -> None:
    scores = torch.tensor([[0.0, -9.0, 0.0, 0.0, 0.0]])
    assert sampling.keep_top_p(scores, [0.6]).isfinite().tolist() == [[True, False, True, True, False]]
    assert sampling.keep_top_p(scores, [1e-6]).isfinite().tolist() == [[True, False, False, False, False]]


@patient
@given(some_logits, unit(exclude_min=True))
def test_min_p(logits: Any, min_p: float) -> None:
    scores = relative(logits)
    assume(not ((scores.double().exp() - min_p).abs() < 1e-6).any() or min_p == 1)
    assert torch.equal(sampling.keep_min_p(scores, [min_p]), MinPLogitsWarper(min_p)(NO_IDS, scores))


def adjusted(logits: Any, draw: Draw, prompt: list[int], output: list[int], place: int | None = None) -> Any:
    """[V] -> [1, V]: our steps before the temperature, in a batch with rows that ask for nothing."""
    seen = Seen(prompt, len(prompt) + len(output)) if draw.penalises else None
    if seen:
        seen.follow(np.array(output, dtype=np.uint32))
    plain = sampling.Want(Draw(), 0)
    want = sampling.Want(draw, len(output) if place is None else place, seen)
    batch = torch.stack([logits + 1, logits, logits - 1])
    sampling.adjust(batch, [plain, want, plain])
    assert torch.equal(batch[0], logits + 1) and torch.equal(batch[2], logits - 1)
    return batch[1:2]


@patient
@given(some_logits, few_ids, few_ids, st.floats(0.125, 8, width=32))
def test_repetition_penalty(logits: Any, prompt: list[int], output: list[int], penalty: float) -> None:
    prompt, output = ([id_ % len(logits) for id_ in ids] for ids in (prompt, output))
    ids = torch.tensor([prompt + output], dtype=torch.long)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None]) if ids.numel() else logits[None]
    assert torch.equal(adjusted(logits, Draw(repetition_penalty=penalty), prompt, output), theirs)


two_to_minus_two = st.floats(-2, 2, width=32)


@patient
@given(some_logits, few_ids, few_ids, two_to_minus_two, two_to_minus_two)
def test_presence_and_frequency_penalty(
    logits: Any, prompt: list[int], output: list[int], presence: float, frequency: float
) -> None:
    prompt, output = ([id_ % len(logits) for id_ in ids] for ids in (prompt, output))
    draw = Draw(presence_penalty=presence, frequency_penalty=frequency)
    expected = openai(logits, output, presence, frequency)
    torch.testing.assert_close(adjusted(logits, draw, prompt, output), expected, rtol=1e-6, atol=1e-5)


def openai(logits: Any, output: list[int], presence: float, frequency: float) -> Any:  # [V] -> [1, V]
    """`mu[j] - c[j] * frequency - float(c[j] > 0) * presence`, as OpenAI's reference documents it."""
    times = Counter(output)
    scores = [mu - times[j] * frequency - (times[j] > 0) * presence for j, mu in enumerate(logits.tolist())]
    return torch.tensor([scores])


@patient
@given(some_logits, st.dictionaries(st.integers(0, 499), st.floats(-100, 100, width=32), min_size=1))
def test_logit_bias(logits: Any, bias: dict[int, float]) -> None:
    bias = {id_ % len(logits): value for id_, value in bias.items()}
    theirs = SequenceBiasLogitsProcessor({(id_,): value for id_, value in bias.items()})(NO_IDS, logits[None])
    assert torch.equal(adjusted(logits, Draw(logit_bias=tuple(bias.items())), [], []), theirs)


@patient
@given(some_logits, st.sets(st.integers(0, 499), min_size=1), st.integers(0, 5), st.integers(0, 5))
def test_min_tokens(logits: Any, stops: set[int], min_tokens: int, place: int) -> None:
    stops = {id_ % len(logits) for id_ in stops}
    theirs = MinNewTokensLengthLogitsProcessor(3, min_tokens, sorted(stops))(
        torch.zeros(1, 3 + place, dtype=torch.long), logits[None]
    )
    draw = Draw(min_tokens=min_tokens, forbidden=tuple(sorted(stops)))
    assert torch.equal(adjusted(logits, draw, [], [], place), theirs)


class OpenAiPenalties(transformers.LogitsProcessor):
    def __init__(self, prompt_len: int, presence: float, frequency: float) -> None:
        self.prompt_len, self.presence, self.frequency = prompt_len, presence, frequency

    def __call__(self, ids: Any, scores: Any) -> Any:
        return openai(scores[0], ids[0, self.prompt_len :].tolist(), self.presence, self.frequency)


def reference(draw: Draw, prompt_len: int) -> Any:
    """The contract's order, by transformers' hands."""
    steps: list[Any] = []
    if draw.forbidden:
        steps.append(MinNewTokensLengthLogitsProcessor(prompt_len, draw.min_tokens, list(draw.forbidden)))
    if draw.logit_bias:
        steps.append(SequenceBiasLogitsProcessor({(id_,): value for id_, value in draw.logit_bias}))
    steps.append(RepetitionPenaltyLogitsProcessor(draw.repetition_penalty))
    steps.append(OpenAiPenalties(prompt_len, draw.presence_penalty, draw.frequency_penalty))
    if draw.temperature > 0:
        steps.append(TemperatureLogitsWarper(draw.temperature))
        if draw.top_k:
            steps.append(TopKLogitsWarper(draw.top_k))
        steps += [TopPLogitsWarper(draw.top_p), MinPLogitsWarper(draw.min_p)]
    return LogitsProcessorList(steps)


draws = st.builds(
    Draw,
    temperature=st.sampled_from([0.0, 0.25, 1.0, 1.5]),
    seed=st.integers(0, 2**64 - 1),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.125]),
    min_p=st.sampled_from([0.0, 0.0625, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.25, 0.75]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (11, -100.0))]),
    min_tokens=st.sampled_from([0, 4]),
    forbidden=st.sampled_from([(), (2, 5)]),
)
ids_below_64 = st.lists(st.integers(0, 63), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(draws, ids_below_64, ids_below_64, st.integers(0, 2**32))
def test_all_in_order(draw: Draw, prompt: list[int], output: list[int], seed: int) -> None:
    logits = logits_of(seed, 64, 3.0, ties=False)
    theirs = reference(draw, len(prompt))(torch.tensor([prompt + output]), logits[None].clone())
    ours = adjusted(logits, draw, prompt, output)
    if draw.temperature > 0:
        assume(not rounding_decides(draw, prompt, output, logits))
        ours = sampling.filtered(ours, [draw]).log_softmax(-1)
        theirs = theirs.log_softmax(-1)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    if draw.temperature == 0:
        assert ours.argmax() == theirs.argmax()


def rounding_decides(draw: Draw, prompt: list[int], output: list[int], logits: Any) -> bool:
    steps = reference(draw, len(prompt))[:-2]  # up to top_k
    return near_the_border(
        LogitsProcessorList(steps)(torch.tensor([prompt + output]), logits[None].clone()), draw.top_p
    )
