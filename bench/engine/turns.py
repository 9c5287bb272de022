"""An engine in a process of its own that plays the workload whenever it is told to.

Engines take turns: all stay up, so that no turn pays for a start, and all see the same minutes of the machine. One side,
`answer`, is what an engine's script runs; the other, `Engine`, tells it. A line of JSON on its stdin is the arguments of a
turn, a line of JSON on its stdout what came of it. What else an engine prints goes to its log.

Of the standard library alone: rivals have environments of their own.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workload import Request

# A turn that takes longer is a hang.
TURN_S = 900.0
START_S = 600.0
LEAVE_S = 30.0
# Compute threads of this process, as `Engine` sets them.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
# How a slice ends that was not cut short.
WHOLE = ("steps", "all_done")
ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "target/bench-logs"


@dataclass
class Played:
    """A turn: when each request ended and, where the engine says, when its first token came. Seconds from its arrival."""

    seconds: float  # of the turn, from the first arrival to the last token
    tokens: int
    ended: list[float]
    first: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Useful output tokens a second."""
        return self.tokens / self.seconds

    @property
    def latency(self) -> float:
        return statistics.fmean(self.ended)

    @property
    def ttft(self) -> float:
        return statistics.fmean(self.first)


Play = Callable[..., Played]


def check(work: Sequence[Request], drawn: Sequence[int]) -> int:
    """The tokens of a turn. An engine that drew another number than was asked for did other work."""
    wanted = [one.output for one in work]
    if list(drawn) != wanted:
        raise RuntimeError(f"drew {sum(drawn)} tokens, not {sum(wanted)}")
    return sum(drawn)


def answer(start: Callable[[], tuple[Play, dict[str, Any]]]) -> None:
    """The engine's side. `start` gives what plays a turn, and what is to be known of the engine."""
    # The engine's own prints, and those of its libraries, are not to come between.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    play, about = start()
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(play(**json.loads(line)))), file=out, flush=True)


def environment(threads: int) -> dict[str, str]:
    """Of a process that computes with so many threads, on this checkout's worker."""
    path = os.pathsep.join([str(ROOT / "workers"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}


class Failed(Exception):
    """An engine that did not start, or a turn that did not end. Holds the end of its log."""


class Engine:
    """The teller's side: a process, its log in a file."""

    def __init__(self, name: str, command: Sequence[str | Path], threads: int = 2, **env: str) -> None:
        self.name, self.log = name, LOGS / f"{name.replace(' ', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as stderr:
            self.child = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**environment(threads), **env},
            )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.about: dict[str, Any] = {}

    def wait(self, seconds: float = START_S) -> None:
        """Until it is up."""
        self.about = self._line(seconds)

    def turn(self, **how: Any) -> Played:
        assert self.child.stdin
        try:
            self.child.stdin.write(json.dumps(how) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._why("ended")) from None
        return Played(**self._line(TURN_S))

    def _line(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.stop()
                raise Failed(self._why(f"said nothing in {seconds:.0f} s")) from None
            if line is None:
                raise Failed(self._why("ended"))
            if line.startswith("{"):
                made: dict[str, Any] = json.loads(line)
                return made

    def _read(self) -> None:
        assert self.child.stdout
        for line in self.child.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _why(self, what: str) -> str:
        return f"{self.name} {what}:\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def stop(self) -> None:
        """Its stdin ends, which is its sign to leave; if it does not, it is ended."""
        if self.child.stdin and not self.child.stdin.closed:
            self.child.stdin.close()
        try:
            self.child.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait(10)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
