"""A dense decoder's whole forward pass by the C kernel: transformers' modelling code read once, at load, and from then on one
call an iteration.

Which weights a family has and where its norms stand is read from the loaded modules; whether that was read rightly is not
believed but tried: `disagreement` holds it against the family's own forward before anything is served. What cannot be read
(experts, layers of another make) keeps to transformers' code, with the same attention.
"""

from array import array
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p, sizeof
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .attention import Span
from .mock import splitmix64
from .native import DTYPES, Native, NativePass, zeros
from .rows import Row

LONGEST_TRIED = 48  # tokens
PANEL = 32  # outputs of a product whose weights lie together
ACTS = {"silu": 0, "gelu_pytorch_tanh": 1}


class Norms(NamedTuple):
    """The attributes of a layer that hold its norms, before and after its two branches; None: there is none."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


BEFORE = Norms("input_layernorm", None, "post_attention_layernorm", None)
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
NORMS = {
    "llama": BEFORE,
    "mistral": BEFORE,
    "qwen2": BEFORE,
    "qwen3": BEFORE,
    "phi3": BEFORE,
    "olmo2": AFTER,
    "gemma2": AROUND,
    "gemma3_text": AROUND,
}
# Their norms multiply by one more than the weight.
ONE_MORE = ("gemma2", "gemma3_text")


class _Linear(Structure):
    _fields_ = (("weights", c_void_p), ("bias", c_void_p), ("n", c_int32), ("k", c_int32))


class _Norm(Structure):
    _fields_ = (("weights", c_void_p), ("width", c_int32), ("unused", c_int32))


class _Layer(Structure):
    _fields_ = (
        *((name, _Norm) for name in ("before_attention", "query", "key", "after_attention", "before_mlp", "after_mlp")),
        *((name, _Linear) for name in ("qkv", "out", "gate_up", "down")),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int32),
        ("rotary", c_int32),
    )


class _Decoder(Structure):
    _fields_ = (
        ("layers", POINTER(_Layer)),
        ("last", _Norm),
        ("head", _Linear),
        *((name, c_int32) for name in ("count", "hidden", "inner", "heads", "kv_heads", "width", "turned")),
        *((name, c_int32) for name in ("act", "dtype", "level", "block_size", "threads")),
        *((name, c_float) for name in ("eps", "scaling", "softcap", "embedding_scale")),
        ("embeddings", c_void_p),
        ("cos", c_void_p * 2),
        ("sin", c_void_p * 2),
        ("parallel", c_void_p),
        ("barrier", c_void_p),
    )


class _Forward(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("ids", "positions", "x", "branch", "wide", "h", "qkv", "gated")),
        *((name, c_void_p) for name in ("spans", "tables", "room", "ends", "logits")),
        *((name, c_int32) for name in ("tokens", "count", "n", "unused")),
    )


class _Draws(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("heats", "seeds", "places", "drawn"))


class _Burst(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("stops", "interrupt", "ids", "spans")),
        ("room", c_int64),
        ("most", c_int32),
        ("stops_count", c_int32),
    )


SIZES = sum(
    sizeof(made) << bits for made, bits in ((_Layer, 48), (_Decoder, 32), (_Forward, 16), (_Draws, 8), (_Burst, 0))
)


class Unreadable(Exception):
    """The model is not one that the kernel computes; says why."""


class Forward:
    """One model's weights in the order the kernel reads them, and the memory a pass needs."""

    def __init__(self, model: Any, native: Native, max_context: int) -> None:
        config = model.config.get_text_config()
        kernel = native.kernel
        if config.model_type not in NORMS:
            raise Unreadable(f"{config.model_type} has layers of its own")
        kernel.library.scls_forward_sizes.restype = c_int64
        if kernel.library.scls_forward_sizes() != SIZES:
            raise Unreadable("the extension was built from other sources")
        self.model, self.native, self.config = model, native, config
        self.pack = kernel.library.scls_pack
        self.pack.argtypes, self.pack.restype = (c_void_p, c_void_p, c_int32, c_int32, c_int32), None
        self.positions_known = max_context
        self.kept: list[Tensor] = []  # what the structures point to
        self.dtype = model.dtype
        body = model.model
        first = body.layers[0].self_attn
        # Rotary embeddings: one for all layers, or one a kind of layer.
        kinds = [
            layer.self_attn.layer_type if hasattr(body.rotary_emb, "layer_types") else None for layer in body.layers
        ]
        tables = sorted(set(kinds), key=str)
        if len(tables) > 2:
            raise Unreadable("more than two rotary embeddings")
        # All weights one behind the other, in large pages: a step reads them all.
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        room = sum((one.out_features + PANEL) * one.in_features + PANEL for one in linears)
        self.packed, self.used = zeros((room,), self.dtype), 0
        self.layers = (_Layer * len(body.layers))()
        for at, layer in enumerate(body.layers):
            self._read(self.layers[at], layer, at, tables.index(kinds[at]))
        self.heads, self.width = config.num_attention_heads, native.width
        self.inner = int(config.intermediate_size)
        act = getattr(config, "hidden_activation", None) or config.hidden_act
        if act not in ACTS:
            raise Unreadable(f"activation {act}")
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        # Of Gemma's; others' is one.
        scale = config.hidden_size**0.5 if config.model_type in ONE_MORE else 1.0
        angles = [self._angles(body.rotary_emb, max_context, kind) for kind in tables]
        self.decoder = _Decoder(
            layers=self.layers,
            last=self._norm(body.norm),
            head=self._linear([model.lm_head]),
            count=len(body.layers),
            hidden=config.hidden_size,
            inner=self.inner,
            heads=self.heads,
            kv_heads=native.kv_heads,
            width=self.width,
            turned=angles[0][0].shape[-1],
            act=ACTS[act],
            dtype=DTYPES[self.dtype],
            level=native.level,
            block_size=native.block_size,
            eps=config.rms_norm_eps,
            scaling=first.scaling,
            softcap=getattr(first, "attn_logit_softcapping", None) or 0.0,
            embedding_scale=scale,
            embeddings=self._keep(body.embed_tokens.weight.detach()),
            parallel=kernel.parallel,
            barrier=kernel.barrier,
        )
        for at, (cos, sin) in enumerate(angles):
            self.decoder.cos[at], self.decoder.sin[at] = self._keep(cos), self._keep(sin)
        self.run, self.need = kernel.library.scls_forward, kernel.library.scls_forward_room
        self.run.argtypes, self.run.restype = (POINTER(_Decoder), POINTER(_Forward)), None
        self.need.argtypes, self.need.restype = (POINTER(_Decoder), POINTER(_Forward)), c_int64
        self.drawer, self.bursts = kernel.library.scls_draw, kernel.library.scls_burst
        self.drawer.argtypes, self.drawer.restype = (POINTER(_Decoder), POINTER(_Draws), c_void_p, c_int32), None
        self.bursts.argtypes = (POINTER(_Decoder), POINTER(_Forward), POINTER(_Draws), POINTER(_Burst))
        self.bursts.restype = c_int32
        self._make_room(64)

    # ---------------------------------------------------------------- reading

    def _read(self, into: _Layer, layer: Any, at: int, rotary: int) -> None:
        names = NORMS[self.config.model_type]
        for name in Norms._fields:
            attribute = getattr(names, name)
            setattr(into, name, self._norm(getattr(layer, attribute)) if attribute else _Norm())
        attention, mlp = layer.self_attn, layer.mlp
        into.query, into.key = (
            self._norm(getattr(attention, "q_norm", None)),
            self._norm(getattr(attention, "k_norm", None)),
        )
        if hasattr(attention, "qkv_proj"):
            into.qkv = self._linear([attention.qkv_proj])
        else:
            into.qkv = self._linear([attention.q_proj, attention.k_proj, attention.v_proj])
        into.out = self._linear([attention.o_proj])
        both = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        into.gate_up = self._linear(both, gated=True)
        into.down = self._linear([mlp.down_proj])
        into.keys, into.values = self.native.addresses[at]
        # One for all layers, where layers do not have their own.
        into.window = getattr(attention, "sliding_window", getattr(self.config, "sliding_window", None)) or 0
        into.rotary = rotary

    def _norm(self, module: Any) -> _Norm:
        if module is None:
            return _Norm()
        weight = module.weight.detach().float()
        if self.config.model_type in ONE_MORE:
            weight = weight + 1.0
        return _Norm(weights=self._keep(weight), width=len(weight))

    def _linear(self, modules: Sequence[nn.Linear], gated: bool = False) -> _Linear:
        weight = torch.cat([module.weight.detach() for module in modules])  # [N, K]
        biases = [module.bias for module in modules]
        bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases]).float()
        if gated:
            weight = braid(weight)
            bias = None if bias is None else braid(bias)
        n, k = weight.shape
        if k % 2:
            raise Unreadable(f"a product over {k} numbers")
        count = -(-n // PANEL) * PANEL * k
        packed = self.packed[self.used : self.used + count]
        self.used += -(-count // PANEL) * PANEL
        weight = weight.contiguous()
        self.pack(weight.data_ptr(), packed.data_ptr(), n, k, DTYPES[self.dtype])
        return _Linear(weights=packed.data_ptr(), bias=None if bias is None else self._keep(bias), n=n, k=k)

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    @staticmethod
    def _angles(rotary: Any, positions: int, kind: str | None) -> tuple[Tensor, Tensor]:  # [positions, turned]
        """Of all positions a row can have: they do not change with the company (see `config.longest_context`)."""
        like, at = torch.empty(0, dtype=torch.float32), torch.arange(positions)[None]
        cos, sin = rotary(like, at, kind) if kind else rotary(like, at)
        return cos[0], sin[0]

    # ---------------------------------------------------------------- is it right?

    def disagreement(self, logits_of: Callable[[NDArray[np.uint32], NativePass, Sequence[int]], Tensor]) -> float:
        """The largest difference of a logit from those of transformers' code, over their standard deviation: of two prompts
        in one pass and of a token after each. A window longer than the prompts is not tried.
        """
        size = self.native.block_size
        room = len(self.native.pools[0][0]) // size // 2
        length = min(LONGEST_TRIED, room * size - 1, self.positions_known - 1)
        spans = [Span(range(at * room, (at + 1) * room), 0, max(1, length // (1 + at))) for at in range(2)]
        draw = np.random.default_rng(0)
        worst = 0.0
        for tried in (spans, [Span(span.blocks, span.size, 1) for span in spans]):
            here = self.native.lay(tried)
            ids = draw.integers(0, self.decoder.head.n, here.tokens).astype(np.uint32)
            theirs = logits_of(ids, here, range(2)).float()
            ours = self(ids, here, range(2))
            worst = max(worst, float((ours - theirs).abs().max() / theirs.std()))
        return worst

    def take_over(self) -> None:
        """Gives the modules' own copies of packed weights back: nobody multiplies by them any more."""
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    # ---------------------------------------------------------------- a pass

    def _make_room(self, tokens: int) -> None:
        """For a pass of up to so many tokens."""
        hidden, attended = self.config.hidden_size, self.heads * self.width
        wide = attended + 2 * self.native.kv_heads * self.width
        memory = {
            "positions": torch.empty(tokens, dtype=torch.int32),
            "x": torch.empty(tokens, hidden),
            "branch": torch.empty(tokens, hidden),
            "wide": torch.empty(tokens, wide),
            "h": torch.empty(tokens, max(hidden, attended), dtype=self.dtype),
            "qkv": torch.empty(tokens, wide, dtype=self.dtype),
            "gated": torch.empty(tokens, self.inner, dtype=self.dtype),
        }
        self.room, self.memory = tokens, memory
        self.call = _Forward(**{name: tensor.data_ptr() for name, tensor in memory.items()})

    def __call__(self, ids: NDArray[np.uint32], here: NativePass, drawing: Sequence[int]) -> Tensor:  # [T], N -> [N, V]
        """Logits of the last tokens of the spans `drawing`; `ids` lie as in `here`."""
        logits, _ = self._set(ids, here, drawing)
        self.run(byref(self.decoder), byref(self.call))
        if self.cap:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def _set(self, ids: NDArray[np.uint32], here: NativePass, drawing: Sequence[int]) -> tuple[Tensor, Any]:
        """Fills `call`; its logits to be, and what else has to live as long as the call."""
        if here.tokens > self.room:
            self._make_room(max(here.tokens, 2 * self.room))
        ends = array("q", [here.lasts[at] for at in drawing])
        logits = torch.empty(len(ends), self.decoder.head.n)
        self.decoder.threads = here.threads
        call = self.call
        call.ids, call.tokens = ids.ctypes.data, here.tokens
        call.spans, call.count = here.spans.buffer_info()[0], len(here.order)
        call.tables = here.tables.buffer_info()[0]
        call.ends, call.n, call.logits = ends.buffer_info()[0], len(ends), logits.data_ptr()
        call.room = self.native.room(self.need(byref(self.decoder), byref(call)))
        return logits, ends

    # ---------------------------------------------------------------- draws

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:  # [N, V], N
        """A token of each row by its temperature, seed and place alone."""
        draws = _Drawing(rows, 1)
        self.drawer(byref(self.decoder), byref(draws.call), logits.data_ptr(), len(rows))
        drawn: list[int] = draws.drawn[0].tolist()
        return drawn

    def burst(
        self, ids: NDArray[np.uint32], here: NativePass, rows: Sequence[Row], most: int, interrupt: int
    ) -> list[list[int]]:
        """Up to `most` passes of one token a row, each of what the last drew: the tokens of each. Writes to `ids` and `here`.

        `interrupt` is the address of a number that is not zero when the caller is wanted.
        """
        logits, ends = self._set(ids, here, range(len(rows)))
        draws = _Drawing(rows, most)
        stops = array("I", sorted(frozenset().union(*(row.stops for row in rows))))
        # Later passes see more, and may need a little more room. A burst that has too little ends.
        room = 2 * self.need(byref(self.decoder), byref(self.call))
        self.call.room = self.native.room(room)
        burst = _Burst(
            stops=stops.buffer_info()[0],
            interrupt=interrupt,
            ids=ids.ctypes.data,
            spans=here.spans.buffer_info()[0],
            room=room,
            most=most,
            stops_count=len(stops),
        )
        made = self.bursts(byref(self.decoder), byref(self.call), byref(draws.call), byref(burst))
        del logits, ends  # not before: the call wrote to them by their addresses
        passes: list[list[int]] = draws.drawn[:made].tolist()
        return passes


class _Drawing:
    """How rows draw, as the kernel reads it."""

    def __init__(self, rows: Sequence[Row], passes: int) -> None:
        self.heats = array("f", [row.draw.temperature for row in rows])
        self.seeds = array("Q", [mixed(row.draw.seed) for row in rows])
        self.places = array("q", [row.output_len for row in rows])
        self.drawn = np.empty((passes, len(rows)), dtype=np.uint32)
        heats, seeds, places = (numbers.buffer_info()[0] for numbers in (self.heats, self.seeds, self.places))
        self.call = _Draws(heats=heats, seeds=seeds, places=places, drawn=self.drawn.ctypes.data)


mixed = lru_cache(maxsize=1 << 12)(splitmix64)


def braid(both: Tensor) -> Tensor:  # [2 I, ..] -> [2 I, ..]
    """Gates and ups in turn, sixteen each: what is gated lies beside its gate."""
    inner = len(both) // 2
    if inner % 16:
        raise Unreadable(f"an inner width of {inner}")
    gates, ups = (part.reshape(inner // 16, 16, *both.shape[1:]) for part in (both[:inner], both[inner:]))
    return torch.stack([gates, ups], 1).reshape(both.shape)
