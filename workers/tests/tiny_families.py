"""Tiny random models of every family we serve, in folders, made where a test wants one.

Each has what sets its family apart: windows over which its rows go, soft caps that bend, heads of a width of their own,
several rotary bases, experts.
"""

from pathlib import Path
from typing import Any

VOCAB = 200
TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # wide, so that a greedy output does not settle on one token
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "mistral": {"sliding_window": 6},
    "gemma2": {
        "head_dim": 32,
        "num_hidden_layers": 3,
        "sliding_window": 10,
        "query_pre_attn_scalar": 20,
        "tie_word_embeddings": False,  # tied, embeddings scaled up by 8 would repeat the last token for ever
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "num_hidden_layers": 3,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 20,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3": {"sliding_window": 7, "partial_rotary_factor": 0.5},
    "olmo2": {"num_key_value_heads": 1},
    "mixtral": {"num_local_experts": 4, "sliding_window": 6},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 7,
    },
}


def write(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases begin as ones and zeros, which would hide one left out
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder
