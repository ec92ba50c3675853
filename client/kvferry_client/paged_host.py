"""The copy between a paged cache and a pool in host memory: what the kernel must equal.

Needs torch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from kvferry_client.paged_rows import Move, Rows

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class HostCopier:
    """Copies piece by piece, in the words that alignment allows. Blocks until it is done."""

    def __init__(self, planes: Sequence[Rows]) -> None:
        # numpy, as it begins a copy in a tenth of torch's time, and pieces are small.
        self._planes = [
            [side.view(_WORDS[rows.align_bytes]).numpy() for side in rows] for rows in planes
        ]
        self._sizes = [side.shape[1] for side in planes[0]]

    def copy(self, move: Move, *, to_pool: bool) -> None:
        """Copy a move's tokens of all planes: from the cache to the pool, or the other way."""
        pieces = list(_pieces(move, *self._sizes))
        for cache, pool in self._planes:
            for cache_block, in_cache, pool_block, in_pool, tokens in pieces:
                here = pool[pool_block, in_pool : in_pool + tokens]
                there = cache[cache_block, in_cache : in_cache + tokens]
                if to_pool:
                    here[...] = there
                else:
                    there[...] = here


class _Piece(NamedTuple):
    """Tokens that lie in one block on both sides."""

    cache_block: int
    in_cache: int
    pool_block: int
    in_pool: int
    tokens: int


def _pieces(move: Move, cache_size: int, pool_size: int) -> Iterator[_Piece]:
    cache_blocks, pool_blocks = move.cache_blocks.tolist(), move.pool_blocks.tolist()
    at = 0
    while at < move.tokens:
        cache_block, in_cache = divmod(move.cache_skip + at, cache_size)
        pool_block, in_pool = divmod(move.pool_skip + at, pool_size)
        tokens = min(cache_size - in_cache, pool_size - in_pool, move.tokens - at)
        yield _Piece(cache_blocks[cache_block], in_cache, pool_blocks[pool_block], in_pool, tokens)
        at += tokens
