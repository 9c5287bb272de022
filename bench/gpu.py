"""`make gpu`: what the worker's CUDA path makes of a GPU's memory. Random models of two shapes are made in place; the bandwidth
that they are compared with is measured in the same run.

    decode    bursts as long as the engine would make them, of rows that see 1,024 tokens: bytes of weights and KV that a
              step must read, over its time, as a share of the bandwidth; how often the host waited, for each token
    prefill   a chunk, as a share of the matrix products' peak
    model     the cost model that calibration fits, and how far its steps are from these

`--smoke` runs the same functions on a CPU with a tiny model, and judges nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent / "engine"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "figures"))

from make_model import COMMON, SHAPES
from roofline import Limits, Shape
from routing import goal, print_goals, report, write

GIB = 1 << 30


class Size(NamedTuple):
    """What is measured."""

    device: str
    dtype: str
    shapes: Sequence[str]
    rows: Sequence[int]
    context: int
    chunk: int  # tokens of a prefill
    rounds: int
    read: int  # bytes
    product: int  # rows and columns of a matrix


FULL = Size("cuda", "bfloat16", ("qwen3-0.6b", "llama-8b"), (1, 8, 64), 1024, 512, 15, 4 * GIB, 8192)
SMOKE = Size("cpu", "float32", ("llama-tiny",), (1, 3), 40, 32, 2, GIB >> 6, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shapes", nargs="*", metavar="SHAPE", help=f"of make_model.py; default: {' '.join(FULL.shapes)}"
    )
    parser.add_argument("--json", type=Path, help="default: nothing is written")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, a tiny model: does it run")
    args = parser.parse_args()
    if unknown := [shape for shape in args.shapes if shape not in SHAPES]:
        parser.error(f"no such shape: {unknown[0]}\nshapes: {', '.join(SHAPES)}")
    import torch

    if not args.smoke and not torch.cuda.is_available():
        built = f"torch {torch.__version__} was built for {torch.version.cuda or 'CPUs alone'}"
        print(f"no CUDA device: {built}\n  --smoke runs the same functions on the CPU", file=sys.stderr)
        sys.exit(2)
    size = SMOKE if args.smoke else FULL
    size = size._replace(shapes=args.shapes or size.shapes)
    began = time.monotonic()
    limits = measure(size)
    print(f"read {limits.bandwidth / GIB:.0f} GiB/s, {size.dtype} {limits.peak / 1e12:.1f} TFLOP/s", flush=True)
    steps, prefills, pools = [], [], []
    for shape in size.shapes:
        worker = Worker(shape, size)
        pools.append({"shape": shape, "attention": worker.attention, "blocks": worker.info.blocks})
        print(f"{shape}: attention {worker.attention}, {worker.info.blocks} blocks", flush=True)
        prefills.append(worker.prefill(limits))
        print(show_prefill(prefills[-1]), flush=True)
        model = worker.fitted()
        for rows in size.rows:
            steps.append(worker.decode(rows, limits, model))
            print(show(steps[-1]), flush=True)
        del worker, model
        torch.compiler.reset()
        gc.collect()  # a runner and its steps know one another
        torch.cuda.empty_cache()
    if args.smoke:
        print(f"smoke: {len(steps)} kinds of steps ran")
        return
    goals = judged(steps)
    print_goals(goals)
    if args.json:
        whole = report(
            "gpu",
            "make gpu",
            time.monotonic() - began,
            limits=asdict(limits),
            pools=pools,
            prefills=prefills,
            steps=steps,
            goals=goals,
        )
        whole["machine"]["gpu"] = torch.cuda.get_device_name()
        write(args.json, whole)


def judged(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for step in steps:
        what = f"{step['shape']}, {step['rows']} rows x {step['context']}"
        if step["shape"] == "llama-8b":
            made.append(goal(f"{what}: share of the bandwidth", step["share"], ">=", 0.5 if step["rows"] > 8 else 0.65))
        made.append(goal(f"{what}: waits of the host for a token", step["waits"], "<=", 0.25))
    return made


# ---------------------------------------------------------------- the machine


def measure(size: Size) -> Limits:
    """The best of several kernels: a limit is what was reached once."""
    import torch

    whole = torch.ones(size.read // 8, dtype=torch.int64, device=size.device)
    halves, other = whole.view(torch.float32), torch.empty_like(whole)
    readers: list[Callable[[], Any]] = [whole.sum, whole.max, halves.sum, halves.max]
    seconds = [min(times(reader, size)) for reader in readers]
    seconds.append(min(times(lambda: other.copy_(whole), size)) / 2)  # it writes as much as it reads
    a, b = (torch.randn(size.product, size.product, device=size.device).to(getattr(torch, size.dtype)) for _ in "ab")
    peak = 2 * size.product**3 / min(times(lambda: a @ b, size))
    return Limits(size.read / min(seconds), peak)


def times(call: Callable[[], object], size: Size, calls: int = 5) -> list[float]:
    """Seconds of a call, the first one left out; several in a row, so that a start is nobody's time."""
    import torch

    taken = []
    for turn in range(1 + size.rounds):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        if size.device == "cuda":
            torch.cuda.synchronize()
        if turn:
            taken.append((time.perf_counter() - began) / calls)
    return taken


# ---------------------------------------------------------------- the worker


class Worker:
    def __init__(self, shape: str, size: Size) -> None:
        import torch
        from scls_worker import memory, options
        from scls_worker.graphs import MOST, SPARE, Graphs
        from scls_worker.info import worker_info
        from scls_worker.model import ModelRunner
        from transformers import AutoConfig, AutoModelForCausalLM

        family, sizes = SHAPES[shape]
        config = AutoConfig.for_model(family, **{**COMMON, **sizes})
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        with torch.device(size.device):
            made = auto.from_config(config, dtype=getattr(torch, size.dtype), attn_implementation="scls")
        made.eval()
        self.shape, self.size, self.most = shape, size, MOST
        self.counted = Shape.of_config(config.to_dict(), size.dtype)
        given = options.parser().parse_args(["--model", shape, "--chunk-tokens", str(size.chunk)])
        self.block = given.block_size
        context = config.max_position_embeddings

        def probe(blocks: int) -> Any:
            return ModelRunner(made, blocks, given.block_size, eager=True, max_context=context)

        blocks = memory.default_blocks(made, given, context, probe)
        cuda = size.device == "cuda"
        self.runner = ModelRunner(
            made, blocks + (0 if cuda else SPARE), given.block_size, eager=not cuda, max_context=context
        )
        if not cuda:  # where pools have an order of their own, and nothing is captured
            self.runner.native = None
            self.runner.graphs = Graphs(made, self.runner.number, self.runner._lay_ones, spare=blocks)
            self.runner.burst = self.runner.graphs.burst
        self.graphs = self.runner.graphs
        if cuda:  # as behind a worker's first minute
            began = time.perf_counter()
            self.graphs.compile_behind().join()
            print(f"{shape}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
        self.attention = "varlen" if self.runner.varlen else "sdpa"
        self.info = worker_info(
            worker_id="gpu",
            served_names=[shape],
            model_digest=shape,
            tokenizer_digest="",
            vocab_size=config.vocab_size,
            eos_token_ids=[2],
            max_context=context,
            block_size=given.block_size,
            blocks=blocks,
            max_rows=given.max_rows,
            chunk_tokens=size.chunk,
            device=size.device,
            dtype=size.dtype,
            engine="gpu",
        )

    def fitted(self) -> Any:
        """What calibration makes of this worker; None where too little was measured."""
        from scls_worker import calibrate, cost

        effort = calibrate.COMMAND if self.size.device == "cuda" else calibrate.START
        try:
            model, _ = calibrate.fitted(calibrate.Bench(self.runner, self.info), effort, cost.models())
        except ValueError as error:
            print(f"{self.shape}: no cost model: {error}")
            return None
        return model

    def chunks(self, rows: int, start: int, tokens: int) -> list[Any]:
        """Of each row `tokens` tokens from `start` on, with blocks for a whole burst."""
        import numpy as np
        from scls_worker.rows import Chunk, Row, RowKey

        room = -(-(start + tokens + self.most) // self.block)
        if rows * room > self.info.blocks:
            sys.exit(f"{self.shape}: the pool has {self.info.blocks} blocks, {rows} rows want {rows * room}")
        made = []
        for at in range(rows):
            ids = (np.arange(start + tokens + self.most, dtype=np.uint64) * 7919 + at * 104_729) % self.info.vocab_size
            known = start + tokens
            row = Row(RowKey(at, 0, 0), 0, ids.astype(np.uint32), known, known, self.most)
            row.blocks.extend(range(at * room, (at + 1) * room))
            made.append(Chunk(row, start, tokens, draws=True))
        return made

    def prefill(self, limits: Limits) -> dict[str, Any]:
        tokens = self.size.chunk
        chunks = self.chunks(1, 0, tokens)
        seconds = statistics.median(times(lambda: self.runner.run(chunks), self.size, 1))
        flop = self.counted.flop(tokens, tokens * (tokens + 1) // 2, 1)
        share = flop / limits.peak / seconds
        return {"shape": self.shape, "tokens": tokens, "ms": 1e3 * seconds, "rate": tokens / seconds, "share": share}

    def decode(self, rows: int, limits: Limits, model: Any) -> dict[str, Any]:
        from scls_worker.engine import TOLD_US

        context = self.size.context
        chunks = self.chunks(rows, context - 1, 1)

        def seconds_of(steps: int) -> float:
            began = time.perf_counter()
            self.runner.burst(chunks, steps, None)
            return (time.perf_counter() - began) / steps

        alone = min(seconds_of(1) for _ in range(4))
        # Until a reader is told.
        most = int(min(self.most, max(1, TOLD_US / 1e6 // alone)))
        before = self.graphs.waits, self.graphs.passes
        seconds = statistics.median(seconds_of(most) for _ in range(self.size.rounds))
        waits = (self.graphs.waits - before[0]) / (self.graphs.passes - before[1]) / rows
        read, flop = self.counted.step(rows, rows * (context + most // 2))
        fit = model.iteration(rows=rows, context=rows * (context + most // 2)) if model else None
        return {
            "shape": self.shape,
            "rows": rows,
            "context": context,
            "burst": most,
            "ms": 1e3 * seconds,
            "rate": rows / seconds,
            "share": read / limits.bandwidth / seconds,
            "bound_ms": 1e3 * max(read / limits.bandwidth, flop / limits.peak),
            "waits": waits,
            "syncs": self.syncs(chunks, most),
            "captured": any(step.graph is not None for step in self.graphs.steps.values()),
            "fit_ms": 1e3 * fit if fit else None,
        }

    def syncs(self, chunks: Sequence[Any], most: int) -> int | None:
        """Operations of one burst that torch itself says make the host wait; None: it does not say."""
        import torch

        if self.size.device != "cuda":
            return None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                self.runner.burst(chunks, most, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in heard)


def show(step: dict[str, Any]) -> str:
    fit = f", fit {step['fit_ms']:.2f} ms" if step["fit_ms"] else ""
    waits = f"{step['waits']:.3f} waits a token" + ("" if step["captured"] else ", no graphs")
    return (
        f"{step['shape']}, {step['rows']:2} rows x {step['context']}: {step['ms']:6.2f} ms, {step['rate']:7.0f} tokens/s, "
        f"{step['share']:4.0%} of the bandwidth (bound {step['bound_ms']:.2f} ms{fit}), {waits}"
    )


def show_prefill(one: dict[str, Any]) -> str:
    return f"{one['shape']}, prefill of {one['tokens']}: {one['ms']:.2f} ms, {one['rate']:.0f} tokens/s, {one['share']:.0%} of the peak"


if __name__ == "__main__":
    main()
