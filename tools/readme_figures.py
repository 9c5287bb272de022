"""Writes the README's tables from the reports in bench/results, so that no figure is typed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def circumstances(report: dict) -> str:
    machine = report["machine"]
    return f"`{report['command']}`, {report['when']}, {machine['cores']} cores of {machine['cpu']}."


def demo(report: dict) -> str:
    lines = [
        "| policy | hit ratio | of an infinite cache | mean TTFT | p95 TTFT |",
        "|---|---|---|---|---|",
        *(
            f"| `{row['policy']}` | {row['hit']:.3f} | {row['of_ideal']:.3f} | {row['ttft_ms']:.0f} ms"
            f" | {row['p95_ms']:.0f} ms |"
            for row in report["rows"]
        ),
        "",
        circumstances(report),
    ]
    return "\n".join(lines)


def core(report: dict) -> str:
    us = {row["part"]: row["us"] for row in report["rows"]}
    lines = [
        f"The second turn of a conversation of {report['tokens']} tokens, {report['workers']} workers, medians of {report['rounds']} rounds:",
        "",
        "| part | time |",
        "|---|---|",
        f"| **text to decision** | **{us['text to decision']:.0f} us** |",
        f"| of it: text to ids, answers and earlier turns remembered | {us['text to ids']:.0f} us |",
        f"| of it: tokens to decision (block hashes, look-up for all workers, scores) | {us['tokens to decision']:.0f} us |",
        f"| the tokenizer's own time for the new text | {us['the tokenizer alone, for the new text']:.0f} us |",
        f"| before it: parse the body, render the template | {us['parse the body']:.0f} and {us['render the template']:.0f} us |",
        "",
        circumstances(report),
    ]
    return "\n".join(lines)


def python_route(report: dict) -> str:
    us = {row["call"]: row["wall_us"] for row in report["rows"]}
    return (
        f"From Python, 2,048 ids in numpy to a decision among {report['workload']['workers']} workers take"
        f" {us['ours, numpy int64']:.0f} us; hash and look-up of ai-dynamo-runtime {report['rivals']['ai-dynamo-runtime']}"
        f" take {us['theirs, numpy int64 as a list']:.0f} us with the conversion to the list it wants,"
        f" {us['theirs, a list that is there']:.0f} us without; both find the same blocks. `{report['command']}`,"
        f" {report['when']}, one pinned core of {report['machine']['cpu']}."
    )


def ablation(report: dict) -> str:
    rows = [row for row in report["rows"] if row["lengths"] == "synthetic-sharegpt-like"]
    lines = [
        "| scheduler | what is new | requests/s | rows a slice | computed again | pad, invalid | spread of completion |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| `{row['mode']}` | {STEPS[row['mode']]} | {row['requests_per_s']:.1f} | {row['rows_a_slice']:.0f}"
            f" | {row['computed_again']:.0%} | {row['pad']:.0%}, {row['invalid']:.0%} | {row['completion_std_s']:.1f} s |"
            for row in rows
        ),
        "",
        f"`{report['command']}`, {report['when']}.",
    ]
    return "\n".join(lines)


STEPS = {
    "sls": "sequence level, 16 rows",
    "so": "slices of 128",
    "pm": "rows of like length together",
    "ab": "batches by dynamic programme",
    "lb": "max-min offloading",
    "scls": "adaptive rounds: the paper",
    "ils": "iteration level, KV kept, paged",
    "slice": "**this router**",
}


def modes(report: dict) -> str:
    lines = [
        "| scheduler, workers | tokens/s, median | slices | pad tokens | invalid tokens |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        run = row["runs"][0]
        lines.append(
            f"| {row['mode']} | {row['median_tokens_per_s']:.0f} | {run['slices']} | {run['pad']:.0f} | {run['invalid']:.0f} |"
        )
    cover = ", ".join(f"{c['share']:.1%} of {c['slices']} ({layout})" for layout, c in report["coverage"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{report['requests']} requests at once, outputs of {report['output_tokens']['mean']:.0f} tokens in the mean and"
            f" {report['output_tokens']['most']} at most. Batches whose time fell into their band: {cover}."
            f" `{report['command']}`, {report['when']}, {report['machine']['cores']} cores of {report['machine']['cpu']}.",
        ]
    )


ROUTING = {
    "product_anticipating": "**`product_anticipating`**, guarded",
    "product": "`product`",
    "smetric": "SMetric",
    "min_ttft": "least simulated TTFT (llm-d, Mooncake)",
    "preble": "Preble E2",
    "linear@0.7": "0.7 x misses + 0.3 x load",
    "sglang": "SGLang, cache-aware",
    "llm_d": "llm-d, prefix 3 : queue 2",
    "dynamo@1": "Dynamo",
    "sticky": "sticky sessions",
    "jsq": "shortest queue (vLLM)",
    "round_robin": "round robin",
}


def seconds(time: float) -> str:
    return f"{time:.0f} s" if time >= 10 else f"{time:.1f} s" if time >= 1 else f"{time * 1e3:.0f} ms"


def e2(report: dict) -> str:
    points = [(trace, load) for trace in report["max_rate"] for load in (0.5, 0.75)]
    lines = [
        "| policy | " + " | ".join(f"{trace} {load:.0%}" for trace, load in points) + " |",
        "|---|" + "---|" * len(points),
    ]
    for policy, name in ROUTING.items():
        guard = policy == "product_anticipating"
        cells = []
        for trace, load in points:
            ttft = [
                row["ttft_mean"]
                for row in report["rows"]
                if (row["trace"], row["load"], row["policy"], row["guard"]) == (trace, load, policy, guard)
                and row["commit"] == "prefixes"
            ]
            cells.append(seconds(ttft[0]) if ttft and ttft[0] is not None else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Mean time to first token, {circumstances(report)}"])


def e1(report: dict) -> str:
    best: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        kind = row["scheduler"].partition("@")[0]
        kind = "capped" if kind == "continuous" and "@" in row["scheduler"] else kind
        here = best.setdefault(row["workload"], {})
        here[kind] = max(here.get(kind, 0.0), row["throughput"])
    columns = ("sls", "scls", "capped", "continuous", "slice")
    return "\n".join(
        [
            "| workload | sequence level | SCLS | iteration level, rows capped | iteration level (as vLLM v1) | **slice** |",
            "|---|---|---|---|---|---|",
            *(
                f"| {workload} | " + " | ".join(f"{here[column]:.3g}" for column in columns) + " |"
                for workload, here in best.items()
            ),
            "",
            f"Requests a second, {circumstances(report)}",
        ]
    )


def engine(report: dict) -> str:
    lines = [
        "| engine | tokens/s, median | of the roofline | mean latency | ours is |",
        "|---|---|---|---|---|",
        *(
            f"| {row['engine']} | {row['tokens_per_s']:.0f} | {row['share_of_roofline']:.0%} | {row['latency_mean_s']:.1f} s"
            f" | {row['ours_over_it']:.2f}x |"
            for row in report["rows"]
        ),
    ]
    steps = ", ".join(f"{row['ms']:.1f} ms at {row['rows']} ({row['share']:.0%})" for row in report["steps"])
    levels = {(row["load"], row["mode"]): row for row in report["levels"]}
    ours, ils = (levels["70 %, served", mode] for mode in ("slice", "ils"))
    host, ils_host = (levels["70 %, one process", mode]["host_us_per_token"] for mode in ("slice", "ils"))
    return "\n".join(
        [
            *lines,
            "",
            f"A decode step of so many rows that see 256 tokens, and its share of what the machine could do in the same round: {steps}.",
            f"Slices beside single iterations on the same worker behind a router, arrivals at 70 % of its capacity: latency {ours['latency_mean_s']:.2f} s beside"
            f" {ils['latency_mean_s']:.2f} s, first token after {1e3 * ours['ttft_mean_s']:.0f} ms beside {1e3 * ils['ttft_mean_s']:.0f} ms,"
            f" {host:.0f} us of host time a token beside {ils_host:.0f} us in one process.",
            "",
            circumstances(report),
        ]
    )


TABLES = {
    "engine": engine,
    "ablation": ablation,
    "modes": modes,
    "demo": demo,
    "core": core,
    "python-route": python_route,
    "e1": e1,
    "e2": e2,
}


def main() -> None:
    readme = ROOT / "README.md"
    old = readme.read_text()

    def table(found: re.Match[str]) -> str:
        report = json.loads((ROOT / f"bench/results/{found[1]}.json").read_text())
        return f"<!-- figures:{found[1]} -->\n{TABLES[found[1]](report)}\n<!-- end -->"

    new = re.sub(r"<!-- figures:([\w-]+) -->\n.*?<!-- end -->", table, old, flags=re.S)
    if "--check" in sys.argv:
        sys.exit("README.md does not show what bench/results hold\n  make readme-figures" if new != old else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
