"""A model folder before anything is loaded from it: is it complete, of a family we serve, and free of code?

Reads only JSON and names of files. Does not know torch.
"""

import json
from pathlib import Path
from typing import Any

from .errors import StartupError

# Families checked against transformers token by token (tests/test_families.py). Others may load and be wrong.
FAMILIES = (
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
# What others need that is not here. A family in neither table was never tried.
UNSERVED = {
    "attention sinks": ("gpt_oss", "mimo_v2_flash"),
    "attention in fixed chunks": ("llama4_text",),
    "KV as one latent vector": (
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm_moe_dsa",
        "longcat_flash",
        "minicpm3",
    ),
    "KV shared between layers": ("gemma3n_text", "gemma4_text"),
    "a recurrent state beside KV or in its place": (
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
    ),
    "images or sound beside text": (
        "gemma3",
        "gemma3n",
        "gemma4",
        "idefics3",
        "internvl",
        "llama4",
        "llava",
        "mistral3",
        "mllama",
        "phi4_multimodal",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
    ),
    "learned or relative positions": ("bloom", "gpt2", "gpt_bigcode", "gpt_neo", "mpt", "opt"),
    "an encoder": ("bart", "bert", "modernbert", "roberta", "t5"),
}


def check_folder(folder: Path) -> dict[str, Any]:
    """The folder's config.json; raises StartupError where the folder cannot be served."""
    if not folder.is_dir():
        raise StartupError(f"no such model folder: {folder}")
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise StartupError(f"config.json wants remote code (auto_map), which is never run: {folder}")
    check_family(config)
    check_fields(config, folder)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise StartupError(
                f"only pickle weights, which are never read: {folder / pickles[0]}\n  convert them to safetensors"
            )
        raise StartupError(f"no weights (*.safetensors) in {folder}")
    check_tokenizer(folder)
    return config


def check_family(config: dict[str, Any]) -> None:
    family = config.get("model_type")
    if family in FAMILIES:
        return
    need = next((need for need, families in UNSERVED.items() if family in families), None)
    reason = f"needs {need}" if need else "never checked against transformers"
    raise StartupError(f"unsupported model_type: {family} ({reason})\n  served are: {', '.join(FAMILIES)}")


def check_fields(config: dict[str, Any], folder: Path) -> None:
    """Refuses what a family we serve can be made into by its config."""
    for field in ("quantization_config", "compression_config"):
        if field in config:
            method = config[field].get("quant_method") if isinstance(config[field], dict) else None
            raise StartupError(f"quantized weights are not supported: {method or field} in {folder}")
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise StartupError(f"tokens that see later ones (an embedding model) are not supported: {folder}")
    window = config.get("sliding_window")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise StartupError(f"sliding_window is no number of tokens: {window}")


def check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise StartupError(f"no tokenizer.json in {folder}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StartupError(f"no {path.name} in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise StartupError(f"not a JSON object: {path}")
    return value


def eos_token_ids(folder: Path, config: dict[str, Any]) -> list[int]:
    """What ends a row: of generation_config.json, else of config.json."""
    generation = folder / "generation_config.json"
    sources = ([read_json(generation)] if generation.is_file() else []) + [config]
    for source in sources:
        eos = source.get("eos_token_id")
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(id_, int) and id_ >= 0 for id_ in ids):
            raise StartupError(f"eos_token_id is no token id: {eos}")
        return ids
    return []
