"""`make bench-modes`: slice level against sequence level on two real padded CPU workers, and what was foreseen of each
batch beside what happened on real workers of both layouts.

One burst of requests a run, so every run does the same work: seeded draws are the same whatever runs where, and the runs
check that. Outputs end by themselves (their eos is made likelier by a bias), so nobody knows their length beforehand.
Modes take turns; what counts is their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from harness import MODEL, Router, Worker  # noqa: E402
from machine import git_commit, machine  # noqa: E402
from scls_router import Client  # noqa: E402

LIMIT = 512
EOS_BIAS = 0.0


def lengths(count: int, seed: int) -> list[int]:
    """Prompt lengths like ShareGPT's, a quarter as long: exp(4.6 + 1.3 z) / 4, from 4 to 256."""
    draw = random.Random(seed)
    return [int(min(256, max(4, draw.lognormvariate(4.6, 1.3) / 4))) for _ in range(count)]


def eos() -> int:
    ids = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    return ids if isinstance(ids, int) else ids[0]


def burst(router: Router, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Seconds until the last answer, and the ids of each."""
    bias = {eos(): EOS_BIAS}
    with Client(router.addresses["grpc"], timeout=600) as client, ThreadPoolExecutor(len(prompts)) as threads:

        def ask(at: int) -> list[int]:
            answer = client.generate(
                prompts[at], model="tiny", max_tokens=LIMIT, temperature=1.0, seed=at, logit_bias=bias
            )
            return list(answer.choices[0].ids)

        began = time.monotonic()
        ids = list(threads.map(ask, range(len(prompts))))
        return time.monotonic() - began, ids


def worker(layout: str) -> Worker:
    return Worker("--model", str(MODEL), "--dtype", "float32", "--served-name", "tiny", "--layout", layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 500) for _ in range(n)] for n in lengths(args.requests, 0)]

    modes = {
        "sls, padded": ("padded", ["--scheduler", "sls"]),
        "scls, padded": ("padded", ["--scheduler", "scls"]),
        "slice, paged": ("paged", []),
        "ils, paged": ("paged", ["--scheduler", "ils"]),
    }
    rows: dict[str, list[dict]] = {mode: [] for mode in modes}
    first: list[list[int]] = []
    scored: dict[str, list[dict]] = {"padded": [], "paged": []}
    for at in range(args.rounds):
        for mode, (layout, flags) in modes.items():
            workers = [worker(layout) for _ in range(2)]
            try:
                with Router([w.url for w in workers], *flags) as router:
                    before = os.getloadavg()[0]
                    seconds, ids = burst(router, prompts)
                    router.wait_drained()
                    batches = router.admin("/batches")["batches"]
                    metrics = router.metrics()
            finally:
                for one in workers:
                    one.stop()
            first = first or ids
            if ids != first:
                sys.exit(f"{mode}: other tokens than the first run's")
            ended = [batch for batch in batches if batch["outcome"]]
            scored[layout] += ended
            tokens = sum(map(len, ids))
            total = {
                name: sum(v for k, v in metrics.items() if k.startswith(f"scls_router_{name}"))
                for name in ("pad_tokens_total", "invalid_tokens_total")
            }
            rows[mode].append(
                {
                    "seconds": seconds,
                    "tokens_per_s": tokens / seconds,
                    "slices": len(ended),
                    "pad": total["pad_tokens_total"],
                    "invalid": total["invalid_tokens_total"],
                    "load_before": before,
                }
            )
            print(f"round {at + 1}  {mode:22} {seconds:6.1f} s  {tokens / seconds:6.0f} tokens/s", flush=True)

    median = {mode: statistics.median(run["tokens_per_s"] for run in runs) for mode, runs in rows.items()}
    ratio = median["scls, padded"] / median["sls, padded"]
    coverage = {layout: covered(batches) for layout, batches in scored.items()}
    outputs = sorted(map(len, first))
    report = {
        "name": "modes",
        "command": "make bench-modes ARGS='--json FILE'",
        "commit": git_commit(),
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seed": 0,
        "requests": args.requests,
        "output_tokens": {"mean": statistics.mean(outputs), "p50": outputs[len(outputs) // 2], "most": outputs[-1]},
        "rows": [{"mode": mode, "median_tokens_per_s": median[mode], "runs": runs} for mode, runs in rows.items()],
        "coverage": coverage,
        "goals": [
            {
                "goal": "scls over sls, two real padded workers",
                "value": ratio,
                "op": ">",
                "bound": 1,
                "holds": ratio > 1,
            },
            *(
                {
                    "goal": f"batches whose time fell into their band, {layout} CPU worker",
                    "value": share["share"],
                    "op": ">=",
                    "bound": 0.97,
                    "holds": share["share"] >= 0.97,
                }
                for layout, share in coverage.items()
            ),
        ],
    }
    print(f"outputs: mean {report['output_tokens']['mean']:.0f} tokens, the longest {outputs[-1]}")
    for goal in report["goals"]:
        print(f"{goal['goal']}: {goal['value']:.3f} ({goal['op']} {goal['bound']}: {goal['holds']})")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def covered(batches: list[dict]) -> dict:
    inside = sum(bool(batch["outcome"]["covered"]) for batch in batches)
    return {"slices": len(batches), "share": inside / max(1, len(batches))}


if __name__ == "__main__":
    main()
