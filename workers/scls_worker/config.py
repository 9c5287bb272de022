"""A model's config as transformers reads it: the shape of its KV, and how long its rows may get.

Knows no weights and no device.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .errors import StartupError


def read_config(folder: Path) -> Any:
    """The text model's config, old spellings of its fields made new; raises StartupError if transformers cannot."""
    auto: Any = AutoConfig
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_text_config()
    except Exception as error:
        raise StartupError(f"cannot read {folder / 'config.json'}: {first_line(error)}") from None


def kv_shape(config: Any) -> tuple[int, int]:
    """KV heads and their width, the same in all layers of the families we serve."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_key_value_heads), int(width)


def longest_context(config: Any, wanted: int | None) -> int:
    """Tokens a row may have, prompt and output together; raises StartupError where `wanted`, or without it the model's
    own length, is more than packed rows can have.

    Some rotary embeddings change their frequencies once a pass holds a long position: rows packed together would
    change each other, and KV written before would be of other frequencies. Below that length they are constant.
    """
    limit = int(config.max_position_embeddings)
    context = min(wanted or limit, limit)
    rope = config.rope_parameters or {}
    # One for all layers, or one a kind of layer.
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        # "dynamic" changes beyond max_position_embeddings, where nothing is served anyway.
        if parameters.get("rope_type") == "longrope":
            constant = int(parameters["original_max_position_embeddings"])
            if context > constant:
                raise StartupError(
                    f"unsupported rope_type: longrope, whose frequencies change beyond {constant} tokens\n"
                    f"  it is served up to there: --max-context {constant}"
                )
    return context


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
