"""One shape for what every client gets, so that one table of cases holds for all of them.

A door asks as its client does (the openai package, curl, grpcurl, our own clients) and answers in these types.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import grpc
import openai
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from harness import MODEL, Router
from tokenizers import Tokenizer

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
    http: bool
    """Whether it speaks OpenAI's HTTP: chats, models, token strings. Else it has completions by `Generate` alone."""

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
    tops = [top if isinstance(top, dict) else vars(top) for top in logprobs.top_logprobs]
    rows = zip(logprobs.tokens, logprobs.token_logprobs, tops, logprobs.text_offset, strict=True)
    return [Logprob(token, p, list(top.items()), offset) for token, p, top, offset in rows]


def _whole(answer: Any) -> Answer:
    """Of OpenAI's answer, chat or completion."""
    choices = []
    for at, choice in enumerate(answer.choices):
        assert choice.index == at
        if hasattr(choice, "message"):
            text, logprobs = choice.message.content, _chat_logprobs(choice.logprobs)
        else:
            text, logprobs = choice.text, _completion_logprobs(choice.logprobs)
        choices.append(Choice(text, choice.finish_reason, logprobs))
    return _answer(choices, answer.usage)


def _answer(choices: list[Choice], usage: Any) -> Answer:
    return Answer(choices, usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens)


class OpenAI:
    """The openai package."""

    http = True

    def __init__(self, router: Router, model: str, stream: bool = False) -> None:
        url = f"http://{router.addresses['http']}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        self.model = model
        self.stream = stream

    def models(self) -> list[str]:
        return [model.id for model in self.client.models.list()]

    def complete(self, prompt: str | list[int] | list[str], **fields: Any) -> Answer:
        return self._ask(partial(self.client.completions.create, prompt=prompt), fields)

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Answer:
        return self._ask(partial(self.client.chat.completions.create, messages=messages), fields)

    def _ask(self, create: Callable[..., Any], fields: dict[str, Any]) -> Answer:
        asked = {name: value for name, value in fields.items() if name in KNOWN}
        extra = {name: value for name, value in fields.items() if name not in KNOWN}
        if self.stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            answer = create(model=self.model, **asked, extra_body=extra)
            return self._streamed(answer) if self.stream else _whole(answer)
        except openai.APIStatusError as error:
            raise Refusal(error.status_code, error.param, error.code) from error

    @staticmethod
    def _streamed(events: Iterable[Any]) -> Answer:
        choices: dict[int, Choice] = {}
        usage = None
        for event in events:
            assert usage is None, "an event after the usage"
            usage = event.usage
            assert bool(event.choices) != bool(usage), "the usage comes alone and last"
            for part in event.choices:
                choice = choices.setdefault(part.index, Choice())
                assert choice.finish is None, "an event of a choice that ended"
                if hasattr(part, "delta"):
                    choice.text += part.delta.content or ""
                    choice.logprobs += _chat_logprobs(part.logprobs)
                else:
                    choice.text += part.text
                    choice.logprobs += _completion_logprobs(part.logprobs)
                choice.finish = part.finish_reason
        return _answer([choices[index] for index in sorted(choices)], usage)


class Curl:
    """curl lines, as in the README."""

    http = True

    def __init__(self, router: Router, model: str) -> None:
        if not shutil.which("curl"):
            pytest.skip("no curl")
        self.url = f"http://{router.addresses['http']}/v1"
        self.model = model

    def models(self) -> list[str]:
        return [model.id for model in self._curl("models").data]

    def complete(self, prompt: str | list[int] | list[str], **fields: Any) -> Answer:
        return _whole(self._curl("completions", {"model": self.model, "prompt": prompt, **fields}))

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Answer:
        return _whole(self._curl("chat/completions", {"model": self.model, "messages": messages, **fields}))

    def _curl(self, path: str, body: dict[str, Any] | None = None) -> Any:
        line = ["curl", "-sS", "-w", "\n%{http_code}", f"{self.url}/{path}"]
        if body is not None:
            line += ["-H", "content-type: application/json", "-d", json.dumps(body)]
        out = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout
        text, status = out.rsplit("\n", 1)
        answer = json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))
        if status != "200":
            raise Refusal(int(status), answer.error.param, answer.error.code)
        return answer


class Sdk:
    """Our own client over gRPC, blocking or of asyncio."""

    http = False

    def __init__(self, router: Router, model: str, asynchronous: bool = False) -> None:
        scls_router = pytest.importorskip("scls_router")
        if not hasattr(scls_router, "Client"):
            pytest.skip("this build of the package has no client")
        self.module = scls_router
        self.asynchronous = asynchronous
        self.target = router.addresses["grpc"]
        self.model = model
        self.tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    def models(self) -> list[str]:
        raise NotImplementedError("gRPC lists workers, not models")

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Answer:
        raise NotImplementedError("gRPC takes prompts alone")

    def complete(self, prompt: str | list[int] | list[str], **fields: Any) -> Answer:
        if "logit_bias" in fields:
            fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
        try:
            if self.asynchronous:
                done = asyncio.run(self._generate(prompt, fields))
            else:
                with self.module.Client(self.target) as client:
                    done = client.generate(prompt, model=self.model, **fields)
        except self.module.errors.InvalidRequest as error:
            raise Refusal(400, error.field, error.reason) from error
        choices = [Choice(c.text, c.finish_reason, self._logprobs(c)) for c in done.choices]
        usage = done.usage
        return Answer(choices, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)

    async def _generate(self, prompt: Any, fields: dict[str, Any]) -> Any:
        async with self.module.AsyncClient(self.target) as client:
            return await client.generate(prompt, model=self.model, **fields)

    def _logprobs(self, choice: Any) -> list[Logprob]:
        def token(number: int) -> str:
            return self.tokenizer.decode([number], skip_special_tokens=False)

        told = zip(choice.ids, choice.logprobs or (), strict=False)
        return [Logprob(token(i), t.chosen, [(token(k), p) for k, p in t.top]) for i, t in told]


class Reflected:
    """What grpcurl does: asks the router for its schema, makes a request of JSON, and knows nothing else of it."""

    http = False
    LIMITS = frozenset({"max_tokens", "min_tokens", "ignore_eos", "stop_token_ids"})

    def __init__(self, router: Router, model: str) -> None:
        self.channel = grpc.insecure_channel(router.addresses["grpc"])
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        method = pool.FindServiceByName("scls.v1.Router").FindMethodByName("Generate")
        self.request, answer = (message_factory.GetMessageClass(t) for t in (method.input_type, method.output_type))
        self.generate = self.channel.unary_stream(
            "/scls.v1.Router/Generate", self.request.SerializeToString, answer.FromString
        )
        self.model = model
        self.tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    def models(self) -> list[str]:
        raise NotImplementedError("gRPC lists workers, not models")

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Answer:
        raise NotImplementedError("gRPC takes prompts alone")

    def complete(self, prompt: str | list[int] | list[str], **fields: Any) -> Answer:
        packed = None if isinstance(prompt, str) else base64.b64encode(array("I", prompt).tobytes()).decode()
        stop = fields.pop("stop", [])
        asked = {
            "model": self.model,
            "prompt": {"ids": {"leU32": packed}} if packed else {"text": prompt},
            "n": fields.pop("n", 1),
            "stop": [stop] if isinstance(stop, str) else stop,
            "limits": {"max_tokens": 16, **{k: fields.pop(k) for k in self.LIMITS & fields.keys()}},
            "sampling": {"temperature": 1.0, **fields, "seed": fields.get("seed", 0) % 2**64},
        }
        request = json_format.ParseDict(asked, self.request())
        choices = [Choice() for _ in range(asked["n"])]
        usage = None
        try:
            for piece in self.generate(request, timeout=60):
                assert usage is None, "a message after the usage"
                choice = choices[piece.choice]
                assert choice.finish is None, "a message of a choice that ended"
                choice.text += piece.text
                choice.finish = {0: None, 1: "stop", 2: "length"}[piece.finish]
                choice.logprobs += [
                    Logprob(
                        self._token(i), t.chosen, [(self._token(k), p) for k, p in zip(t.top_ids, t.top, strict=True)]
                    )
                    for i, t in zip(piece.ids, piece.logprobs, strict=bool(piece.logprobs))
                ]
                usage = piece.usage if piece.HasField("usage") else None
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
            told = dict(error.trailing_metadata())
            raise Refusal(400, str(told["scls-field"]).rpartition(".")[2], None) from error
        assert usage is not None
        return Answer(choices, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)

    def _token(self, number: int) -> str:
        return self.tokenizer.decode([number], skip_special_tokens=False)


DOORS: dict[str, Callable[[Router, str], Door]] = {
    "openai": OpenAI,
    "openai-stream": partial(OpenAI, stream=True),
    "curl": Curl,
    "reflection": Reflected,
    "client": Sdk,
    "async-client": partial(Sdk, asynchronous=True),
}
