"""Block hashes: the one function that router and workers must agree on."""

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scls_router import hash_blocks


def test_a_hash_names_its_whole_prefix() -> None:
    ids = list(range(40))
    whole = hash_blocks(7, ids, 16)
    assert len(whole) == 2
    assert whole[:1] == hash_blocks(7, ids[:16], 16)
    assert whole[1:] == hash_blocks(whole[0], ids[16:32], 16)
    assert whole != hash_blocks(8, ids, 16)
    assert hash_blocks(7, [1, *ids[1:]], 16)[1] != whole[1]


def forms(ids: list[int]) -> dict[str, object]:
    wide = np.array(ids, dtype=np.int64)
    return {
        "tuple": tuple(ids),
        "bytes": array("I", ids).tobytes(),
        "array u32": array("I", ids),
        "array u64": array("Q", ids),
        "memoryview": memoryview(array("I", ids)),
        "numpy i64": wide,
        "numpy u32": wide.astype(np.uint32),
        "numpy u64": wide.astype(np.uint64),
        "numpy strided": np.repeat(wide, 3)[::3],
        "numpy backwards": wide[::-1].copy()[::-1],
        "numpy scalars": list(wide),
    }


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=80), st.integers(1, 20), st.integers(0, 2**64 - 1))
def test_all_forms_of_ids_are_one_chain_of_blocks(ids: list[int], size: int, root: int) -> None:
    chain, parent = [], root
    for at in range(0, len(ids) - size + 1, size):
        (parent,) = hash_blocks(parent, ids[at : at + size], size)
        chain.append(parent)
    assert hash_blocks(root, ids, size) == chain
    for name, form in forms(ids).items():
        assert hash_blocks(root, form, size) == chain, name


def test_torch_tensors_are_ids() -> None:
    torch = pytest.importorskip("torch")
    ids = list(range(64))
    for dtype in (torch.int64, torch.int32):
        tensor = torch.tensor(ids, dtype=dtype)
        assert hash_blocks(0, tensor, 16) == hash_blocks(0, ids, 16)
        assert hash_blocks(0, tensor[::2], 16) == hash_blocks(0, ids[::2], 16)
    with pytest.raises(ValueError, match=r"shape \(1, 64\)"):
        hash_blocks(0, torch.tensor([ids]), 16)


def test_known_values() -> None:
    # xxh3_64 of sixteen zero ids with seed 0, from the reference implementation (python-xxhash 3.6)
    assert hash_blocks(0, [0] * 16, 16) == [3457472693978015086]


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ([1, -1], ValueError, "-1 at index 1"),
        ([2**32], ValueError, "4294967296 at index 0"),
        ([1, "a"], TypeError, "a at index 1"),
        (np.array([5, 6, -7]), ValueError, "-7 at index 2"),
        (np.array([5, -6], dtype=np.int32), ValueError, "-6 at index 1"),
        (np.array([5, 2**32]), ValueError, "4294967296 at index 1"),
        (np.array([2**64 - 1], dtype=np.uint64), ValueError, "18446744073709551615 at index 0"),
        (np.array([1.0]), TypeError, 'format "d"'),
        (np.array([True]), TypeError, "format"),
        (np.array([1], dtype=np.uint8), TypeError, 'format "B"'),
        (np.array([1], dtype=">i8"), TypeError, 'format ">q"'),
        (np.zeros((2, 3), dtype=np.int64), ValueError, r"shape \(2, 3\)"),
        (np.array(3), ValueError, r"shape \(\)"),
        (b"123", ValueError, "3 bytes"),
        ("text", TypeError, "got a str"),
        (5, TypeError, "int"),
        (None, TypeError, "NoneType"),
    ],
)
def test_bad_ids_are_named(ids: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        hash_blocks(0, ids, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "error"), [((0, [1], 0), ValueError), ((2**64, [1], 1), OverflowError), ((0, [1], -1), OverflowError)]
)
def test_bad_numbers_are_errors(args: tuple, error: type[Exception]) -> None:
    with pytest.raises(error):
        hash_blocks(*args)
