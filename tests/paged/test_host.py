"""How much a copy in host memory takes at once."""

import numpy as np
import pytest

from kvferry_client.paged_host import _stretches
from kvferry_client.paged_rows import Move

TOKENS = 1024


def pieces(cache_size: int, pool_size: int, cache_step: int, skip: int = 0) -> list[int]:
    """How many tokens each piece of a copy has, whose blocks in the pool follow each other."""
    cache_blocks = 7 + cache_step * np.arange(TOKENS // cache_size + 1)
    pool_blocks = np.arange(3, 3 + TOKENS // pool_size + 1)
    move = Move(TOKENS, cache_blocks, skip % cache_size, pool_blocks, skip % pool_size)
    unit = np.gcd(cache_size, pool_size)
    found = _stretches(move, int(unit), cache_size // int(unit), pool_size // int(unit))
    return [(one.units - 1) * int(unit) + one.end - one.first for one in found]


@pytest.mark.parametrize(
    ("cache_size", "pool_size", "cache_step", "tokens"),
    [
        (128, 128, 1, [1024]),
        (128, 128, 2, 8 * [128]),
        (16, 128, 1, 8 * [128]),
        (1, 128, 1, 8 * [128]),
        (1, 128, 2, 1024 * [1]),
        (128, 16, 1, 8 * [128]),
    ],
)
def test_what_lies_evenly_on_both_sides_is_one_piece(
    cache_size: int, pool_size: int, cache_step: int, tokens: list[int]
) -> None:
    assert pieces(cache_size, pool_size, cache_step) == tokens


def test_a_part_of_a_block_is_a_piece_at_both_ends() -> None:
    assert pieces(128, 128, 1, skip=100) == [28, 7 * 128, 100]
    assert pieces(1, 128, 1, skip=100) == [28, *7 * [128], 100]
