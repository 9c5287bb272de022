"""Random models with the shapes that engines are measured with, made here: nothing is downloaded.

A folder is complete: config, weights in the type they are served in, and a tokenizer of one word, so that any server takes
it. Made once; the seed and the shape are in the folder's name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "target/bench-models"
SEED = 0

TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
COMMON: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DENSE_107M: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-107m": ("llama", DENSE_107M),
    "qwen3-107m": ("qwen3", DENSE_107M),
    # Of `make gpu`, which makes them on the GPU.
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "llama-8b": (
        "llama",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
    ),
    # For checks of the scripts themselves: it says nothing of speed.
    "llama-tiny": (
        "llama",
        {
            "vocab_size": 2000,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    ),
}


def make(shape: str, dtype: str) -> Path:
    """The folder, made if it is not there."""
    folder = MODELS / f"{shape}-{dtype}"
    if (folder / "tokenizer.json").is_file():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    family, sizes = SHAPES[shape]
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **{**COMMON, **sizes})).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    # Last: a folder that was left half made has none.
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; default: llama-107m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    if unknown := [shape for shape in args.shapes if shape not in SHAPES]:
        sys.exit(f"no such shape: {unknown[0]}\nshapes: {', '.join(SHAPES)}")
    for shape in args.shapes or ["llama-107m"]:
        print(make(shape, args.dtype))


if __name__ == "__main__":
    main()
