"""The table of cases of every door, through the clients of `scls_router`: those that ask for what gRPC has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import test_openai_client as table
from doors import Answer, Choice, Door
from harness import MODEL
from scls_router import Client, results
from test_openai_client import GREEDY, PROMPT, Server, server
from test_sdk import Blocking
from transformers import AutoTokenizer

__all__ = ["server"]

# What only OpenAI's shapes have.
FOREIGN = ("user", "metadata", "tool_choice")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


class Sdk:
    """`Client` or `AsyncClient`, whole or streamed. A chat is rendered here: over gRPC a prompt is text or ids."""

    def __init__(self, client: Any, stream: bool) -> None:
        self.client, self.stream = client, stream
        self.name = f"{type(client).__name__}, streamed" if stream else type(client).__name__

    def models(self) -> list[str]:
        return sorted({model for worker in self.client.workers() for model in worker.models})

    def complete(self, prompt: str | list[int] | list[str], **fields: Any) -> Answer:
        several = isinstance(prompt, list) and isinstance(prompt[0], str)
        answers = [self._ask(one, fields) for one in (prompt if several else [prompt])]
        return Answer(
            [choice for answer in answers for choice in answer.choices],
            sum(answer.prompt_tokens for answer in answers),
            sum(answer.completion_tokens for answer in answers),
            sum(answer.cached_tokens for answer in answers),
        )

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Answer:
        ids = tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return self._ask(ids, fields)

    def _ask(self, prompt: Any, fields: dict[str, Any]) -> Answer:
        asked = {name: value for name, value in fields.items() if name not in FOREIGN}
        if "max_completion_tokens" in asked:
            asked["max_tokens"] = asked.pop("max_completion_tokens")
        if "logit_bias" in asked:
            asked["logit_bias"] = {int(id): bias for id, bias in asked["logit_bias"].items()}
        if not self.stream:
            done = self.client.generate(prompt, model="tiny", **asked)
            return self._answer([Choice(c.text, c.finish_reason) for c in done.choices], done.usage)
        choices: dict[int, Choice] = {}
        usage = None
        for piece in self.client.stream(prompt, model="tiny", **asked):
            assert usage is None, "a piece after the usage"
            choice = choices.setdefault(piece.choice, Choice())
            assert choice.finish is None, "a piece of a choice that ended"
            choice.text += piece.text
            choice.finish, usage = piece.finish_reason, piece.usage
        return self._answer([choices[index] for index in sorted(choices)], usage)

    @staticmethod
    def _answer(choices: list[Choice], usage: results.Usage | None) -> Answer:
        assert usage is not None, "the last piece has the usage"
        return Answer(choices, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


@pytest.fixture(params=["client", "client, streamed", "async", "async, streamed"])
def door(server: Server, request: pytest.FixtureRequest) -> Iterator[Door]:
    kind: Any = Client if request.param.startswith("client") else Blocking
    with kind(server.router.addresses["grpc"], timeout=60) as client:
        yield Sdk(client, request.param.endswith("streamed"))


CASES = [
    table.lists_the_model,
    table.ends_at_the_limit,
    table.ids_and_text_are_one_prompt,
    table.finds_what_was_asked_before,
    table.gives_n_choices_counted_once,
    table.completes_every_prompt,
    table.gives_the_same_for_the_same_seed,
    table.takes_every_sampling_field,
    table.stops_before_the_string,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_case(case: Callable[[Door, Server], None], door: Door, server: Server) -> None:
    case(door, server)


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_logprobs_come_with_their_ids(kind: Any, server: Server) -> None:
    with kind(server.router.addresses["grpc"], timeout=60) as client:
        (choice,) = client.generate(PROMPT, model="tiny", max_tokens=12, logprobs=4, **GREEDY).choices
        (bare,) = client.generate(PROMPT, model="tiny", max_tokens=12, logprobs=0, **GREEDY).choices
    assert len(choice.ids) == len(choice.logprobs) == 12 and bare.ids == choice.ids
    assert [token.chosen for token in bare.logprobs] == [token.chosen for token in choice.logprobs]
    for id, token in zip(choice.ids, choice.logprobs, strict=True):
        assert token.top[0] == (id, token.chosen), "the greedy token is the likeliest"
        logprobs = [logprob for _, logprob in token.top]
        assert len(logprobs) == 4 and logprobs == sorted(logprobs, reverse=True)
        if not server.is_real:
            assert logprobs == pytest.approx([-(rank + 1) * math.log(2) for rank in range(4)])
