"""Iteration level: vLLM's CPU back end, compiled, in this process, prefixes not shared. Runs in an environment of its own
(`install_vllm.sh`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from turns import THREADS, Play, Played, answer, check
from workload import refreshed

# Read when vllm is imported.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="2",  # GiB
    VLLM_CPU_OMP_THREADS_BIND=f"0-{THREADS - 1}",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def start(folder: str, dtype: str) -> tuple[Play, dict[str, Any]]:
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )
    llm.generate([{"prompt_token_ids": [5]}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    cold = time.perf_counter() - began
    vocab = llm.llm_engine.model_config.get_vocab_size()

    def play(count: int, turn: int) -> Played:
        """What `LLM.generate` does, and the time at which each request ended."""
        work = refreshed(count, turn, vocab)
        ended, drawn = [0.0] * count, [0] * count
        engine = llm.llm_engine
        began = time.perf_counter()
        for at, one in enumerate(work):
            greedy = SamplingParams(max_tokens=one.output, ignore_eos=True, temperature=0, detokenize=False)
            engine.add_request(str(at), {"prompt_token_ids": one.prompt}, greedy)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    # vLLM adds letters of its own to a name.
                    at = int(output.request_id.split("-")[0])
                    ended[at], drawn[at] = time.perf_counter() - began, len(output.outputs[0].token_ids)
        return Played(max(ended), check(work, drawn), ended)

    about = {"version": f"vllm {vllm.__version__}, torch {torch.__version__}", "first_token_s": cold}
    return play, about


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    answer(lambda: start(args.folder, args.dtype))
