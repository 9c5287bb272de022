"""Traces packed by tools/pack_trace.py lose nothing."""

import gzip
import importlib.util
import json
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("pack_trace", ROOT / "tools/pack_trace.py")
assert SPEC and SPEC.loader
pack_trace = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pack_trace)

IDS = st.lists(st.integers(0, 12), max_size=30)


@given(IDS)
def test_runs_are_the_ids(ids: list[int]) -> None:
    runs = pack_trace.runs_of(ids)
    assert pack_trace.ids_of(runs) == ids
    assert all(first + count != after for (first, count), (after, _) in pairwise(runs))


@given(st.lists(IDS, max_size=5))
def test_packed_lines_come_back(chains: list[list[int]]) -> None:
    requests = [{"arrival_s": at, "input_tokens": 9, "block_hashes": ids} for at, ids in enumerate(chains)]
    meta = {"name": "x", "block_size": 16, "licence": "MIT", "stats": {}}
    header, *lines = pack_trace.pack(map(json.dumps, [r | {"session": None} for r in requests]), "mine", meta)
    assert json.loads(header) == {"trace": "mine", "block_size": 16, "licence": "MIT"}
    assert list(map(json.loads, pack_trace.unpack([header, *lines]))) == requests


def test_the_committed_traces_name_themselves_and_their_licence() -> None:
    files = sorted((ROOT / "bench/traces").glob("*.jsonl.gz"))
    assert len(files) == 9
    for path in files:
        with gzip.open(path, "rt") as lines:
            header = json.loads(next(lines))
        assert header["trace"] == path.name.removesuffix(".jsonl.gz")
        assert header["licence"] in ("Apache-2.0", "MIT", "CC-BY-4.0")
