"""What this machine could do at most: bytes read a second, products a second, and what follows from both for a model.

The limits are measured, the best of several kernels and repetitions, in the same run as the engines; the bounds are counted
from the model's shape:

    weights of a layer   W = h H D + 2 h Hkv D + H D h + 3 h f        (q, k and v, o; gate, up and down)
    token through all    2 n W FLOP, and 4 n H D c for the c tokens it sees
    token drawn          2 V h FLOP more, for the output layer
    decode step          max(bytes / bandwidth, FLOP / peak), where bytes are those of n W + V h weights and of the KV of
                         every token that is seen, 2 n Hkv D each
    prefill              FLOP / peak: it reads weights once for many tokens

A step's maximum supposes that reading and computing hide one another entirely. Norms, rotary embeddings, activations and
sampling count nothing. The bound of a workload is the sum over the iterations of the schedule in which every row starts as
soon as there is a place, prompts first; `overlapped` is the same work if prefills could also hide behind the reading of
other iterations: no schedule can pass that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turns import THREADS
from workload import Request, requests

BYTES = {"bfloat16": 2, "float32": 4}
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    bandwidth: float  # bytes a second
    peak: float  # FLOP a second in the model's type


@dataclass(frozen=True)
class Shape:
    """A dense model, as far as work is counted."""

    layers: int
    layer_weights: int
    head_weights: int
    heads: int
    kv_heads: int
    width: int  # of a head
    size: int  # bytes of a number

    @classmethod
    def of(cls, folder: Path, dtype: str) -> Shape:
        return cls.of_config(json.loads((folder / "config.json").read_text()), dtype)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], dtype: str) -> Shape:
        h, f = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        width = config.get("head_dim") or h // heads
        return cls(
            layers=config["num_hidden_layers"],
            layer_weights=2 * h * heads * width + 2 * h * kv_heads * width + 3 * h * f,
            head_weights=h * config["vocab_size"],
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            size=BYTES[dtype],
        )

    @property
    def weight_bytes(self) -> int:
        return (self.layers * self.layer_weights + self.head_weights) * self.size

    def flop(self, tokens: int, seen: int, drawn: int) -> int:
        """Of tokens that see so many in all, of which so many draw."""
        attention = 4 * self.layers * self.heads * self.width * seen
        return 2 * self.layers * self.layer_weights * tokens + attention + 2 * self.head_weights * drawn

    def kv_bytes(self, seen: int) -> int:
        return 2 * self.layers * self.kv_heads * self.width * self.size * seen

    def step(self, rows: int, seen: int) -> tuple[int, int]:
        """Bytes and FLOP of a decode step."""
        return self.weight_bytes + self.kv_bytes(seen), self.flop(rows, seen, rows)

    def prefill_flop(self, prompt: int) -> int:
        return self.flop(prompt, prompt * (prompt + 1) // 2, 1)


def step_seconds(shape: Shape, limits: Limits, rows: int, context: int) -> float:
    """A decode step of `rows` rows that see `context` tokens each."""
    read, flop = shape.step(rows, rows * context)
    return max(read / limits.bandwidth, flop / limits.peak)


@dataclass(frozen=True)
class Bound:
    seconds: float
    overlapped: float


def workload_bound(shape: Shape, limits: Limits, work: Sequence[Request], places: int = 64) -> Bound:
    """All requests are there at once; so many rows run together."""
    waiting = list(work)
    running: list[tuple[int, int]] = []  # tokens seen by the next step, steps left
    seconds, read_all, flop_all = 0.0, 0, 0
    while waiting or running:
        came, waiting = waiting[: places - len(running)], waiting[places - len(running) :]
        for one in came:
            flop = shape.prefill_flop(len(one.prompt))
            seconds += flop / limits.peak
            flop_all += flop
            running.append((len(one.prompt) + 1, one.output - 1))
        running = [row for row in running if row[1]]
        if running:
            read, flop = shape.step(len(running), sum(seen for seen, _ in running))
            seconds += max(read / limits.bandwidth, flop / limits.peak)
            read_all, flop_all = read_all + read, flop_all + flop
            running = [(seen + 1, left - 1) for seen, left in running]
    return Bound(seconds, max(read_all / limits.bandwidth, flop_all / limits.peak))


class Meter:
    """What reaches the limits, kept ready to be run again: other guests of a machine take from its memory's rate and give it
    back within seconds, so a share of a limit is one of the limit measured beside it.

    `working_set`: bytes that are read over and over, as many as the model's weights; what fits in a cache would be read from
    there.
    """

    def __init__(self, dtype: str, working_set: int) -> None:
        import torch

        torch.set_num_threads(THREADS)
        self.size = max(64 * MIB, working_set)
        whole = torch.ones(self.size // 8, dtype=torch.int64)
        halves = whole.view(torch.float32)
        # Which of them reaches the memory's rate depends on the machine.
        self.readers: list[Callable[[], Any]] = [whole.max, whole.sum, halves.sum, halves.max]
        self.products: list[tuple[int, Callable[[], Any]]] = []
        for m, k, n in ((2048, 2048, 2048), (1024, 768, 2304), (512, 2304, 768)):
            a, b = torch.randn(m, k).to(getattr(torch, dtype)), torch.randn(n, k).to(getattr(torch, dtype))
            self.products.append((2 * m * k * n, lambda a=a, b=b: torch.nn.functional.linear(a, b)))

    def look(self, seconds: float = 0.4) -> Limits:
        """The best of all, each for so long."""
        bandwidth = self.size / min(best(reader, seconds) for reader in self.readers)
        peak = max(flop / best(product, seconds) for flop, product in self.products)
        return Limits(bandwidth, peak)


def measure(dtype: str, working_set: int) -> Limits:
    return Meter(dtype, working_set).look()


def best(call: Callable[[], object], seconds: float = 0.4) -> float:
    """The shortest of the calls that fit into this time: a limit is what was reached once."""
    call()
    shortest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=tuple(BYTES), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="the limits alone, as one line")
    args = parser.parse_args()
    shape = Shape.of(args.folder, args.dtype)
    limits = measure(args.dtype, shape.weight_bytes)
    if args.json:
        print(json.dumps(asdict(limits)))
        return
    print(f"read {limits.bandwidth / 2**30:.1f} GiB/s, {args.dtype} {limits.peak / 1e9:.0f} GFLOP/s, {THREADS} threads")
    for rows in (1, 8, 32, 64):
        seconds = step_seconds(shape, limits, rows, 256)
        print(
            f"decode step, {rows:2} rows that see 256 tokens: {seconds * 1e3:6.2f} ms, {rows / seconds:6.0f} tokens/s"
        )
    work = requests()
    bound = workload_bound(shape, limits, work)
    tokens = sum(one.output for one in work)
    print(
        f"workload: {bound.seconds:.2f} s, {tokens / bound.seconds:.0f} tokens/s; overlapped {bound.overlapped:.2f} s"
    )


if __name__ == "__main__":
    main()
