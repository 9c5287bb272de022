"""`make gpu` where there is no GPU: the shapes it makes, what it judges, and what it says."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT / "bench"))
sys.path.insert(0, str(ROOT / "bench/engine"))

import gpu
from make_model import COMMON, SHAPES
from roofline import Shape


@pytest.mark.parametrize(("shape", "weights"), [("qwen3-0.6b", 595_984_384), ("llama-8b", 7_504_658_432)])
def test_the_shapes_have_the_weights_of_their_names(shape: str, weights: int) -> None:
    counted = Shape.of_config({**COMMON, **SHAPES[shape][1]}, "bfloat16")
    assert counted.weight_bytes == 2 * weights


def step(shape: str, rows: int, share: float, waits: float) -> dict[str, Any]:
    return {"shape": shape, "rows": rows, "context": 1024, "share": share, "waits": waits}


def test_the_large_shape_is_judged_by_the_bandwidth_and_all_by_their_waits() -> None:
    steps = [step("llama-8b", 1, 0.64, 0.2), step("llama-8b", 64, 0.64, 0.01), step("qwen3-0.6b", 1, 0.1, 0.3)]
    assert [one["holds"] for one in gpu.judged(steps)] == [False, True, True, True, False]


def test_without_cuda_it_says_why_it_cannot() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run([sys.executable, str(ROOT / "bench/gpu.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("no CUDA device: torch")
