"""transformers' own greedy generation, with the gap between its two best logits at every token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# A first difference is accepted only where the reference itself can hardly tell its two best tokens apart.
TIE = 1e-4


@dataclass
class Answer:
    ids: list[int]
    gaps: list[float]


@lru_cache(maxsize=8)
def load(model: Path) -> Any:
    torch.set_num_threads(1)
    # Eager: the plainest there is, and the one that knows every family's soft cap.
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, use_safetensors=True, attn_implementation="eager"
    ).eval()


def greedy(model: Path, prompt: list[int], max_tokens: int) -> Answer:
    """``max_tokens`` greedy tokens after the prompt, or up to and with an eos."""
    with torch.inference_mode():
        out = load(model).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    ids = out.sequences[0, len(prompt) :].tolist()
    best = [step[0].float().topk(2).values for step in out.logits]
    return Answer(ids, [float(b[0] - b[1]) for b in best])


def differs(got: list[int], want: Answer) -> str | None:
    """None where equal. A near-tie at the first difference is returned as a text that starts with "tie"."""
    if got == want.ids:
        return None
    at = next((i for i, (a, b) in enumerate(zip(got, want.ids, strict=False)) if a != b), min(len(got), len(want.ids)))
    gap = want.gaps[at] if at < len(want.gaps) else float("inf")
    kind = "tie" if gap < TIE and len(got) > at else "difference"
    return f"{kind} at token {at} (gap {gap:.2e}): got {got[at : at + 4]}, want {want.ids[at : at + 4]}"
