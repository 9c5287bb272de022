"""Decode steps that stay on the device: what a step draws feeds the next one there, and the host looks at tokens once for many
steps.

A step is a plain function over buffers of its own, for some number of rows and of blocks a row: the model's forward, the
draw, and the state moved on. On CUDA it is captured as a graph and replayed; where that cannot be it is called, and draws
the same. Knows rows and blocks; knows no layout and no queue.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import Attention, passes
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


Lay = Callable[[Tensor, Tensor], Attention]  # positions [N], tables [N, W]


def bucket(rows: int) -> int:
    """Rows that a step is made for: 1, 2, 4, then multiples of eight."""
    return power_of_two(rows) if rows <= 8 else -(-rows // 8) * 8


class Step:
    """One decode step of up to `rows` rows with up to `width` blocks each. A row that is not there writes to a block that
    nobody reads, at position 0 for ever.
    """

    def __init__(self, model: Any, number: int, lay: Lay, rows: int, width: int, warm: bool, spare: int) -> None:
        device = model.device
        self.model, self.number, self.lay, self.warm, self.spare = model, number, lay, warm, spare
        pinned = device.type == "cuda"
        # Of each row: last token, its position, 1 where there is a row, key of its seed, place in its output.
        self.given = torch.zeros(5, rows, dtype=torch.int64, pin_memory=pinned)
        self.given_tables = torch.zeros(rows, width, dtype=torch.int32, pin_memory=pinned)
        self.given_heat = torch.zeros(rows, 1, pin_memory=pinned)
        self.state, self.tables, self.heat = (
            there.to(device) for there in (self.given, self.given_tables, self.given_heat)
        )
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
        passes[self.number] = self.lay(self.positions, self.tables)
        try:
            out = self.model(
                input_ids=self.ids[None], position_ids=self.positions[None], use_cache=False, scls=self.number
            )
        finally:
            del passes[self.number]
        logits: Tensor = out.logits[0]  # [N, V]
        drawn = draw_plainly(logits, self.seeds, self.places, self.heat) if self.warm else logits.float().argmax(-1)
        self.out.index_copy_(0, self.done, drawn[None])
        self.ids.copy_(drawn)
        self.positions.add_(self.live)
        self.places.add_(self.live)
        self.done.add_(1)

    def capture(self, pool: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        # The server's other threads may do what they like meanwhile.
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
        self.model, self.number, self.lay, self.spare = model, number, lay, spare
        self.steps: dict[tuple[int, int, bool], Step] = {}
        self.captures = model.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None
        # How often the host waited for the device, and for how many steps.
        self.waits = self.passes = 0

    @torch.inference_mode()
    def burst(self, chunks: Sequence[Chunk], most: int, interrupt: object = None) -> list[list[int]]:
        """`Runner.burst`. A row that ends goes on to the end of it: what it draws there counts for nothing."""
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
        if key not in self.steps:
            self.steps[key] = Step(self.model, self.number, self.lay, *key, self.spare)
            if self.captures:
                self._capture(self.steps[key], chunks)
        return self.steps[key]

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
