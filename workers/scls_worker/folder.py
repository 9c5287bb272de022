"""A model folder before anything is loaded from it: is it complete, of a family we serve, and free of code?

Reads only JSON and names of files. Does not know torch.
"""

import json
from pathlib import Path
from typing import Any

from .errors import StartupError

# Families whose attention is what attention.py computes. Others may load and be wrong, so they are refused by name.
FAMILIES = ("llama",)
# Rotary embeddings that look at the longest position of the pass: rows packed together would change each other.
UNPACKABLE_ROPE = ("dynamic", "longrope")


def check_folder(folder: Path) -> dict[str, Any]:
    """The folder's config.json; raises StartupError where the folder cannot be served."""
    if not folder.is_dir():
        raise StartupError(f"no such model folder: {folder}")
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise StartupError(f"config.json wants remote code (auto_map), which is never run: {folder}")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise StartupError(f"unsupported model_type: {family}\n  served are: {', '.join(FAMILIES)}")
    if "quantization_config" in config:
        raise StartupError(f"quantized weights are not supported: {folder}")
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field)
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
        if kind in UNPACKABLE_ROPE:
            raise StartupError(f"unsupported rope_type: {kind}")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise StartupError(
                f"only pickle weights, which are never read: {folder / pickles[0]}\n  convert them to safetensors"
            )
        raise StartupError(f"no weights (*.safetensors) in {folder}")
    check_tokenizer(folder)
    return config


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
