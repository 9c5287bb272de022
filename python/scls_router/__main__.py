"""``python -m scls_router``: the same as ``scls-router``."""

from scls_router._cli import main

main()
