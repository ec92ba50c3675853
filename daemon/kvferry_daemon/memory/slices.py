"""Copies slices of planes between a pool's blocks and the contiguous bytes of a sliced chunk.

The bytes of a chunk are, for every wire block, for every slice, an array (tokens, heads, *rest).
numpy does the copies: strided on both sides, and without the GIL. It is loaded by the first thread
that copies: most daemons move whole blocks, and it costs more memory than all of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

from kvferry_proto.layout import Layout, Order
from kvferry_proto.parts import SideSlice

ITEM_BYTES_MAX = 8  # numpy's largest integer


class _Group(NamedTuple):
    """Slices of one shape that follow each other at one distance: the layers' K and V, mostly."""

    offset_bytes: int  # of the first one's first head and token in a block
    slices: int
    slice_step_bytes: int  # in a block
    token_step_bytes: int
    heads: int  # 1 where the heads of a token are neighbours anyway
    head_step_bytes: int
    row_bytes: int  # neighbours, here and on the wire
    wire_offset_bytes: int  # of the first one on the wire, for each token of a wire block

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one slice."""
        return self.heads * self.row_bytes


class Area(NamedTuple):
    """Equal pieces of neighbouring blocks: ``wires`` wire blocks of ``tokens`` tokens of each."""

    offset_bytes: int  # of the first block in the pool
    inside_tokens: int  # where in a block the first wire block starts
    blocks: int
    wires: int
    tokens: int
    chunk_tokens: int  # tokens of the chunk before these


class Strided(NamedTuple):
    """The same bytes in the pool and in a chunk; all in bytes, the last axis are neighbours."""

    shape: tuple[int, ...]
    pool_at: int
    in_pool: tuple[int, ...]
    chunk_at: int
    in_chunk: tuple[int, ...]


class SlicePlan:
    """One side of a part: where the bytes of its slices lie in a block and in a wire block."""

    def __init__(self, layout: Layout, slices: Sequence[SideSlice], wire_block_tokens: int) -> None:
        """ValueError if wire blocks do not fill a block, or for heads that a plane has not."""
        if layout.block_size_tokens % wire_block_tokens:
            raise ValueError(
                f"blocks of {layout.block_size_tokens} tokens, wire blocks of {wire_block_tokens}"
            )
        self._block_size = layout.block_size_tokens
        self._block_bytes = layout.block_bytes
        self._wire_tokens = wire_block_tokens
        self._groups: list[_Group] = []
        self.token_bytes = 0
        for one in slices:
            group = _group_of(layout, one, self.token_bytes)
            self.token_bytes += group.token_bytes
            if not (self._groups and (joined := _joined(self._groups[-1], group))):
                self._groups.append(group)
            else:
                self._groups[-1] = joined

    def chunk_bytes(self, tokens: int) -> int:
        """Payload bytes of a chunk of so many tokens."""
        return tokens * self.token_bytes

    def extent(
        self,
        pool: memoryview,
        runs: Sequence[tuple[int, int]],
        *,
        base_token: int,
        first_token: int,
        tokens: int,
    ) -> SlicedExtent:
        """Tokens [first_token, first_token + tokens) of a window in ``pool``, the whole of it.

        ``runs`` are (first_block, blocks) from ``base_token`` on. ValueError for tokens that the
        window does not hold, or that do not begin with a wire block: copying then cannot fail.
        """
        areas = self.areas(len(pool), runs, base_token, first_token, tokens)
        return SlicedExtent(self, pool, areas, self.chunk_bytes(tokens))

    def areas(
        self,
        pool_bytes: int,
        runs: Sequence[tuple[int, int]],
        base_token: int,
        first_token: int,
        tokens: int,
    ) -> list[Area]:
        """What ``strided`` needs to find these tokens in a pool of so many bytes; as ``extent``."""
        self._check(pool_bytes, runs, base_token, first_token, tokens)
        areas: list[Area] = []
        token, end = base_token, first_token + tokens
        for first_block, blocks in runs:
            run_end = token + blocks * self._block_size
            low, high = max(token, first_token), min(run_end, end)
            if low < high:
                areas += self._areas(first_block, low - token, high - token, low - first_token)
            token = run_end
        return areas

    def _check(
        self,
        pool_bytes: int,
        runs: Sequence[tuple[int, int]],
        base_token: int,
        first_token: int,
        tokens: int,
    ) -> None:
        end = first_token + tokens
        held_end = base_token + sum(blocks for _, blocks in runs) * self._block_size
        if tokens < 1 or not base_token <= first_token < end <= held_end:
            raise ValueError(
                f"tokens [{first_token}, {end}) of a window [{base_token}, {held_end})"
            )
        if first_token % self._wire_tokens or (first_token - base_token) % self._wire_tokens:
            raise ValueError(f"token {first_token} begins no wire block of {self._wire_tokens}")
        for first_block, blocks in runs:
            if not 0 <= first_block <= pool_bytes // self._block_bytes - blocks:
                raise ValueError(f"blocks {first_block} to {first_block + blocks} of no such pool")

    def _areas(self, first_block: int, low: int, high: int, done: int) -> Iterator[Area]:
        """Cut tokens [low, high) of a run: whole blocks in one area, what is left in its own.

        ``low`` begins a wire block, so every turn takes some.
        """
        size, wire = self._block_size, self._wire_tokens
        while low < high:
            block, inside = divmod(low, size)
            left = high - low
            if not inside and left >= size:
                blocks, wires, tokens = left // size, size // wire, wire
            elif left >= wire:
                blocks, wires, tokens = 1, min(left, size - inside) // wire, wire
            else:
                blocks, wires, tokens = 1, 1, left  # the last wire block of the chunk
            at = (first_block + block) * self._block_bytes
            yield Area(at, inside, blocks, wires, tokens, done)
            low += blocks * wires * tokens
            done += blocks * wires * tokens

    def strided(self, areas: list[Area]) -> Iterator[Strided]:
        """Where the bytes of these areas lie on both sides, piece by piece."""
        for area in areas:
            wire_bytes = area.tokens * self.token_bytes
            for group in self._groups:
                pool_at = area.offset_bytes + group.offset_bytes
                chunk_at = area.chunk_tokens * self.token_bytes
                yield Strided(
                    shape=(
                        area.blocks,
                        area.wires,
                        group.slices,
                        area.tokens,
                        group.heads,
                        group.row_bytes,
                    ),
                    pool_at=pool_at + area.inside_tokens * group.token_step_bytes,
                    in_pool=(
                        self._block_bytes,
                        self._wire_tokens * group.token_step_bytes,
                        group.slice_step_bytes,
                        group.token_step_bytes,
                        group.head_step_bytes,
                        1,
                    ),
                    chunk_at=chunk_at + area.tokens * group.wire_offset_bytes,
                    in_chunk=(
                        area.wires * wire_bytes,
                        wire_bytes,
                        area.tokens * group.token_bytes,
                        group.token_bytes,
                        group.row_bytes,
                        1,
                    ),
                )

    def _pairs(
        self, pool: memoryview, areas: list[Area], chunk: memoryview
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """The same bytes in the pool and in the chunk, as arrays of one shape."""
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else it starts a thread a core
        import numpy as np

        for shape, pool_at, in_pool, chunk_at, in_chunk in self.strided(areas):
            row_bytes = shape[-1]
            item = np.dtype(f"u{gcd(row_bytes, ITEM_BYTES_MAX)}")
            items = (*shape[:-1], row_bytes // item.itemsize)
            yield (
                np.ndarray(items, item, pool, pool_at, (*in_pool[:-1], item.itemsize)),
                np.ndarray(items, item, chunk, chunk_at, (*in_chunk[:-1], item.itemsize)),
            )


class SlicedExtent:
    """Checked places of a chunk's bytes; ``gather`` and ``scatter`` may run in any thread."""

    def __init__(
        self, plan: SlicePlan, pool: memoryview, areas: list[Area], payload_bytes: int
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._areas = areas
        self.payload_bytes = payload_bytes

    def gather(self, out: memoryview) -> None:
        """Fill ``out``, of exactly ``payload_bytes``, from the pool."""
        for in_pool, in_chunk in self._pairs(out):
            in_chunk[...] = in_pool

    def scatter(self, data: memoryview) -> None:
        """Write ``data``, exactly ``payload_bytes``, into the pool, and no byte beside it."""
        for in_pool, in_chunk in self._pairs(data):
            in_pool[...] = in_chunk

    def _pairs(self, chunk: memoryview) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        if len(chunk) != self.payload_bytes:
            raise ValueError(f"a chunk of {self.payload_bytes} bytes in {len(chunk)}")
        return self._plan._pairs(self._pool, self._areas, chunk)


def _group_of(layout: Layout, one: SideSlice, wire_offset_bytes: int) -> _Group:
    """A group of one slice."""
    plane, place = layout.planes[one.plane], layout.places[one.plane]
    there = plane.shape[0] if plane.shape else 1
    heads = there if one.heads is None else one.heads
    if not (0 <= one.first_head < one.first_head + heads <= there):
        raise ValueError(f"{one} of plane {plane.name!r}, which has {there} heads")
    if plane.order is Order.HND:
        token_step, head_step = plane.head_bytes, plane.head_bytes * layout.block_size_tokens
        row_bytes = plane.head_bytes
    else:
        token_step, head_step = plane.token_bytes, plane.head_bytes
        row_bytes = heads * plane.head_bytes
    return _Group(
        offset_bytes=place.offset_bytes + one.first_head * head_step,
        slices=1,
        slice_step_bytes=0,
        token_step_bytes=token_step,
        heads=heads if plane.order is Order.HND else 1,
        head_step_bytes=head_step,
        row_bytes=row_bytes,
        wire_offset_bytes=wire_offset_bytes,
    )


def _joined(group: _Group, one: _Group) -> _Group | None:
    """The group with one more slice; None if that is of another shape or at another distance."""
    distance = one.offset_bytes - group.offset_bytes
    step = group.slice_step_bytes or distance
    alike = (group.token_step_bytes, group.heads, group.head_step_bytes, group.row_bytes) == (
        one.token_step_bytes,
        one.heads,
        one.head_step_bytes,
        one.row_bytes,
    )
    if not alike or distance != group.slices * step:
        return None
    return group._replace(slices=group.slices + 1, slice_step_bytes=step)
