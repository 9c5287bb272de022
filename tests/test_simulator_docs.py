"""What docs/simulator.md shows is run, in short: over 30 s of the trace, or of generated requests."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import polars
import pytest
import scls_router
from harness import ROOT, ROUTER

TEXT = (ROOT / "docs/simulator.md").read_text()
SMOKE = ROOT / "bench/traces/mooncake_conversation_smoke.jsonl.gz"
# Indented blocks; a command goes on after a backslash.
BLOCKS = re.findall(r"(?:^    .*\n)+", TEXT, flags=re.M)
COMMANDS = [
    " ".join(block.replace("\\\n", " ").split())
    for block in BLOCKS
    if block.lstrip().startswith("scls-router simulate")
]
PYTHON = [re.sub(r"^    ", "", block, flags=re.M) for block in BLOCKS if "scls_router.simulate(" in block]
FLAGS = re.search(r"^## Flags\n(.*?)^## ", TEXT, flags=re.S | re.M)


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run([ROUTER, *words], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def short(command: str, folder: Path) -> list[str]:
    """The same words, on the first seconds of a small trace and into a folder of the test."""
    words = shlex.split(command)[1:]
    for at, word in enumerate(words):
        if word.startswith("bench/traces/"):
            assert (ROOT / word).exists()
            words[at] = str(SMOKE)
        elif words[at - 1] == "--out":
            words[at] = str(folder / word)
    return [*words, "--window", "0:30"] if "--trace" in words else words


class Page(HTMLParser):
    """Which elements are open, and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures = 0
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}" for name, _ in attributes if name in ("src", "href", "xlink:href")]
        self.pictures += tag == "svg"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:50])
def test_commands(command: str, tmp_path: Path) -> None:
    run(short(command, tmp_path), tmp_path)
    folder = tmp_path / "report"
    report = json.loads((folder / "report.json").read_text())
    assert {run["policy"] for run in report["runs"]} == {"product", "jsq"}
    page = Page()
    page.feed((folder / "report.html").read_text())
    assert page.open == [] and page.fetched == []
    assert page.pictures == len(list(folder.glob("*.png"))) > 8


def test_what_is_said_between_the_lines(tmp_path: Path) -> None:
    """Flags of the steps, as one command each."""
    generated = re.search(r"`(--synthetic agents [^`]*)`", TEXT)
    grid = re.search(r"`(--workers 8,12,16 [^`]*)`", TEXT)
    assert generated and grid
    asked = generated[1].replace("600", "20")
    run(shlex.split(f"simulate {asked} {grid[1]} --slo 2:0.05"), tmp_path)
    said = run(["doctor", "--trace", str(SMOKE), "--workers", "4"], tmp_path)
    assert said.startswith(("safe", "minute"))
    recorded = sorted((ROOT / "tests/fixtures/runs").glob("*.json*"))
    assert recorded


def test_every_flag_is_there_and_every_figure() -> None:
    assert FLAGS
    help_text = run(["simulate", "--help"], ROOT)
    documented, there = (set(re.findall(r"--[a-z][a-z-]*", text)) for text in (FLAGS[1], help_text))
    assert documented <= there
    assert there - documented - {"--help", "--config"} == set()
    figures = TEXT[TEXT.index("## Figures") : TEXT.index("## From Python")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", figures, flags=re.M) for name in re.findall(r"`(\w+)`", row)}
    runs = scls_router.simulate(synthetic="sharegpt-like", rate=2, seconds=10).runs[0]
    assert named and all(name in runs or f"{name}_mean" in runs for name in named), named


@pytest.mark.parametrize("code", PYTHON)
def test_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trace.jsonl.gz").write_bytes(SMOKE.read_bytes())
    monkeypatch.chdir(tmp_path)
    code = code.replace("seeds=3", "seeds=2, window=(0, 20)")
    exec(compile(code, "simulator.md", "exec"), {"scls_router": scls_router, "polars": polars})
    assert (tmp_path / "report.html").exists()
