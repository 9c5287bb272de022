"""The machine that a figure is of: what it is, from which commit it was measured, and how quiet it is."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# What a CPU's matrix products are made of.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def busy_share(seconds: float = 1.0) -> float:
    """What others take of this machine's cores now: the load average still has our last run in it."""

    def times() -> tuple[int, int]:
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0, 1
        parts = [int(part) for part in stat.read_text().split("\n", 1)[0].split()[1:]]
        return sum(parts) - parts[3] - parts[4], sum(parts)

    (busy, total) = times()
    time.sleep(seconds)
    (busy_then, total_then) = times()
    return round((busy_then - busy) / max(1, total_then - total), 3)


def git_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def cpu() -> str:
    return _cpuinfo("model name") or platform.processor()


def machine() -> dict[str, Any]:
    return {"cpu": cpu(), "cores": os.cpu_count(), "gpu": None}


def features() -> list[str]:
    flags = _cpuinfo("flags").split()
    return [name for name in FEATURES if name in flags]


def _cpuinfo(field: str) -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
