"""Batches of real lengths: first come, first served against the programme over lengths. Makes the table and the picture of
batching.md, which `python docs/batching.py --write` puts into their places.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scls_router import Batcher, CostModel, Offloader
from scls_router.scheduling import Batch

HERE = Path(__file__).parent
TRACE = HERE / "data" / "azure_conv_2023.csv"
WORKERS = 8

# 13 billion parameters on one A100 as assumed in our simulation study: 17 ms to read the weights, 0.152 ms a prompt token,
# 0.54 us a token of context and 5 us a row and step. 52,000 tokens of KV.
MODEL = CostModel.padded(prefill=(17e-3, 5e-6, 0.0, 152e-6), step=(17e-3, 5e-6, 0.0, 0.54e-6))
BATCHER = Batcher(MODEL, capacity_tokens=52_000, max_rows=256, slice_len=128)

CUTS: dict[str, Callable[[Sequence[int]], list[Batch]]] = {
    "as they came, at most 16": lambda lengths: BATCHER.in_order(lengths, 16),
    "by length, at most 16": lambda lengths: BATCHER.by_length(lengths, 16),
    "programme over lengths": BATCHER.split,
}


def lengths() -> list[int]:
    """Prompt tokens of the trace, in order of arrival."""
    with TRACE.open() as file:
        return [int(row["input_tokens"]) for row in csv.DictReader(line for line in file if line[0] != "#")]


def padding(batch: Batch, lengths: Sequence[int]) -> int:
    """Cells of the rectangle that hold no token of a prompt."""
    return len(batch.rows) * batch.longest - sum(lengths[row] for row in batch.rows)


def last_done(batches: list[Batch], *, in_turn: bool) -> float:
    """Seconds until the last worker is done."""
    seconds = [batch.seconds for batch in batches]
    if in_turn:
        return max(sum(seconds[worker::WORKERS]) for worker in range(WORKERS))
    offloader = Offloader(WORKERS)
    offloader.assign(seconds)
    return max(offloader.loads)


def table(lengths: Sequence[int]) -> str:
    """What each way of cutting takes."""
    rows = [
        f"| batches | how many | rows | seconds | pad tokens | {WORKERS} workers, in turn | longest to the least loaded |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cut in CUTS.items():
        batches = cut(lengths)
        sizes = [len(batch.rows) for batch in batches]
        pad = sum(padding(batch, lengths) for batch in batches)
        ends = [f"{last_done(batches, in_turn=in_turn):.1f} s" for in_turn in (True, False)]
        seconds = sum(batch.seconds for batch in batches)
        rows.append(
            f"| {name} | {len(batches)} | {min(sizes)} to {max(sizes)} | {seconds:.1f} | {pad:,} | {' | '.join(ends)} |"
        )
    return "\n".join(rows)


# The picture: plain SVG, so that it needs nothing.
WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 460, 56, 56, 70
TOKENS, PADDING, INK, GRID = "#2b6cb0", "#f0b67f", "#222222", "#cccccc"


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12, turn: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{INK}"{turn}>{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{GRID}"/>'


def bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{colour}" stroke="white" stroke-width="0.8"/>'


def panel(left: float, name: str, batches: list[Batch], lengths: Sequence[int], most: tuple[float, float]) -> list[str]:
    """One bar a batch, one below the other: as long as its longest row, as high as its time, with its rows beside it."""
    wide, high = WIDTH / most[0], HEIGHT / most[1]
    total = sum(batch.seconds for batch in batches)
    parts = [text(left + WIDTH / 2, TOP - 34, f"{name}: {len(batches)} batches, {total:.0f} s", size=14)]
    parts.append(text(left + WIDTH, TOP - 8, "tokens", "end"))
    for tokens in range(0, int(most[0]) + 1, 1000):
        x = left + tokens * wide
        parts += [line(x, TOP, x, TOP + HEIGHT), text(x, TOP - 8, f"{tokens}")]
    for seconds in range(0, int(most[1]) + 1, 50):
        y = TOP + seconds * high
        parts += [line(left, y, left + WIDTH, y), text(left - 8, y + 4, f"{seconds}", "end")]
    y = float(TOP)
    for batch in batches:
        rows, height = len(batch.rows), batch.seconds * high
        mean = sum(lengths[row] for row in batch.rows) / rows
        parts.append(bar(left, y, batch.longest * wide, height, PADDING))
        parts.append(bar(left, y, mean * wide, height, TOKENS))
        parts.append(text(left + batch.longest * wide + 4, y + height / 2 + 4, f"{rows}", "start", 11))
        y += height
    return parts


def picture(lengths: Sequence[int]) -> str:
    """Batches as they came beside those of the programme, as SVG."""
    shown = {name: CUTS[name](lengths) for name in ("as they came, at most 16", "programme over lengths")}
    most = max(lengths) * 1.08, max(sum(batch.seconds for batch in batches) for batches in shown.values())
    width, height = LEFT + len(shown) * (WIDTH + GAP), TOP + HEIGHT + 44
    turn = f' transform="rotate(-90 14 {TOP + HEIGHT / 2:.0f})"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(14, TOP + HEIGHT / 2, "seconds, one batch after another", turn=turn),
    ]
    for at, (name, batches) in enumerate(shown.items()):
        parts += panel(LEFT + at * (WIDTH + GAP), name, batches, lengths, most)
    y = TOP + HEIGHT + 20
    for x, colour, words in (
        (LEFT, TOKENS, "prompt tokens (mean of the batch)"),
        (LEFT + 260, PADDING, "padding, up to the longest"),
    ):
        parts += [bar(x, y, 24, 12, colour), text(x + 32, y + 10, words, "start")]
    parts.append(text(LEFT + 480, y + 10, "number beside a bar: its rows", "start"))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    trace = lengths()
    if "--write" in sys.argv:
        (HERE / "batching.svg").write_text(picture(trace))
        page = (HERE / "batching.md").read_text()
        begin, end = "<!-- made by batching.py -->\n", "\n<!-- end -->"
        before, after = page.split(begin)[0], page.split(end)[1]
        (HERE / "batching.md").write_text(before + begin + table(trace) + end + after)
    print(table(trace))
