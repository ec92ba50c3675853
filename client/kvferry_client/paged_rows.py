"""What a copy between a paged cache and a pool is made of: rows of bytes, plane by plane.

A *row* is what lies in one piece on both sides: the heads of a token if both have them side by
side, else one head of it. Needs torch.
"""

from math import gcd
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvferry_proto.errors import Code, FerryError

WORD_BYTES_MAX = 16  # what one load of a GPU thread can take


class Rows(NamedTuple):
    """One plane on both sides, uint8 views of (blocks, block_size_tokens, strips, row_bytes)."""

    cache: torch.Tensor
    pool: torch.Tensor

    @property
    def align_bytes(self) -> int:
        """The largest power of two, 16 at most, that every address and length is a multiple of."""
        common = gcd(WORD_BYTES_MAX, int(self.cache.shape[-1]))
        for side in self:
            common = gcd(common, side.data_ptr(), side.storage_offset(), *side.stride()[:-1])
        return common


class Move(NamedTuple):
    """Which tokens are copied, and where they lie on both sides.

    Token i of the copy, of ``tokens``, is token ``skip + i`` of the ``blocks`` put end to end.
    """

    tokens: int
    cache_blocks: NDArray[np.int64]
    cache_skip: int
    pool_blocks: NDArray[np.int64]
    pool_skip: int


class Copier(Protocol):
    """Copies rows; built once for a cache and a pool."""

    def copy(self, move: Move, *, to_pool: bool) -> None:
        """Copy a move's tokens of all planes: from the cache to the pool, or the other way."""


def rows_of(name: str, cache: torch.Tensor, pool: torch.Tensor) -> Rows:
    """Pair views (blocks, block_size_tokens, *shape) of a plane; ``shape`` and dtype are the same.

    FerryError(bad_array) if a head of a token does not lie in one piece.
    """
    one, two = _heads(name, cache), _heads(name, pool)
    row_bytes = one.shape[-1]
    if all(side.shape[2] == 1 or side.stride(2) == row_bytes for side in (one, two)):
        one, two = _joined(one), _joined(two)
    return Rows(one, two)


def _heads(name: str, view: torch.Tensor) -> torch.Tensor:
    """Bytes of (blocks, block_size_tokens, heads, head_bytes); a scalar's token is one head."""
    if view.ndim == 2:
        view = view.unsqueeze(-1)
    blocks, size, heads, *rest = view.shape
    step = 1
    for extent, stride in zip(reversed(rest), reversed(view.stride()[3:]), strict=True):
        if extent > 1 and stride != step:
            raise FerryError(
                Code.BAD_ARRAY,
                f"plane {name!r}: a head of a token is not in one piece; its axes of {rest} have "
                f"strides {list(view.stride()[3:])}",
            )
        step *= extent
    return _strided(view, (blocks, size, heads, step), view.stride()).view(torch.uint8)


def _joined(side: torch.Tensor) -> torch.Tensor:
    """The heads of a token, which lie side by side, as one row."""
    blocks, size, heads, row_bytes = side.shape
    return _strided(side, (blocks, size, 1, heads * row_bytes), side.stride())


def _strided(view: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """The same memory with other axes, the last of them without gaps.

    An axis of one entry has the stride 0, so that it speaks against no alignment.
    """
    steps = [
        0 if extent == 1 else step for extent, step in zip(shape[:3], strides[:3], strict=True)
    ]
    return torch.as_strided(view, shape, (*steps, 1), view.storage_offset())
