"""Sequence level: transformers' `generate` on batches in order of arrival, padded on the left, each until its longest output
is there. An answer is there with its batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from turns import THREADS, Play, Played, answer, check
from workload import Request, refreshed


def start(folder: str, dtype: str) -> tuple[Play, dict[str, Any]]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(batch: list[Request]) -> list[int]:
        width, steps = max(len(one.prompt) for one in batch), max(one.output for one in batch)
        ids = torch.tensor([[0] * (width - len(one.prompt)) + one.prompt for one in batch])  # [B, L]
        pads = torch.tensor([[width - len(one.prompt)] for one in batch])
        mask = (torch.arange(width)[None] >= pads).long()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0)
        assert out.shape[1] == width + steps
        return [one.output for one in batch]  # what is beyond was drawn for nobody

    def play(count: int, turn: int, batch: int) -> Played:
        work = refreshed(count, turn, model.config.vocab_size)
        ended: list[float] = []
        drawn: list[int] = []
        began = time.perf_counter()
        for first in range(0, count, batch):
            drawn += generate(work[first : first + batch])
            ended += [time.perf_counter() - began] * (len(drawn) - len(ended))
        return Played(ended[-1], check(work, drawn), ended)

    return play, {"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    answer(lambda: start(args.folder, args.dtype))
