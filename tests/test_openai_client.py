"""One table of cases over every door, in front of the real worker and of the mock; then what is the openai package's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import openai
import pytest
from doors import DOORS, Answer, Door, OpenAI, Refusal
from harness import MODEL, Router, RustMock, Worker
from tokenizers import Tokenizer

VOCAB = 2560
PROMPT = "I would like to cancel my flight"
CHAT = [{"role": "user", "content": "Hello, my flight was cancelled. ¿Puedo cambiarlo?"}]
SPECIAL = {t["content"] for t in json.loads((MODEL / "tokenizer.json").read_text())["added_tokens"] if t["special"]}
# Both workers know these; the mock draws the same whatever it is told, so it is asked for less.
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@dataclass
class Server:
    router: Router
    kind: str

    @property
    def is_real(self) -> bool:
        return self.kind == "real"


@pytest.fixture(scope="module", params=["real", "rust-mock"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    if request.param == "real":
        worker: Any = Worker("--model", str(MODEL), "--dtype", "float32", "--served-name", "tiny")
    else:
        worker = RustMock("--vocab", str(VOCAB), "--served-name", "tiny", "--tokenizer", str(MODEL))
    # A slice of one iteration, so that everything crosses borders of slices.
    with worker, Router([worker.url], "--scheduler", "ils") as router:
        yield Server(router, request.param)
        router.wait_drained()


@pytest.fixture(params=DOORS)
def door(server: Server, request: pytest.FixtureRequest) -> Door:
    return DOORS[request.param](server.router, "tiny")


# ---------------------------------------------------------------- the table


def lists_the_model(door: Door, server: Server) -> None:
    assert door.models() == ["tiny"]


def ends_at_the_limit(door: Door, server: Server) -> None:
    answers = [door.complete(PROMPT, max_tokens=17, **GREEDY)]
    if door.http:
        answers.append(door.chat(CHAT, max_tokens=17, **GREEDY))
        answers.append(door.chat(CHAT, max_completion_tokens=17, max_tokens=99, **GREEDY))
    for answer in answers:
        assert (answer.finish, answer.completion_tokens, len(answer.choices)) == ("length", 17, 1)
        assert answer.prompt_tokens > 3 and answer.text


def ids_and_text_are_one_prompt(door: Door, server: Server) -> None:
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(PROMPT).ids
    answers = [door.complete(prompt, max_tokens=9, **GREEDY) for prompt in (PROMPT, ids)]
    assert answers[0].text == answers[1].text
    assert answers[0].prompt_tokens == answers[1].prompt_tokens == len(ids)


def finds_what_was_asked_before(door: Door, server: Server) -> None:
    long = [50 + i for i in range(100)]
    first, second = (door.complete(long, max_tokens=2, **GREEDY) for _ in range(2))
    assert second.cached_tokens == 96 >= first.cached_tokens


def gives_n_choices_counted_once(door: Door, server: Server) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True, "seed": 40}
    one = door.complete(PROMPT, **asked)
    three = door.complete(PROMPT, n=3, **asked)
    assert len(three.choices) == 3
    assert three.prompt_tokens == one.prompt_tokens
    assert three.completion_tokens == 36
    assert all(choice.finish == "length" for choice in three.choices)
    # A choice is the answer to the same request with the seed that many further.
    alone = [door.complete(PROMPT, **{**asked, "seed": 40 + i}).text for i in range(3)]
    assert [choice.text for choice in three.choices] == alone
    if server.is_real:
        assert len(set(alone)) == 3
    if door.http:
        chat = door.chat(CHAT, n=3, **asked)
        assert len(chat.choices) == 3 and all(choice.text for choice in chat.choices)


def completes_every_prompt(door: Door, server: Server) -> None:
    asked: dict[str, Any] = {"max_tokens": 7, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    prompts = [PROMPT, "Good morning", "a b c"]
    alone = [door.complete(prompt, n=2, **asked) for prompt in prompts]
    together = door.complete(prompts, n=2, **asked)
    assert [c.text for c in together.choices] == [c.text for answer in alone for c in answer.choices]
    assert together.prompt_tokens == sum(answer.prompt_tokens for answer in alone)
    assert together.completion_tokens == 6 * 7


def gives_the_same_for_the_same_seed(door: Door, server: Server) -> None:
    asked: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "top_p": 0.9, "seed": 7, "top_k": 40, "min_p": 0.01}
    first, second = (door.complete(PROMPT, **asked) for _ in range(2))
    assert (first.text, first.finish) == (second.text, second.finish)
    other = door.complete(PROMPT, **{**asked, "seed": 8})
    assert (other.text != first.text) == server.is_real, "the mock draws without one"


def takes_every_sampling_field(door: Door, server: Server) -> None:
    asked: dict[str, Any] = {
        "max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"100": -100, "101": 2.5}, "seed": -1,
        "min_tokens": 2, "stop_token_ids": [9],
    }  # fmt: skip
    answers = [door.complete(PROMPT, **asked)]
    if door.http:
        answers.append(door.chat(CHAT, user="me", metadata={"a": "b"}, **asked))
    for answer in answers:
        assert 2 <= answer.completion_tokens <= 8


def stops_before_the_string(door: Door, server: Server) -> None:
    free = door.complete(PROMPT, max_tokens=40, **GREEDY).text
    middle = len(free) // 2
    for length in (1, 3, 9):
        stop = free[middle : middle + length]
        answer = door.complete(PROMPT, max_tokens=40, stop=[stop, "never there"], **GREEDY)
        assert answer.text == free[: free.index(stop)]
        assert answer.finish == "stop" and answer.completion_tokens <= 40
    # The others go on when one of them has stopped.
    asked: dict[str, Any] = {"max_tokens": 40, "n": 3, "seed": 3, "temperature": 1.0, "ignore_eos": True}
    texts = [choice.text for choice in door.complete(PROMPT, **asked).choices]
    stop = texts[1][len(texts[1]) // 2 :][:4]
    answer = door.complete(PROMPT, stop=stop, **asked)
    assert [choice.text for choice in answer.choices] == [text.split(stop)[0] for text in texts]
    ends = ["stop" if stop in text else "length" for text in texts]
    assert [choice.finish for choice in answer.choices] == ends and ends[1] == "stop"
    # Not before the tokens that it is to have.
    answer = door.complete(PROMPT, max_tokens=40, stop=free[:2], min_tokens=40, **GREEDY)
    assert (answer.text, answer.finish) == (free, "length")


def chat_logprobs_are_the_bytes_of_the_text(door: Door, server: Server) -> None:
    chat = door.chat(CHAT, max_tokens=30, logprobs=True, top_logprobs=4, **GREEDY)
    tokens = chat.choices[0].logprobs
    said = b"".join(token.data or b"" for token in tokens if token.token not in SPECIAL)
    assert said.decode("utf-8", "replace") == chat.text
    assert [len(token.top) for token in tokens] == [4] * 30
    plain = door.chat(CHAT, max_tokens=3, logprobs=True, **GREEDY).choices[0].logprobs
    assert [len(token.top) for token in plain] == [0, 0, 0]


def logprobs_come_with_their_tokens(door: Door, server: Server) -> None:
    completion = door.complete(PROMPT, max_tokens=30, logprobs=4, **GREEDY)
    tokens = completion.choices[0].logprobs
    assert len(tokens) == 30 and all(len(token.top) == 4 for token in tokens)
    for token in tokens:
        assert token.top == sorted(token.top, key=lambda rival: -rival[1])
        assert token.top[0] == (token.token, token.logprob), "the greedy token is the likeliest"
        if not server.is_real:
            assert [p for _, p in token.top] == pytest.approx([-(r + 1) * math.log(2) for r in range(4)])
        # Where bytes before it turned out to be no text, what stands for them comes with the token.
        at = token.offset
        if at is not None and token.token not in SPECIAL and "bytes:" not in token.token:
            assert completion.text[at] == "\ufffd" or completion.text.startswith(token.token, at), token


def logprobs_end_where_the_text_does(door: Door, server: Server) -> None:
    free = door.complete(PROMPT, max_tokens=40, logprobs=0, **GREEDY).choices[0]
    stop = free.text[len(free.text) // 2 :][:5]
    cut = door.complete(PROMPT, max_tokens=40, logprobs=0, stop=stop, **GREEDY).choices[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert 0 < len(cut.logprobs) < 40 and cut.logprobs == free.logprobs[: len(cut.logprobs)]
    if door.http:
        last, following = free.logprobs[len(cut.logprobs) - 1 :][:2]
        assert last.offset is not None and last.offset < len(cut.text)
        assert following.offset is not None and following.offset >= len(cut.text)


def tools_are_in_the_prompt(door: Door, server: Server) -> None:
    tool = {
        "type": "function",
        "function": {"name": "find_flights", "parameters": {"type": "object", "properties": {}}},
    }
    plain, with_tools, muted = (
        door.chat(CHAT, max_tokens=1, **GREEDY, **more)
        for more in ({}, {"tools": [tool]}, {"tools": [tool], "tool_choice": "none"})
    )
    assert with_tools.prompt_tokens > plain.prompt_tokens == muted.prompt_tokens


REFUSED: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("http", {"temperature": 2.5}, 400, "temperature", None),
    ("all", {"top_p": 0}, 400, "top_p", None),
    ("all", {"top_p": 1.5}, 400, "top_p", None),
    ("http", {"top_k": -2}, 400, "top_k", None),
    ("all", {"min_p": 2}, 400, "min_p", None),
    ("all", {"repetition_penalty": 0}, 400, "repetition_penalty", None),
    ("http", {"presence_penalty": 3}, 400, "presence_penalty", None),
    ("http", {"frequency_penalty": -3}, 400, "frequency_penalty", None),
    ("http", {"logit_bias": {"100": 101}}, 400, "logit_bias", None),
    ("all", {"logit_bias": {str(VOCAB): 1}}, 400, "logit_bias", None),
    ("http", {"n": 0}, 400, "n", None),
    ("all", {"n": 129}, 400, "n", None),
    ("all", {"max_tokens": 5, "min_tokens": 6}, 400, "min_tokens", None),
    ("all", {"max_tokens": 10**6}, 400, "max_tokens", "context_length_exceeded"),
    ("all", {"stop": ["a"] * 17}, 400, "stop", None),
    ("all", {"stop_token_ids": [VOCAB]}, 400, "stop_token_ids", None),
    ("http", {"guided_json": {}}, 400, "guided_json", "unsupported_parameter"),
    ("http", {"prompt_logprobs": 1}, 400, "prompt_logprobs", "unsupported_parameter"),
    ("http chat", {"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
    ("all complete", {"logprobs": 21}, 400, "logprobs", None),
    ("http complete", {"best_of": 2}, 400, "best_of", "unsupported_parameter"),
    ("http complete", {"echo": True}, 400, "echo", "unsupported_parameter"),
    ("http complete", {"suffix": "x"}, 400, "suffix", "unsupported_parameter"),
    ("http chat", {"top_logprobs": 2}, 400, "top_logprobs", None),
    ("http chat", {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    ("http chat", {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, 400,
     "tool_choice", "unsupported_parameter"),
]  # fmt: skip


def refuses_by_name(door: Door, server: Server) -> None:
    for which, fields, status, param, code in REFUSED:
        if which.startswith("http") and not door.http:
            continue
        asks: list[Callable[[], Answer]] = []
        if "chat" not in which:
            asks.append(partial(door.complete, PROMPT, **fields))
        if "complete" not in which and door.http:
            asks.append(partial(door.chat, CHAT, **fields))
        for ask in asks:
            with pytest.raises(Refusal) as refusal:
                ask()
            got = refusal.value
            assert (got.status, got.param) == (status, param), fields
            if door.http:
                assert got.code == code, fields


# What every door opens, and what OpenAI's HTTP has beside.
EVERYWHERE = [
    ends_at_the_limit,
    ids_and_text_are_one_prompt,
    finds_what_was_asked_before,
    gives_n_choices_counted_once,
    gives_the_same_for_the_same_seed,
    takes_every_sampling_field,
    stops_before_the_string,
    logprobs_come_with_their_tokens,
    logprobs_end_where_the_text_does,
    refuses_by_name,
]
OVER_HTTP = [
    lists_the_model,
    completes_every_prompt,
    chat_logprobs_are_the_bytes_of_the_text,
    tools_are_in_the_prompt,
]


@pytest.mark.parametrize("case", EVERYWHERE, ids=lambda case: case.__name__)
def test_everywhere(case: Callable[[Door, Server], None], door: Door, server: Server) -> None:
    case(door, server)


@pytest.mark.parametrize("door", ["openai", "openai-stream", "curl"], indirect=True)
@pytest.mark.parametrize("case", OVER_HTTP, ids=lambda case: case.__name__)
def test_over_http(case: Callable[[Door, Server], None], door: Door, server: Server) -> None:
    case(door, server)


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("door", ["openai", "openai-stream"], indirect=True)
@pytest.mark.parametrize("server", ["real"], indirect=True)
def test_logprobs_are_transformers(server: Server, door: Door) -> None:
    import torch
    from reference import load

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompt = tokenizer.encode("Hello, I need help with my reservation, please.").ids
    # A penalty changes what is drawn, not what is said of it: these are the model's own probabilities.
    answer = door.complete(prompt, max_tokens=24, logprobs=5, temperature=0, ignore_eos=True, presence_penalty=1.5)
    tokens = answer.choices[0].logprobs
    of_text = {tokenizer.decode([i], skip_special_tokens=False): i for i in range(VOCAB)}
    ids = [of_text[token.token] for token in tokens]
    with torch.inference_mode():
        logits = load(MODEL)(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    want = logits.log_softmax(-1)
    for at, token in enumerate(tokens):
        assert token.logprob == pytest.approx(float(want[at, ids[at]]), abs=2e-3)
        best = want[at].topk(5).values.tolist()
        got = sorted((p for name, p in token.top), reverse=True)[:5]
        assert got == pytest.approx(best, abs=2e-3)


# ---------------------------------------------------------------- the package's own shapes


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return OpenAI(server.router, "tiny").client


def test_models_are_retrieved(client: openai.OpenAI) -> None:
    model = client.models.retrieve("tiny")
    assert model.id == "tiny" and isinstance(model.created, int) and model.object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_errors_are_the_package_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="x", temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="tiny", prompt="x" * (9 << 20))
    assert large.value.status_code == 413


def test_a_raw_answer_names_its_request(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt="x", max_tokens=2, extra_headers={"x-request-id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7" and raw.headers["x-scls-worker"]
    answer = raw.parse()
    assert answer.id.startswith("cmpl-") and isinstance(answer.created, int) and answer.object == "text_completion"
    assert answer.system_fingerprint is not None and answer.system_fingerprint.startswith("fp_")
    assert answer._request_id == "mine-7"


def test_chunks_come_as_openai_sends_them(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=6, n=2, stream=True, extra_body={"ignore_eos": True}
        )
    )
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    for index in range(2):
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert parts[0].delta.role == "assistant" and all(part.delta.role is None for part in parts[1:])
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert parts[-1].delta.content is None


def test_a_chunk_has_the_logprobs_of_its_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "logprobs": True, "stop": ["never there", "e e"]}
    chunks = client.chat.completions.create(
        model="tiny", messages=CHAT, stream=True, **asked, extra_body={"ignore_eos": True}
    )
    texts, tokens = "", b""
    for chunk in chunks:
        choice = chunk.choices[0]
        texts += choice.delta.content or ""
        for token in (choice.logprobs.content if choice.logprobs else None) or []:
            tokens += bytes(token.bytes or []) if token.token not in SPECIAL else b""
        # The tokens are at least those of the text so far: only the last of them may be cut where a stop may begin.
        so_far = tokens.decode("utf-8", "replace")
        assert so_far.startswith(texts) and len(so_far) - len(texts) < len("never there"), (texts, so_far)


def test_what_is_not_offered_is_asked_for_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The package takes any 5xx for a passing fault, unless it is told."""
    client = OpenAI(server.router, "tiny").client.with_options(max_retries=3)
    with caplog.at_level("DEBUG", "openai"), pytest.raises(openai.InternalServerError) as error:
        client.embeddings.create(model="tiny", input="a")
    assert error.value.status_code == 501 and error.value.code == "not_offered"
    said = [record.getMessage() for record in caplog.records if "etrying" in record.getMessage()]
    assert said == ["Not retrying as header `x-should-retry` is set to `false`"]


def test_overload_and_absence_are_told_apart() -> None:
    with RustMock("--vocab", str(VOCAB), "--served-name", "tiny", "--step-us", "20000") as worker:
        with Router([worker.url], "--max-concurrent-requests", "2") as router:
            client = OpenAI(router, "tiny").client
            asked: dict[str, Any] = {"model": "tiny", "prompt": [5], "max_tokens": 400}
            stream = client.completions.create(**asked, n=2, stream=True, extra_body={"return_token_ids": True})
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(**asked)
            assert full.value.code == "overloaded" and int(full.value.response.headers["retry-after"]) >= 1
            with pytest.raises(openai.BadRequestError) as never:
                client.completions.create(**asked, n=3)
            assert never.value.param == "n"
            stream.close()
            router.wait_drained()
            worker.stop()
            with pytest.raises(openai.InternalServerError) as nobody:
                for _ in range(50):
                    client.completions.create(**asked)
            assert nobody.value.status_code in (502, 503)
