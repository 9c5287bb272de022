"""Writes the README's tables from the reports in bench/results, so that no figure is typed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def demo(report: dict) -> str:
    machine = report["machine"]
    lines = [
        "| policy | hit ratio | of an infinite cache | mean TTFT | p95 TTFT |",
        "|---|---|---|---|---|",
        *(
            f"| `{row['policy']}` | {row['hit']:.3f} | {row['of_ideal']:.3f} | {row['ttft_ms']:.0f} ms"
            f" | {row['p95_ms']:.0f} ms |"
            for row in report["rows"]
        ),
        "",
        f"`{report['command']}`, {report['when']}, {machine['cores']} cores of {machine['cpu']}.",
    ]
    return "\n".join(lines)


TABLES = {"demo": demo}


def main() -> None:
    readme = ROOT / "README.md"
    old = readme.read_text()

    def table(found: re.Match[str]) -> str:
        report = json.loads((ROOT / f"bench/results/{found[1]}.json").read_text())
        return f"<!-- figures:{found[1]} -->\n{TABLES[found[1]](report)}\n<!-- end -->"

    new = re.sub(r"<!-- figures:(\w+) -->\n.*?<!-- end -->", table, old, flags=re.S)
    if "--check" in sys.argv:
        sys.exit("README.md does not show what bench/results hold\n  make readme-figures" if new != old else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
