"""The C kernel of the worker's own wheel as a pass over blocks: the fast way on a CPU, where `attention.Pass` is the portable one.

Says which machine, model and layout it serves; the pools it is given hold KV in an order of its own (native/attention.c).
Knows blocks as numbers, no rows, no model.
"""

import ctypes
import importlib.util
from array import array
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import Span

TILE = 16  # tokens; a block is a whole number of them, and a head of lanes
LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Call(ctypes.Structure):
    """`struct Call` of attention.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "q", "k", "v", "out")),
        *((name, c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        *((name, c_void_p) for name in ("spans", "tables", "room", "parallel", "barrier")),
        *((name, c_int32) for name in ("count", "block_size", "heads", "kv_heads", "width")),
        *((name, c_int32) for name in ("window", "threads", "level", "dtype")),
        *((name, c_float) for name in ("scaling", "softcap")),
    )


class Kernel:
    """The loaded extension, and the threads it may use: torch's own. A second pool would wait for the first one's cores."""

    def __init__(self, path: Path) -> None:
        self.library = library = ctypes.CDLL(str(path))
        library.scls_attention_call_size.restype = c_int64
        if library.scls_attention_call_size() != ctypes.sizeof(Call):
            raise OSError(f"built from other sources: {path}")
        library.scls_attention_level.restype = c_int32
        self.level: int = library.scls_attention_level()
        self.attend, self.room = library.scls_attend, library.scls_attention_room
        self.attend.argtypes, self.attend.restype = (POINTER(Call),), None
        self.room.argtypes, self.room.restype = (POINTER(Call),), c_int64
        self.large_pages = library.scls_large_pages
        self.large_pages.argtypes, self.large_pages.restype = (c_void_p, c_int64), None
        self.parallel, self.barrier = (address_in_torch(name) for name in ("GOMP_parallel", "GOMP_barrier"))

    def name(self, dtype: torch.dtype, level: int) -> str:
        if dtype is torch.float32:
            level = min(level, LEVELS.index("avx512"))
        return f"native {LEVELS[level]}" + ("" if self.parallel and self.barrier else ", one thread")


def address_in_torch(name: str) -> int | None:
    """Of a function of the OpenMP that torch runs on, whatever library has it: found through torch's own dependencies."""
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            return ctypes.cast(getattr(ctypes.CDLL(str(library)), name), c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


@lru_cache(maxsize=1)
def kernel() -> Kernel | None:
    """None where the wheel was built without a compiler, or the sources went on since."""
    found = importlib.util.find_spec("scls_worker._attention")
    if found is None or found.origin is None:
        return None
    try:
        return Kernel(Path(found.origin))
    except (OSError, AttributeError):
        return None


def refusal(device: torch.device, dtype: torch.dtype, block_size: int, width: int) -> str | None:
    """Why the kernel does not serve; None: it does."""
    if device.type != "cpu":
        return f"device {device.type}"
    if dtype not in DTYPES:
        return str(dtype).removeprefix("torch.")
    if block_size % TILE:
        return f"block size {block_size}"
    if width % TILE:
        return f"head width {width}"
    if kernel() is None:
        return "no C extension of this version"
    return None


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """In large pages where the system gives them: what is read whole, step after step, is read faster."""
    pool = torch.empty(tuple(shape), dtype=dtype)
    loaded = kernel()
    if loaded is not None:
        loaded.large_pages(pool.data_ptr(), pool.nbytes)
    return pool.zero_()


class Native:
    """The kernel over one model's pools."""

    def __init__(self, pools: Sequence[tuple[Tensor, Tensor]], block_size: int, level: int | None = None) -> None:
        loaded = kernel()
        assert loaded is not None
        self.kernel, self.pools, self.block_size = loaded, pools, block_size
        self.level = loaded.level if level is None else level
        self.addresses = [(keys.data_ptr(), values.data_ptr()) for keys, values in pools]
        _, self.kv_heads, self.width = pools[0][0].shape
        self.dtype = pools[0][0].dtype
        self.name = loaded.name(self.dtype, self.level)
        self._room = torch.empty(0, dtype=torch.uint8)

    def lay(self, spans: Sequence[Span]) -> "NativePass":
        return NativePass(self, spans)

    def room(self, size: int) -> int:
        """The address of so many bytes that nobody else uses during a call."""
        if size > self._room.numel():
            self._room = torch.empty(size, dtype=torch.uint8)  # torch aligns to 64 bytes
        return self._room.data_ptr()


class NativePass:
    """Where an iteration's tokens write and read: the packed order is that of the spans."""

    def __init__(self, native: Native, spans: Sequence[Span]) -> None:
        self.native = native
        self.order = range(len(spans))
        # As the kernel reads them. Every iteration makes them anew: no numpy, whose calls cost more than these few numbers.
        self.spans, self.tables = array("i"), array("i")  # [rows, 4], [blocks of all rows]
        self.lasts = []  # the last token of each
        first = 0
        for blocks, start, size in spans:
            self.spans.extend((start, size, first, len(self.tables)))
            self.tables.extend(blocks)
            first += size
            self.lasts.append(first - 1)
        self.tokens = first
        self.threads = torch.get_num_threads()
        self._calls: dict[int | None, Any] = {}

    @cached_property
    def positions(self) -> Tensor:  # [T]
        starts, sizes, firsts, _ = np.array(self.spans).reshape(-1, 4).T
        return torch.from_numpy(np.repeat(starts - firsts, sizes) + np.arange(self.tokens))

    @cached_property
    def ends(self) -> Tensor:  # [rows]
        return torch.tensor(self.lasts)

    def _call(self, window: int | None, heads: int) -> Any:
        """What is the same for all layers of one window."""
        if window not in self._calls:
            native = self.native
            self._calls[window] = Call(
                spans=self.spans.buffer_info()[0],
                tables=self.tables.buffer_info()[0],
                parallel=native.kernel.parallel,
                barrier=native.kernel.barrier,
                count=len(self.order),
                block_size=native.block_size,
                heads=heads,
                kv_heads=native.kv_heads,
                width=native.width,
                window=window or 0,
                threads=self.threads,
                level=native.level,
                dtype=DTYPES[native.dtype],
            )
            call = self._calls[window]
            call.room = native.room(native.kernel.room(byref(call)))
        return self._calls[window]

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, H, T, D]
        key: Tensor,  # [1, Hkv, T, D]
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [1, T, H, D]
        native = self.native
        query, key, value = (dense(tensor) for tensor in (query, key, value))
        _, heads, tokens, width = query.shape
        out = query.new_empty(1, tokens, heads, width)
        call = self._call(window, heads)
        call.keys, call.values = native.addresses[layer]
        call.q, call.k, call.v, call.out = query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()
        _, call.q_head, call.q_token, _ = query.stride()
        _, call.k_head, call.k_token, _ = key.stride()
        _, call.v_head, call.v_token, _ = value.stride()
        call.scaling, call.softcap = scaling, softcap or 0.0
        native.kernel.attend(byref(call))
        return out


def dense(tensor: Tensor) -> Tensor:
    """With a head's numbers one behind the other, as they nearly always are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
