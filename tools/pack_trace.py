"""Writes a trace of JSON Lines as the small files of bench/traces/: a header line with its block size and origin, and runs of
block ids instead of lists (`block_runs`). Nothing that a reader of the schema uses is lost; `--unpack` gives the lists back.
"""

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

KEPT = ("source", "licence", "kind", "cut")


def runs_of(ids: Iterable[int]) -> list[list[int]]:
    """`[first, count]` of each stretch of ids that follow one another."""
    runs: list[list[int]] = []
    for block in ids:
        if runs and sum(runs[-1]) == block:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
    return runs


def ids_of(runs: Iterable[Iterable[int]]) -> list[int]:
    return [block for first, count in runs for block in range(first, first + count)]


def pack(lines: Iterable[str], name: str, meta: dict[str, Any]) -> Iterator[str]:
    header = {"trace": name, "block_size": meta["block_size"]}
    yield dumps(header | {key: meta[key] for key in KEPT if key in meta})
    for line in lines:
        request = json.loads(line)
        runs = runs_of(request.pop("block_hashes", None) or [])
        if runs:
            request["block_runs"] = runs
        yield dumps({key: value for key, value in request.items() if value is not None})


def unpack(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        request = json.loads(line)
        if "arrival_s" in request:
            yield dumps(request | {"block_hashes": ids_of(request.pop("block_runs", []))})


def dumps(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="NAME.jsonl.gz, with NAME.meta.json beside it")
    parser.add_argument("out", type=Path, help="NAME.jsonl.gz, by which name the trace goes then")
    parser.add_argument("--unpack", action="store_true", help="the other way")
    args = parser.parse_args()
    with gzip.open(args.trace, "rt") as lines:
        if args.unpack:
            made = list(unpack(lines))
        else:
            meta = json.loads(Path(str(args.trace).replace(".jsonl.gz", ".meta.json")).read_text())
            made = list(pack(lines, args.out.name.removesuffix(".jsonl.gz"), meta))
    text = "\n".join(made) + "\n"
    # no time stamp: the same input gives the same bytes
    args.out.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
