"""One shape for what every client gets, so that one table of cases holds for all of them.

A door asks as its client does (the openai package, whole or streamed; more may follow) and answers in these types.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import openai

# Fields that the openai package knows; the others travel in its extra_body.
KNOWN = {
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "presence_penalty",
    "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "user", "metadata",
    "response_format", "best_of", "echo", "suffix",
}  # fmt: skip


@dataclass
class Logprob:
    """One token that was given out. ``top`` is best first; ``offset`` is known of completions, ``data`` of chats."""

    token: str
    logprob: float
    top: list[tuple[str, float]]
    offset: int | None = None
    data: bytes | None = None


@dataclass
class Choice:
    text: str = ""
    finish: str | None = None
    logprobs: list[Logprob] = field(default_factory=list)


@dataclass
class Answer:
    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def text(self) -> str:
        assert len(self.choices) == 1
        return self.choices[0].text

    @property
    def finish(self) -> str | None:
        return self.choices[0].finish


@dataclass
class Refusal(Exception):
    """What was asked is not served: the status, and the field at fault."""

    status: int
    param: str | None
    code: str | None


class Door(Protocol):
    name: str

    def models(self) -> list[str]: ...
    def complete(self, prompt: str | list[int] | list[str], **fields: Any) -> Answer: ...
    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Answer: ...


def _chat_logprobs(logprobs: Any) -> list[Logprob]:
    return [
        Logprob(t.token, t.logprob, [(r.token, r.logprob) for r in t.top_logprobs], data=bytes(t.bytes or []))
        for t in (logprobs.content if logprobs else None) or []
    ]


def _completion_logprobs(logprobs: Any) -> list[Logprob]:
    if not logprobs:
        return []
    rows = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset, strict=True)
    return [Logprob(token, p, list(top.items()), offset) for token, p, top, offset in rows]


class OpenAI:
    """The openai package against one router."""

    def __init__(self, address: str, model: str, stream: bool) -> None:
        self.client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=60)
        self.model = model
        self.stream = stream
        self.name = "openai, streamed" if stream else "openai"

    def models(self) -> list[str]:
        return [model.id for model in self.client.models.list()]

    def complete(self, prompt: str | list[int] | list[str], **fields: Any) -> Answer:
        asked = self._asked(fields)
        try:
            answer = self.client.completions.create(prompt=prompt, **asked)
            if not self.stream:
                choices = [
                    Choice(c.text, c.finish_reason, _completion_logprobs(c.logprobs))
                    for c in sorted(answer.choices, key=lambda c: c.index)
                ]
                return self._answer(choices, answer.usage)
            return self._streamed(answer, lambda c: c.text, _completion_logprobs)
        except openai.APIStatusError as error:
            raise Refusal(error.status_code, error.param, error.code) from error

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Answer:
        asked = self._asked(fields)
        try:
            answer = self.client.chat.completions.create(messages=messages, **asked)
            if not self.stream:
                choices = [
                    Choice(c.message.content, c.finish_reason, _chat_logprobs(c.logprobs))
                    for c in sorted(answer.choices, key=lambda c: c.index)
                ]
                return self._answer(choices, answer.usage)
            return self._streamed(answer, lambda c: c.delta.content or "", _chat_logprobs)
        except openai.APIStatusError as error:
            raise Refusal(error.status_code, error.param, error.code) from error

    def _asked(self, fields: dict[str, Any]) -> dict[str, Any]:
        known = {name: value for name, value in fields.items() if name in KNOWN}
        extra = {name: value for name, value in fields.items() if name not in KNOWN}
        if self.stream:
            known |= {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, **known, "extra_body": extra}

    def _streamed(self, events: Iterable[Any], text_of: Any, logprobs_of: Any) -> Answer:
        choices: dict[int, Choice] = {}
        usage = None
        for event in events:
            assert usage is None, "an event after the usage"
            usage = event.usage
            assert bool(event.choices) != bool(usage), "the usage comes alone and last"
            for part in event.choices:
                choice = choices.setdefault(part.index, Choice())
                assert choice.finish is None, "an event of a choice that ended"
                choice.text += text_of(part)
                choice.finish = part.finish_reason
                choice.logprobs += logprobs_of(part.logprobs)
        return self._answer([choices[index] for index in sorted(choices)], usage)

    @staticmethod
    def _answer(choices: list[Choice], usage: Any) -> Answer:
        cached = usage.prompt_tokens_details.cached_tokens
        return Answer(choices, usage.prompt_tokens, usage.completion_tokens, cached)
