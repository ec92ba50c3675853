"""How a payload is cut into parts, as one side sees it."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from kvferry_proto.errors import FerryError
from kvferry_proto.layout import Layout
from kvferry_proto.parts import SideSlice, check_ranks, is_plain, plan, wire_block_tokens

CACHED = 32  # pairs of layouts: a plan over a thousand planes and 64 ranks costs a second, 16 MB


class Shape(NamedTuple):
    """The parts, by number.

    ``ranks``: which of this side's ranks each belongs to. ``slices``: what of that rank's planes;
    None where whole blocks travel. Extents begin and end with ``wire_block_tokens``.
    """

    wire_block_tokens: int
    ranks: tuple[int, ...]
    slices: tuple[tuple[SideSlice, ...], ...] | None = None


def whole_blocks(block_size_tokens: int, ranks: int) -> Shape:
    """Both sides have the same layout and as many ranks: rank r's blocks are part r."""
    return Shape(block_size_tokens, tuple(range(ranks)))


@dataclass(frozen=True, slots=True)
class Side:
    """One side's layout and ranks; cheap to compare, since a digest stands for its layout."""

    digest: bytes
    ranks: int
    layout: Layout = field(compare=False)

    @classmethod
    def of(cls, layout: Layout, ranks: int) -> "Side":
        """The side of a group of so many ranks, each with this layout."""
        return cls(layout.digest, ranks, layout)


def shapes(source: Side, sink: Side) -> tuple[Shape, Shape]:
    """The source's and the sink's; FerryError(layout_mismatch) where the two do not fit."""
    found = planned(source, sink)
    if isinstance(found, FerryError):
        raise FerryError(found.code, found.message)
    return found


@lru_cache(CACHED)
def planned(source: Side, sink: Side) -> tuple[Shape, Shape] | FerryError:
    """The same; that they do not fit took as long to find out, and is kept as well."""
    try:
        return _plan(source, sink)
    except FerryError as error:
        return FerryError(error.code, error.message)  # without its traceback, which holds frames


def _plan(source: Side, sink: Side) -> tuple[Shape, Shape]:
    pair = (source.layout, source.ranks, sink.layout, sink.ranks)
    if is_plain(*pair):
        plain = whole_blocks(source.layout.block_size_tokens, source.ranks)
        return plain, plain
    parts = plan(*pair)
    wire = wire_block_tokens(source.layout, sink.layout)
    return (
        Shape(wire, tuple(p.source_rank for p in parts), tuple(p.source_slices for p in parts)),
        Shape(wire, tuple(p.sink_rank for p in parts), tuple(p.sink_slices for p in parts)),
    )


@lru_cache(CACHED)
def check_side(side: Side, name: str) -> None:
    """FerryError(layout_mismatch) if no group of so many ranks has this layout."""
    check_ranks(side.layout, side.ranks, name)
