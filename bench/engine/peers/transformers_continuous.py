"""Iteration level: transformers' continuous batching, paged, with the settings that were fastest here: SDPA over pages of 32
tokens, up to 512 tokens a pass, prefixes not shared, not compiled.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from turns import THREADS, Play, Played, answer, check
from workload import refreshed


def start(folder: str, dtype: str) -> tuple[Play, dict[str, Any]]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=2048, max_batch_tokens=512, allow_block_sharing=False, default_compile_level=0
    )

    def play(count: int, turn: int) -> Played:
        work = refreshed(count, turn, model.config.vocab_size)
        ended, drawn = [0.0] * count, [0] * count
        manager = model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=config, block=True, timeout=5
        )
        with manager as serving:
            began = time.perf_counter()
            for at, one in enumerate(work):
                serving.add_request(one.prompt, request_id=str(at), max_new_tokens=one.output)
            left = count
            while left:
                result = serving.get_result(timeout=1)
                if result is not None and result.is_finished():
                    at = int(result.request_id)
                    ended[at], drawn[at] = time.perf_counter() - began, len(result.generated_tokens)
                    left -= 1
        return Played(max(ended), check(work, drawn), ended)

    return play, {"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    answer(lambda: start(args.folder, args.dtype))
