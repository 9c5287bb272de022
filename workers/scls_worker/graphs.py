"""Decode steps that stay on the device: what a step draws feeds the next one there, and the host looks at tokens once for many
steps.

A step is a plain function over buffers of its own, for some number of rows and of blocks a row: the model's forward, the
draw, and the state moved on. On CUDA it is captured as a graph and replayed, first with the family's own code, then with
what torch's compiler makes of it; where that cannot be it is called, and draws the same. Knows rows and blocks; knows no
layout and no queue.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import Attention, new_runner, passes
from .config import first_line
from .rows import Chunk
from .sampling import draw_plainly, seed_key
from .varlen import power_of_two

log = logging.getLogger(__name__)

# Steps between two looks at the host's wishes. Two lots are under way at most: the device never waits for the host.
LOT = 8
# Most steps of one burst, as long as their tokens have room.
MOST = 256
LEAST_BLOCKS = 8  # of a table
# Blocks behind the pool's that no row has: one that rows write to that are not there, one for trials.
SPARE = 2
# How far logits that are computed in another way (compiled, or by the C kernel) may be from the family's own, over their
# standard deviation. A norm or a weight in the wrong place is off by one; bfloat16 rounds after every operation in one of
# them, and where a product begins in the other.
MOST_OFF = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


Lay = Callable[[Tensor, Tensor], Attention]  # positions [N], tables [N, W]


def bucket(rows: int) -> int:
    """Rows that a step is made for: 1, 2, 4, then multiples of eight."""
    return power_of_two(rows) if rows <= 8 else -(-rows // 8) * 8


class Step:
    """One decode step of up to `rows` rows with up to `width` blocks each. A row that is not there writes to the block `spare`,
    at position 0 for ever.
    """

    def __init__(
        self,
        forward: Any,  # of transformers
        device: torch.device,
        number: int,
        lay: Lay,
        spare: int,
        rows: int,
        width: int,
        warm: bool = False,
    ) -> None:
        self.forward, self.number, self.lay, self.warm, self.spare = forward, number, lay, warm, spare
        pinned = device.type == "cuda"
        # Of each row: last token, its position, 1 where there is a row, key of its seed, place in its output.
        self.given = torch.zeros(5, rows, dtype=torch.int64, pin_memory=pinned)
        self.given_tables = torch.full((rows, width), spare, dtype=torch.int32, pin_memory=pinned)
        self.given_heat = torch.zeros(rows, 1, pin_memory=pinned)
        self.state = self.given.to(device, copy=True)
        self.tables = self.given_tables.to(device, copy=True)
        self.heat = self.given_heat.to(device, copy=True)
        self.ids, self.positions, self.live, self.seeds, self.places = self.state
        self.out = torch.zeros(MOST, rows, dtype=torch.int64, device=device)
        self.done = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, chunks: Sequence[Chunk]) -> None:
        given, tables, heat = (there.numpy() for there in (self.given, self.given_tables, self.given_heat))
        given[:], tables[:], heat[:] = 0, self.spare, 0.0
        for at, (row, start, _, _) in enumerate(chunks):
            given[:, at] = row.tokens[start], start, 1, seed_key(row.draw.seed), row.output_len
            tables[at, : len(row.blocks)] = row.blocks
            heat[at] = row.draw.temperature
        self.state.copy_(self.given, non_blocking=True)
        self.tables.copy_(self.given_tables, non_blocking=True)
        self.heat.copy_(self.given_heat, non_blocking=True)
        self.done.zero_()

    def run(self) -> None:
        """One step; nothing in it asks the device anything."""
        logits = self.logits()
        drawn = draw_plainly(logits, self.seeds, self.places, self.heat) if self.warm else logits.float().argmax(-1)
        self.out.index_copy_(0, self.done, drawn[None])
        self.ids.copy_(drawn)
        self.positions.add_(self.live)
        self.places.add_(self.live)
        self.done.add_(1)

    def logits(self) -> Tensor:  # [N, V]
        passes[self.number] = self.lay(self.positions, self.tables)
        try:
            out = self.forward(
                input_ids=self.ids[None], position_ids=self.positions[None], use_cache=False, scls=self.number
            )
        finally:
            del passes[self.number]
        logits: Tensor = out.logits[0]
        return logits

    def capture(self, pool: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        # A capture that fails may leave its stream behind. The server's other threads may do what they like meanwhile.
        with torch.cuda.stream(torch.cuda.current_stream()):
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.run()
        self.graph = graph

    def again(self) -> None:
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()


class Graphs:
    """The steps of one model, each made and captured when it is first wanted."""

    def __init__(self, model: Any, number: int, lay: Lay, spare: int) -> None:
        self.model, self.lay, self.spare = model, lay, spare
        # What runs, and the number its passes are found by.
        self.forward, self.number = model, number
        self.compiled: tuple[Any, int] | None = None  # and did not run yet
        self.steps: dict[tuple[int, int, bool], Step] = {}
        self.captures = model.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None
        # How often the host waited for the device, and for how many steps.
        self.waits = self.passes = 0

    @torch.inference_mode()
    def burst(self, chunks: Sequence[Chunk], most: int, interrupt: object = None) -> list[list[int]]:
        """`Runner.burst`. A row that ends goes on to the end of it: what it draws there counts for nothing."""
        if self.compiled:
            (self.forward, self.number), self.compiled = self.compiled, None
            self.steps.clear()
            if self.captures:  # the old one went with its graphs
                self.pool = torch.cuda.graph_pool_handle()
        step = self._step(chunks)
        step.load(chunks)
        most = min(most, MOST)
        done, marks = 0, list[Any]()
        while done < most and not (done and interrupt):
            for _ in range(min(LOT, most - done)):
                step.again()
                done += 1
            if self.captures and done < most:
                marks.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
                marks[-1].record()
                if len(marks) > 1:
                    marks[-2].synchronize()
                    self.waits += 1
        self.waits += 1
        self.passes += done
        drawn: list[list[int]] = step.out[:done, : len(chunks)].tolist()
        return drawn

    def _step(self, chunks: Sequence[Chunk]) -> Step:
        width = max(LEAST_BLOCKS, power_of_two(max(len(chunk.row.blocks) for chunk in chunks)))
        warm = any(chunk.row.draw.temperature > 0 for chunk in chunks)
        key = bucket(len(chunks)), width, warm
        step = self.steps.get(key)
        if step is None:
            step = self._new(self.forward, self.number, self.spare, *key)
            if self.captures:
                self._capture(step, chunks)
            self.steps[key] = step
        return step

    def _new(self, forward: Any, number: int, spare: int, rows: int, width: int, warm: bool = False) -> Step:
        return Step(forward, self.model.device, number, self.lay, spare, rows, width, warm)

    def _capture(self, step: Step, chunks: Sequence[Chunk]) -> None:
        """Believed only if it draws what the step itself draws, which comes first: it loads and chooses what a capture must
        not.
        """
        step.load(chunks)
        step.run()
        drawn = step.out[0].tolist()
        try:
            step.capture(self.pool)
            step.load(chunks)
            step.again()
            if step.out[0].tolist()[: len(chunks)] != drawn[: len(chunks)]:
                raise RuntimeError("a graph draws other tokens")
        except Exception as error:
            log.warning("graphs: none from now on (%s)", first_line(error))
            step.graph, self.captures = None, False

    # ---------------------------------------------------------------- behind what runs

    def compile_behind(self, delay_s: float = 0.0) -> threading.Thread:
        """Has the forward compiled in a thread of its own; the first burst behind it makes its steps anew of that. What a few
        rows' step takes beside its weights is the number of its kernels, and those become fewer.
        """
        thread = threading.Timer(delay_s, self._compile)
        thread.name, thread.daemon = "scls-compile", True
        thread.start()
        return thread

    @torch.inference_mode()
    def _compile(self) -> None:
        began = time.monotonic()
        number, spare = new_runner(), self.spare + 1
        try:
            compiled = torch.compile(self.model, dynamic=True)
            # A compiler's graphs are two: of one row, and of several.
            for rows in (1, 4):
                steps = [self._new(forward, number, spare, rows, LEAST_BLOCKS) for forward in (self.model, compiled)]
                logits = []
                for step in steps:
                    # Rows behind one another in the trial's block, so that each sees what the ones before wrote.
                    step.positions.copy_(torch.arange(rows))
                    step.ids.copy_(3 + torch.arange(rows))
                    logits.append(step.logits().float())
                off = float((logits[1] - logits[0]).abs().max() / logits[0].std())
                if not off <= MOST_OFF[self.model.dtype]:
                    raise RuntimeError(f"its logits are off by {off:.2g} of their spread")
        except Exception as error:  # whatever a compiler says
            log.warning("graphs: not compiled (%s)", first_line(error))
            return
        self.compiled = compiled, number
        log.info("graphs: compiled in %.0f s", time.monotonic() - began)
