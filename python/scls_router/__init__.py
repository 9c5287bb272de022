"""Product routing and slice-level scheduling of LLM inference: the Rust core from Python."""

from scls_router._native import __version__, hash_blocks

__all__ = ["__version__", "hash_blocks"]
