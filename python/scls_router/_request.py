"""From arguments to the contract's requests. What the clients have in common; knows protobuf, not gRPC."""

from __future__ import annotations

import operator
import random
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

from google.protobuf.message import Message

from scls_router.errors import InvalidRequest
from scls_router.proto import common_pb2 as common
from scls_router.proto import router_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Buffer, Required

M = TypeVar("M", bound=Message)

# What the router takes; it would refuse a longer one as a whole, after all of it was sent.
MOST_MESSAGE = 16 << 20
ID_FORMATS = {"I", "L", "<I", "<L", "=I", "=L", "@I", "@L"}


class Tensor(Protocol):
    """A torch tensor, as far as it is needed here."""

    def detach(self) -> Any: ...


class Array(Protocol):
    """A numpy array, as far as it is needed here: before Python 3.12 no type checker knows it as a buffer."""

    @property
    def ndim(self) -> int: ...
    def tobytes(self) -> bytes: ...


if TYPE_CHECKING:
    Prompt = str | Sequence[int] | Buffer | Array | Tensor


class Options(TypedDict, total=False):
    """What a generation may be asked with; `Client.generate` says what each means."""

    model: Required[str]
    max_tokens: int | None
    temperature: float | None
    top_k: int
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    request_id: str
    urgent: bool


def generate_request(
    prompt: Prompt,
    *,
    model: str,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
    n: int = 1,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    min_tokens: int = 0,
    ignore_eos: bool = False,
    request_id: str = "",
    urgent: bool = False,
) -> pb.GenerateRequest:
    """The message of a generation; the router checks the values, this checks what a message cannot say."""
    if max_tokens is not None and max_tokens < 1:
        raise _invalid("max_tokens", f"max_tokens must be at least 1: {max_tokens}")
    if n < 1:
        raise _invalid("n", f"n must be at least 1: {n}")
    sampling = _message(
        common.Sampling,
        # Of the contract 0 is the default, which is greedy.
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        # A retry draws what the first call would have drawn.
        seed=random.getrandbits(64) if seed is None else operator.index(seed) % 2**64,
        logit_bias=logit_bias,
        logprobs=logprobs,
    )
    limits = _message(
        common.Limits,
        max_tokens=max_tokens or 0,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
    )
    return _bounded(
        _message(
            pb.GenerateRequest,
            model=model,
            prompt=_prompt(prompt),
            sampling=sampling,
            limits=limits,
            n=n,
            stop=[stop] if isinstance(stop, str) else stop,
            request_id=request_id,
            urgent=urgent,
        )
    )


def route_request(prompt: Prompt, *, model: str) -> pb.RouteRequest:
    """The message that asks for a decision alone."""
    return _bounded(_message(pb.RouteRequest, model=model, prompt=_prompt(prompt)))


def packed_ids(ids: Any) -> bytes:
    """Token ids as little-endian u32, four bytes an id.

    Buffers (numpy arrays, torch tensors, `array("I")`, packed bytes) are copied once, as a whole; a list of ints is
    read int by int.
    """
    if hasattr(ids, "detach"):
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, bytes | bytearray) or (isinstance(ids, memoryview) and ids.format == "B"):
        if len(ids) % 4:
            raise _invalid("prompt", f"{len(ids)} bytes are no token ids of four bytes each")
        return bytes(ids)
    if hasattr(ids, "astype"):
        return _packed_numpy(ids)
    if isinstance(ids, array | memoryview):
        view = memoryview(ids)
        if sys.byteorder == "little" and view.format in ID_FORMATS and view.itemsize == 4 and view.ndim == 1:
            return view.tobytes()
    try:
        packed = array("I", ids)
    except OverflowError:
        raise _invalid("prompt", "a token id is from 0 to 4294967295") from None
    except TypeError as error:
        raise TypeError(f"a prompt is a text, or token ids as a list of ints or a buffer of them: {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _packed_numpy(ids: Any) -> bytes:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(f"token ids are a one-dimensional array of integers: {ids.dtype} of shape {tuple(ids.shape)}")
    if ids.dtype.str != "<u4" and ids.size and (ids.min() < 0 or ids.max() > 0xFFFFFFFF):
        raise _invalid("prompt", "a token id is from 0 to 4294967295")
    packed: bytes = ids.astype("<u4", copy=False).tobytes()
    return packed


def _prompt(prompt: Any) -> pb.Prompt:
    if isinstance(prompt, str):
        return _message(pb.Prompt, text=prompt)
    return pb.Prompt(ids=common.TokenIds(le_u32=packed_ids(prompt)))


def _message(kind: Callable[..., M], **fields: Any) -> M:
    """A message of these fields. Protobuf does not say which of them it cannot hold."""
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except ValueError as error:
                name = "prompt" if name == "text" else name
                raise _invalid(name, f"{name} cannot be sent: {error}") from None
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None
        raise


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, "INVALID_ARGUMENT", None, field)


def _bounded(request: M) -> M:
    if (size := request.ByteSize()) > MOST_MESSAGE:
        raise _invalid("prompt", f"the request is too large: {size} bytes\nthe router takes {MOST_MESSAGE}")
    return request
