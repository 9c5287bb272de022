"""The levels of the C extension that this machine has, from plain C to the best, and runners at one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

native = pytest.importorskip("scls_worker.native")

# Who runs the tests has a compiler: tools/setup.sh asks for one.
assert native.kernel() is not None, "no C extension, or an old one: make build"
LEVELS = tuple(native.LEVELS[: native.kernel().level + 1])
# float32 has no use for bfloat16's dot products.
PATHS = [(dtype, level) for dtype in ("float32", "bfloat16") for level in LEVELS[: 3 if dtype == "float32" else 4]]


@contextmanager
def machine_at(level: str) -> Iterator[None]:
    """What is loaded here takes this for the machine's best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native.kernel(), "level", native.LEVELS.index(level))
        yield
