"""Groups of ranks with real bytes, laid out by the words of the wire page rather than by strides."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvferry_daemon.memory.slices import SlicedExtent, SlicePlan
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.parts import Part, plan, wire_block_tokens

UNTOUCHED = 0xA5
Array = NDArray[Any]


class PlaneKind(NamedTuple):
    """A plane of the whole model: ``heads`` None: every rank has it all."""

    heads: int | None
    rest: tuple[int, ...]
    dtype: Dtype = Dtype.UINT8


def layout_of(kinds: Sequence[PlaneKind], ranks: int, block: int, order: Order) -> Layout:
    """What one of so many ranks has."""
    planes = []
    for index, kind in enumerate(kinds):
        shape = kind.rest
        if kind.heads is not None:
            shape = (max(1, kind.heads // ranks), *kind.rest)
        planes.append(
            Plane(
                name=f"p{index}",
                dtype=kind.dtype,
                shape=shape,
                heads_total=kind.heads,
                order=order if shape else Order.NHD,
            )
        )
    return Layout(planes=tuple(planes), block_size_tokens=block)


def content(kinds: Sequence[PlaneKind], tokens: int) -> list[Array]:
    """What the whole model has made: (tokens, [heads,] *rest, element_bytes) of each plane."""
    chance = np.random.default_rng(7)
    return [
        chance.integers(
            0,
            256,
            (tokens, *(() if k.heads is None else (k.heads,)), *k.rest, k.dtype.element_bytes),
            np.uint8,
        )
        for k in kinds
    ]


class Window(NamedTuple):
    """Where the tokens of a side lie; the same blocks in every rank, to keep it short."""

    base_token: int
    runs: tuple[tuple[int, int], ...]

    @property
    def blocks(self) -> list[int]:
        """Every block, in token order."""
        return [first + index for first, count in self.runs for index in range(count)]


class Group:
    """The ranks of one side, each with a pool of its own."""

    def __init__(self, layout: Layout, ranks: int, window: Window) -> None:
        self.layout = layout
        self.ranks = ranks
        self.window = window
        self.pools = [
            bytearray([UNTOUCHED]) * ((max(window.blocks) + 2) * layout.block_bytes)
            for _ in range(ranks)
        ]

    def fill(self, made: list[Array], first: int, end: int) -> None:
        """Put these tokens where they belong in every rank."""
        size, base = self.layout.block_size_tokens, self.window.base_token
        for rank, pool in enumerate(self.pools):
            for index, plane in enumerate(self.layout.planes):
                mine = self.share(made[index], plane, rank)
                for number, block in enumerate(self.window.blocks):
                    token = base + number * size
                    low, high = max(first, token), min(end, token + size)
                    if low < high:
                        into = self.plane(pool, index, block)
                        into[low - token : high - token] = mine[low:high]

    def share(self, made: Array, plane: Plane, rank: int) -> Array:
        """What a rank has of a plane."""
        if plane.heads_total is None:
            return made
        each = plane.shape[0]
        first = rank * each
        if self.ranks > plane.heads_total:
            first = rank // (self.ranks // plane.heads_total)
        return made[:, first : first + each]

    def plane(self, pool: bytearray, index: int, block: int) -> Array:
        """A block's plane in place, (tokens, *shape, element_bytes)."""
        size, plane = self.layout.block_size_tokens, self.layout.planes[index]
        place = self.layout.places[index]
        at = block * self.layout.block_bytes + place.offset_bytes
        array: Array = np.frombuffer(pool, np.uint8, place.token_bytes * size, at)
        element_bytes = plane.dtype.element_bytes
        if plane.order is Order.HND:
            heads, *rest = plane.shape
            return array.reshape(heads, size, *rest, element_bytes).swapaxes(0, 1)
        return array.reshape(size, *plane.shape, element_bytes)


class Move:
    """A source and a sink, and everything that goes from one to the other."""

    def __init__(self, source: Group, sink: Group) -> None:
        self.source, self.sink = source, sink
        self.wire = wire_block_tokens(source.layout, sink.layout)
        self.parts = plan(source.layout, source.ranks, sink.layout, sink.ranks)

    def extents(self, part: Part, first: int, tokens: int) -> tuple[SlicedExtent, SlicedExtent]:
        """A part's bytes of these tokens, on both sides."""
        made = []
        for group, slices, rank in (
            (self.source, part.source_slices, part.source_rank),
            (self.sink, part.sink_slices, part.sink_rank),
        ):
            side = SlicePlan(group.layout, slices, self.wire)
            window = group.window
            made.append(
                side.extent(
                    memoryview(group.pools[rank]),
                    window.runs,
                    base_token=window.base_token,
                    first_token=first,
                    tokens=tokens,
                )
            )
        return made[0], made[1]

    def chunks(self, first: int, end: int, wires: int) -> Iterator[tuple[int, int]]:
        """Cut tokens into chunks of so many wire blocks: (first_token, tokens)."""
        while first < end:
            tokens = min(wires * self.wire, end - first)
            yield first, tokens
            first += tokens

    def on_the_wire(self, part: Part, made: list[Array], first: int, tokens: int) -> bytes:
        """A chunk's payload, as the wire page has it."""
        found = []
        for start in range(first, first + tokens, self.wire):
            stop = min(start + self.wire, first + tokens)
            for one in part.slices:
                plane = self.source.layout.planes[one.plane]
                array = self.source.share(made[one.plane], plane, part.source_rank)[start:stop]
                if one.heads is not None:
                    array = array[:, one.source_first : one.source_first + one.heads]
                found.append(array.tobytes())
        return b"".join(found)
