"""What the worker says of itself: sizes, names, and digests of the files that workers of one pool must share."""

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from scls_router.proto import common_pb2 as common

# Minor version of the contract in proto/scls/v1 that this worker speaks.
PROTO_MINOR = 0
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
_PIECE = 1 << 20


def tokenizer_files(folder: Path | None) -> list[Path]:
    """The files that GetTokenizer sends, those that exist."""
    if folder is None:
        return []
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def model_files(folder: Path) -> list[Path]:
    """The files that decide what the model computes."""
    configs = (folder / "config.json", folder / "generation_config.json")
    return [path for path in configs if path.is_file()] + list(folder.glob("*.safetensors"))


def read_pieces(path: Path) -> Iterator[bytes]:
    """A file in pieces of at most 1 MiB: weights do not fit twice."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def digest(files: Iterable[Path]) -> str:
    """sha256 over the files by name; of each its name in UTF-8, NUL, its length in 8 bytes little-endian, its bytes."""
    sha = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        sha.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        for piece in read_pieces(path):
            sha.update(piece)
    return sha.hexdigest()


def worker_info(
    *,
    worker_id: str,
    served_names: Sequence[str],
    model_digest: str,
    tokenizer_digest: str,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    max_context: int,
    block_size: int,
    blocks: int,
    max_rows: int,
    chunk_tokens: int,
    device: str,
    dtype: str,
    engine: str,
    padded: bool = False,
) -> common.WorkerInfo:
    epoch = secrets.randbits(63) or 1
    return common.WorkerInfo(
        worker_id=worker_id or f"worker-{epoch:016x}",
        worker_epoch=epoch,
        model_digest=model_digest,
        served_names=served_names,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        max_context=max_context,
        block_size=block_size,
        blocks=blocks,
        max_rows=max_rows,
        cost_shape=common.COST_SHAPE_PADDED if padded else common.COST_SHAPE_PAGED,
        tokenizer_digest=tokenizer_digest,
        proto_minor=PROTO_MINOR,
        chunk_tokens=chunk_tokens,
        device=device,
        dtype=dtype,
        engine=engine,
    )
