from collections.abc import Sequence

__version__: str

def hash_blocks(hash_root: int, ids: Sequence[int] | bytes, block_size: int) -> list[int]:
    """Hashes of the whole blocks of ``ids``, each chained with the one before.

    ``h[i] = xxh3_64(block i as little-endian u32, seed=h[i-1])`` with ``h[-1] = hash_root``: a hash names the whole
    prefix that ends with its block. A partial last block has none.

    Args:
        hash_root: u64 that keeps apart what must never share KV (fleet, model, adapter, tenant).
        ids: token ids, a sequence of ints or little-endian u32 bytes (``array.tobytes()``).
        block_size: tokens a block.

    Returns:
        ``len(ids) // block_size`` u64 hashes.

    Raises:
        ValueError: ``block_size`` is 0, or the bytes are not whole ids.
        OverflowError: an id or the root is out of range.
    """

def main(args: list[str], python: str | None = None) -> int: ...
