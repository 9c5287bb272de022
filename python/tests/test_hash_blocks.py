"""Block hashes: the one function that router and workers must agree on."""

from array import array

import pytest
from scls_router import hash_blocks


def test_a_hash_names_its_whole_prefix() -> None:
    ids = list(range(40))
    whole = hash_blocks(7, ids, 16)
    assert len(whole) == 2
    assert whole[:1] == hash_blocks(7, ids[:16], 16)
    assert whole[1:] == hash_blocks(whole[0], ids[16:32], 16)
    assert whole != hash_blocks(8, ids, 16)
    assert hash_blocks(7, [1, *ids[1:]], 16)[1] != whole[1]


def test_bytes_and_lists_agree() -> None:
    ids = list(range(100, 164))
    assert hash_blocks(1, array("I", ids).tobytes(), 16) == hash_blocks(1, ids, 16)


def test_known_values() -> None:
    # xxh3_64 of sixteen zero ids with seed 0, from the reference implementation (python-xxhash 3.6)
    assert hash_blocks(0, [0] * 16, 16) == [3457472693978015086]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((0, [1], 0), ValueError),
        ((0, b"123", 1), ValueError),
        ((0, [-1], 1), (OverflowError, TypeError)),
        ((2**64, [1], 1), OverflowError),
        ((0, [2**32], 1), (OverflowError, TypeError)),
    ],
)
def test_bad_input_is_an_error(args: tuple, error: type) -> None:
    with pytest.raises(error):
        hash_blocks(*args)
