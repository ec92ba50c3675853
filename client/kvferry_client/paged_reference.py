"""The copy between a paged cache and a pool in torch's own operations: what the kernel must equal.

It also serves caches in host memory. Needs torch.
"""

from collections.abc import Sequence

import torch

from kvferry_client.paged_rows import Move, Rows

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class TorchCopier:
    """Copies token by token through index tensors. Blocks until it is done."""

    def __init__(self, planes: Sequence[Rows]) -> None:
        # torch indexes bytes at a tenth of the speed of 64-bit words.
        self._planes = [
            Rows(*(side.view(_WORDS[rows.align_bytes]) for side in rows)) for rows in planes
        ]

    def copy(self, move: Move, *, to_pool: bool) -> None:
        """Copy a move's tokens of all planes: from the cache to the pool, or the other way."""
        tokens = torch.arange(move.tokens)
        cache_size, pool_size = (side.shape[1] for side in self._planes[0])
        in_cache, in_pool = tokens + move.cache_skip, tokens + move.pool_skip
        cache_at = (
            torch.from_numpy(move.cache_blocks)[in_cache // cache_size],
            in_cache % cache_size,
        )
        pool_at = torch.from_numpy(move.pool_blocks)[in_pool // pool_size], in_pool % pool_size
        for cache, pool in self._planes:
            if to_pool:
                pool[pool_at] = cache[cache_at]
            else:
                cache[cache_at] = pool[pool_at]
