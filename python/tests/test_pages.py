"""The pages of docs/ say what happens: their Python is run, and what follows it is what it prints."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCKS = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", flags=re.S | re.M)
# those with Python in them; simulator.md's commands have a test of their own, hotspot.md has none
PAGES = [page for page in sorted(DOCS.glob("*.md")) if BLOCKS.search(page.read_text())]


def test_pages_are_found() -> None:
    assert [page.name for page in PAGES] == ["batching.md", "scheduler.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_runs_prints_what_it_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = BLOCKS.findall(page.read_text())
    assert blocks
    # a module of its own: dataclasses look theirs up
    names: dict[str, Any] = {"__name__": "builtins"}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page.name, "exec"), names)
        assert printed.getvalue() == expected


@pytest.fixture(scope="module")
def batching() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "batching.py"))


def test_the_table_of_batches_is_what_is_computed(batching: dict[str, Any]) -> None:
    assert batching["table"](batching["lengths"]()) in (DOCS / "batching.md").read_text()


def test_the_picture_of_batches_is_what_is_computed(batching: dict[str, Any]) -> None:
    drawn = batching["picture"](batching["lengths"]())
    assert drawn == (DOCS / "batching.svg").read_text()
    bars = [element for element in ET.fromstring(drawn).iter() if element.tag.endswith("rect")]
    rows = sum(len(cut(batching["lengths"]())) for cut in list(batching["CUTS"].values())[::2])
    assert len(bars) == 1 + 2 * rows + 2, "ground, two parts a batch, two of the legend"


def test_the_programme_takes_the_least_of_the_three(batching: dict[str, Any]) -> None:
    lengths = batching["lengths"]()
    split = {name: cut(lengths) for name, cut in batching["CUTS"].items()}
    seconds = [sum(batch.seconds for batch in batches) for batches in split.values()]
    assert sorted(seconds, reverse=True) == seconds
    for batches in split.values():
        assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
        assert all(batch.longest == max(lengths[row] for row in batch.rows) for batch in batches)
        assert all(batch.ceiling <= 52_000 for batch in batches)
