"""Between an engine's paged cache and a window: every layer at once, no tensor in between.

An engine keeps the KV cache in blocks of its own, found through a block table a request; a window
is runs of a pool's blocks. ``PagedCopy`` is built once for both and copies tokens either way: on a
GPU as one launch of a Triton kernel for all planes, in host memory piece by piece.

Not imported by ``kvferry_client`` itself: it needs torch, and on a GPU triton.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvferry_client.arrays import dtype_names
from kvferry_client.paged_host import HostCopier
from kvferry_client.paged_rows import Copier, Move, Rows, rows_of
from kvferry_client.views import Run
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout, Order, Plane

BlockTable = Sequence[int] | NDArray[Any] | torch.Tensor


class CachePlane(NamedTuple):
    """One plane of an engine's cache.

    ``tensor``: (blocks, block_size_tokens, *shape), or if ``order`` is HND
    (blocks, shape[0], block_size_tokens, *shape[1:]). Any view, such as the first half of the last
    axis of a tensor that holds keys and values, as long as a head of a token is in one piece.
    """

    tensor: torch.Tensor
    order: Order = Order.NHD


class Window(Protocol):
    """What is needed of a ``WindowView``: tokens [first_token, end_token), and where they lie."""

    @property
    def first_token(self) -> int: ...
    @property
    def end_token(self) -> int: ...
    @property
    def runs(self) -> Sequence[Run]: ...


class HeadSlice(NamedTuple):
    """Heads [cache_first, cache_first + heads) of a cache are [pool_first, ...) of a pool."""

    cache_first: int
    pool_first: int
    heads: int


class PagedCache:
    """An engine's cache: planes over the same blocks, on one device."""

    def __init__(self, planes: Mapping[str, CachePlane]) -> None:
        """Look at an engine's tensors. FerryError(bad_array) if they do not belong together."""
        if not planes:
            raise FerryError(Code.BAD_ARRAY, "a cache without planes")
        self.planes = {name: _token_major(name, plane) for name, plane in planes.items()}
        first, *others = self.planes
        tensor = self.planes[first]
        self.device = tensor.device
        self.blocks, self.block_size_tokens = tensor.shape[:2]
        for name in others:
            other = self.planes[name]
            if other.shape[:2] != tensor.shape[:2] or other.device != self.device:
                raise FerryError(
                    Code.BAD_ARRAY,
                    f"planes {first!r} and {name!r} differ in (blocks, block_size_tokens) or "
                    f"device: {tuple(tensor.shape[:2])} on {self.device}, "
                    f"{tuple(other.shape[:2])} on {other.device}",
                )

    def only(self, plane: str) -> "PagedCache":
        """The same cache with one of its planes."""
        return PagedCache({plane: CachePlane(self.planes[plane])})


class PagedPool:
    """A pool's memory as a tensor, and what lies in it."""

    def __init__(self, memory: torch.Tensor, layout: Layout) -> None:
        """Look at ``memory``: uint8, (blocks, layout.block_bytes), contiguous.

        ``client.pool.torch_blocks()`` is such a tensor. FerryError(bad_array) if this is none.
        """
        fits = memory.ndim == 2 and memory.shape[1] == layout.block_bytes
        if memory.dtype is not torch.uint8 or not fits or not memory.is_contiguous():
            raise FerryError(
                Code.BAD_ARRAY,
                f"a pool is contiguous uint8 of (blocks, {layout.block_bytes}), not "
                f"{memory.dtype} of {tuple(memory.shape)} with strides {memory.stride()}",
            )
        self.memory = memory
        self.layout = layout
        self.blocks = len(memory)

    def plane(self, plane: Plane) -> torch.Tensor:
        """A plane of all blocks: (blocks, block_size_tokens, *shape) of its dtype, no copy."""
        offset_bytes, token_bytes = self.layout.places[self.layout.planes.index(plane)]
        size = self.layout.block_size_tokens
        there = self.memory[:, offset_bytes : offset_bytes + token_bytes * size]
        typed = there.view(getattr(torch, plane.dtype.value))
        if plane.order is Order.HND:
            heads, *rest = plane.shape
            return typed.view(self.blocks, heads, size, *rest).transpose(1, 2)
        return typed.view(self.blocks, size, *plane.shape)


class PagedCopy:
    """Copies tokens between a cache and windows of a pool, all planes of the cache at once.

    Planes that the layout has and the cache has not are left alone: a cache of a few layers copies
    those. Holds the tensors of both for as long as it lives.

    On a GPU a copy is queued on the current stream, which the client's ``ready``, ``resume`` and
    ``release`` wait for.
    """

    def __init__(self, cache: PagedCache, pool: PagedPool, heads: HeadSlice | None = None) -> None:
        """Work out where everything lies; FerryError(bad_array) where the two do not fit.

        ``heads``: copy only these, of the planes whose layout has ``heads_total``; the others
        are copied whole. None: all heads, of which both have the same number.
        """
        self._cache, self._pool = cache, pool
        devices = {cache.device, pool.memory.device}
        if len(devices) > 1 or cache.device.type not in ("cpu", "cuda"):
            raise FerryError(
                Code.BAD_ARRAY,
                f"cache and pool are on one CUDA device or in host memory, not on {cache.device} "
                f"and {pool.memory.device}",
            )
        planes = list(_pairs(cache, pool, heads))
        if cache.device.type == "cuda":
            from kvferry_client.paged_kernel import TritonCopier

            self._copier: Copier = TritonCopier(planes)
        else:
            self._copier = HostCopier(planes)

    def gather(
        self, block_table: BlockTable, window: Window, first_token: int, tokens: int
    ) -> None:
        """Copy tokens [first_token, first_token + tokens) out of the cache into a window.

        ``block_table``: in host memory; entry i is the cache's block of the request's tokens from
        ``i * block_size_tokens`` on. Entries that hold none of the tokens are not looked at.
        FerryError(bad_block_table) for entries that the cache has not; FerryError(bad_array) for
        tokens outside of the window. Then nothing has been copied.
        """
        self._copier.copy(self._move(block_table, window, first_token, tokens), to_pool=True)

    def scatter(
        self, block_table: BlockTable, window: Window, first_token: int, tokens: int
    ) -> None:
        """Copy tokens [first_token, first_token + tokens) of a window into the cache.

        As ``gather``; FerryError(bad_block_table) also for a block that would be written twice.
        """
        move = self._move(block_table, window, first_token, tokens)
        if len(np.unique(move.cache_blocks)) < len(move.cache_blocks):
            raise FerryError(
                Code.BAD_BLOCK_TABLE,
                f"a block stands twice among {len(move.cache_blocks)} that are to be written",
            )
        self._copier.copy(move, to_pool=False)

    def _move(self, block_table: BlockTable, window: Window, first_token: int, tokens: int) -> Move:
        end_token = first_token + tokens
        if tokens < 1 or first_token < window.first_token or end_token > window.end_token:
            raise FerryError(
                Code.BAD_ARRAY,
                f"tokens [{first_token}, {end_token}) are not in "
                f"[{window.first_token}, {window.end_token}), or none",
            )
        size = self._cache.block_size_tokens
        return Move(
            tokens,
            self._cache_blocks(block_table, first_token // size, -(-end_token // size)),
            first_token % size,
            self._pool_blocks(window, first_token, end_token),
            first_token % self._pool.layout.block_size_tokens,
        )

    def _cache_blocks(self, block_table: BlockTable, first: int, end: int) -> NDArray[np.int64]:
        """Entries [first, end) of a block table, each of them a block that there is."""
        if isinstance(block_table, torch.Tensor) and block_table.device.type != "cpu":
            raise FerryError(
                Code.BAD_BLOCK_TABLE, f"it is needed in host memory, not on {block_table.device}"
            )
        entries = np.asarray(block_table[first:end])
        if entries.ndim != 1 or entries.dtype.kind not in "iu" or len(entries) < end - first:
            raise FerryError(
                Code.BAD_BLOCK_TABLE,
                f"{end} integers are needed, not {entries.dtype} of {np.shape(block_table)}",
            )
        wrong = (entries < 0) | (entries >= self._cache.blocks)
        if wrong.any():
            at = int(wrong.argmax())
            raise FerryError(
                Code.BAD_BLOCK_TABLE,
                f"entry {first + at} is {entries[at]}, of a cache of {self._cache.blocks} blocks",
            )
        return entries.astype(np.int64)

    def _pool_blocks(self, window: Window, first: int, end: int) -> NDArray[np.int64]:
        """The pool's blocks that hold tokens [first, end) of a window, in order."""
        size = self._pool.layout.block_size_tokens
        firsts, counts, at = [], [], first // size * size
        for first_token, first_block, blocks in window.runs:
            skip = (at - first_token) // size
            if not 0 <= skip < blocks:
                continue
            if first_block < 0 or first_block + blocks > self._pool.blocks:
                raise FerryError(
                    Code.BAD_ARRAY,
                    f"a window in blocks {first_block} to {first_block + blocks}, of a pool of "
                    f"{self._pool.blocks}",
                )
            count = min(blocks - skip, -(-(end - at) // size))
            firsts.append(first_block + skip)
            counts.append(count)
            at += count * size
            if at >= end:
                return _spread(firsts, counts)
        raise FerryError(Code.BAD_ARRAY, f"no run of the window holds token {at}")


def _spread(firsts: list[int], counts: list[int]) -> NDArray[np.int64]:
    """``counts`` numbers from each of ``firsts`` on, without an array for each."""
    if len(counts) == 1:  # mostly
        return np.arange(firsts[0], firsts[0] + counts[0], dtype=np.int64)
    sizes = np.array(counts, np.int64)
    ends = np.cumsum(sizes)
    return np.repeat(np.array(firsts, np.int64) - ends + sizes, sizes) + np.arange(ends[-1])


def _token_major(name: str, plane: CachePlane) -> torch.Tensor:
    """The plane's tensor as (blocks, block_size_tokens, *shape), if it can be written to safely."""
    tensor, order = plane
    if tensor.ndim < (3 if order is Order.HND else 2) or not tensor.numel():
        raise FerryError(
            Code.BAD_ARRAY,
            f"plane {name!r} of order {order} has too few axes, or no element: {list(tensor.shape)}",
        )
    reach = 0  # elements of the axes that lie inside of one step of the next
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent > 1:
            if stride <= reach:
                raise FerryError(
                    Code.BAD_ARRAY,
                    f"plane {name!r} of shape {list(tensor.shape)} and strides "
                    f"{list(tensor.stride())} has several elements in one place",
                )
            reach += stride * (extent - 1)
    return tensor.detach().transpose(1, 2) if order is Order.HND else tensor.detach()


def _pairs(cache: PagedCache, pool: PagedPool, heads: HeadSlice | None) -> Iterator[Rows]:
    """Every plane of a cache beside that of a pool."""
    planes = {plane.name: plane for plane in pool.layout.planes}
    if heads is not None and not any(
        planes[name].heads_total is not None for name in cache.planes if name in planes
    ):
        raise FerryError(Code.BAD_ARRAY, f"{heads} of planes none of which has heads_total")
    for name, mine in cache.planes.items():
        if name not in planes:
            raise FerryError(
                Code.BAD_ARRAY, f"no plane {name!r} in the layout; it has {', '.join(planes)}"
            )
        plane = planes[name]
        theirs = pool.plane(plane)
        shown = str(mine.dtype).removeprefix("torch.")
        if shown not in dtype_names(plane):
            raise FerryError(
                Code.BAD_ARRAY,
                f"plane {name!r} takes {' or '.join(dtype_names(plane))}, not {shown}",
            )
        if heads is not None and plane.heads_total is not None:
            mine = _sliced(name, "cache", mine, heads.cache_first, heads.heads)
            theirs = _sliced(name, "pool", theirs, heads.pool_first, heads.heads)
        if mine.shape[2:] != theirs.shape[2:]:
            raise FerryError(
                Code.BAD_ARRAY,
                f"a token of plane {name!r} is {list(mine.shape[2:])} in the cache and "
                f"{list(theirs.shape[2:])} in the pool",
            )
        yield rows_of(name, mine, theirs)


def _sliced(name: str, side: str, view: torch.Tensor, first: int, heads: int) -> torch.Tensor:
    have = view.shape[2] if view.ndim > 2 else 0
    if first < 0 or heads < 1 or first + heads > have:
        raise FerryError(
            Code.BAD_ARRAY,
            f"heads {first} to {first + heads} of plane {name!r}, of which the {side} has {have}",
        )
    return view[:, :, first : first + heads]
