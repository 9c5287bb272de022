"""A tiny random Llama in a folder, made where a test wants one."""

from pathlib import Path
from typing import Any

import tiny_families
from tiny_families import VOCAB

__all__ = ["VOCAB", "write"]


def write(folder: Path, **changes: Any) -> Path:
    return tiny_families.write(folder, "llama", **changes)
