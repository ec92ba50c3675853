"""The copy between a paged cache and a pool in host memory: what the kernel must equal.

Needs torch.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvferry_client.paged_rows import Move, Rows

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_Units = NDArray[Any]  # a plane of one side: (blocks, units of a block, tokens of a unit, ...)


class HostCopier:
    """Copies as much at once as lies evenly on both sides. Blocks until it is done.

    Of pages of one token that follow each other, a call a token took four times as long.
    """

    def __init__(self, planes: Sequence[Rows]) -> None:
        sizes = [side.shape[1] for side in planes[0]]
        self._unit_tokens = gcd(*sizes)
        self._in_block = [size // self._unit_tokens for size in sizes]
        self._planes = [
            [_units(side, rows.align_bytes, self._unit_tokens) for side in rows] for rows in planes
        ]

    def copy(self, move: Move, *, to_pool: bool) -> None:
        """Copy a move's tokens of all planes: from the cache to the pool, or the other way."""
        of_cache, of_pool = self._in_block
        pairs = [
            (_index(one.cache, one, of_cache), _index(one.pool, one, of_pool))
            for one in _stretches(move, self._unit_tokens, of_cache, of_pool)
        ]
        for cache, pool in self._planes:
            if to_pool:
                for there, here in pairs:
                    pool[here] = cache[there]
            else:
                for there, here in pairs:
                    cache[there] = pool[here]


def _units(side: torch.Tensor, align_bytes: int, unit_tokens: int) -> _Units:
    """The same memory, in the words that alignment allows."""
    words = side.view(_WORDS[align_bytes])
    blocks, size, *rest = words.shape
    # numpy, as it begins a copy in a tenth of torch's time, and pieces are small.
    found: _Units = words.view(blocks, size // unit_tokens, unit_tokens, *rest).numpy()
    return found


class _At(NamedTuple):
    block: int
    unit: int  # of the block


class _Stretch(NamedTuple):
    """Units that follow each other on both sides, and which tokens of each."""

    cache: _At
    pool: _At
    units: int
    first: int
    end: int


def _index(at: _At, stretch: _Stretch, in_block: int) -> tuple[int | slice, ...]:
    """Blocks of one unit each follow each other evenly; longer ones only inside."""
    tokens = slice(stretch.first, stretch.end)
    if in_block == 1:
        return slice(at.block, at.block + stretch.units), 0, tokens
    return at.block, slice(at.unit, at.unit + stretch.units), tokens


def _stretches(
    move: Move, unit_tokens: int, cache_units: int, pool_units: int
) -> Iterator[_Stretch]:
    """As few as can be. Both sides' units begin with the same tokens, as their blocks do."""
    first, end = move.cache_skip % unit_tokens, move.cache_skip % unit_tokens + move.tokens
    units = -(-end // unit_tokens)
    caches = _ats(move.cache_blocks, move.cache_skip // unit_tokens, units, cache_units)
    pools = _ats(move.pool_blocks, move.pool_skip // unit_tokens, units, pool_units)
    follows = _follows(*caches, cache_units) & _follows(*pools, pool_units)
    if first:
        follows[:1] = False
    if end % unit_tokens:
        follows[-1:] = False
    edges = np.concatenate([[0], np.flatnonzero(~follows) + 1])
    columns = [one[edges].tolist() for one in (*caches, *pools)]
    places = zip(*columns, strict=True)
    for (low, high), (block, unit, of, within) in zip(
        pairwise([*edges.tolist(), units]), places, strict=True
    ):
        yield _Stretch(
            _At(block, unit),
            _At(of, within),
            high - low,
            first if low == 0 else 0,
            end - low * unit_tokens if high == units and end % unit_tokens else unit_tokens,
        )


def _ats(
    blocks: NDArray[np.int64], first: int, units: int, in_block: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The block of each unit, and which of its units that is."""
    index, unit = np.divmod(np.arange(first, first + units), in_block)
    return blocks[index], unit


def _follows(block: NDArray[np.int64], unit: NDArray[np.int64], in_block: int) -> NDArray[np.bool_]:
    """Whether the next unit lies as far behind this one as all do."""
    steps = np.diff(block if in_block == 1 else unit)
    return np.equal(steps, 1)
