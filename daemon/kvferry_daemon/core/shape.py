"""How a payload is cut into parts, as one side sees it."""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from kvferry_proto.errors import FerryError
from kvferry_proto.layout import Layout
from kvferry_proto.parts import SideSlice, check_ranks, is_plain, plan, wire_block_tokens

KEPT_MAX = 256  # pairs of layouts
KEPT_CELLS_MAX = 1 << 18  # 20 MiB in all: a plan of 1,024 planes from one rank to 64 is a quarter
CELL_BYTES = 80  # a slice and its place in a tuple; the same in words of what does not fit
PAIR_CELLS = 16  # what a pair is kept with
SIDES_MAX = 32


class Pair(NamedTuple):
    """What a plan is worked out of; digests stand for layouts, which are not kept with it."""

    source_digest: bytes
    source_ranks: int
    sink_digest: bytes
    sink_ranks: int


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


def pair_of(source: Side, sink: Side) -> Pair:
    """What their plan is kept under."""
    return Pair(source.digest, source.ranks, sink.digest, sink.ranks)


Outcome = tuple[Shape, Shape] | FerryError


class Planned:
    """What was worked out, bounded by its size; that was asked for longest ago is forgotten first.

    That two do not fit took as long to find out, and is kept as well.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Pair, tuple[Outcome, int]] = OrderedDict()
        self.cells = 0
        self.made = 0  # so far

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, pair: Pair) -> bool:
        return pair in self._kept

    def cells_of(self, pair: Pair) -> int:
        """What a plan is counted as; 0 of one that is not kept."""
        return self._kept[pair][1] if pair in self._kept else 0

    def shapes(self, source: Side, sink: Side) -> tuple[Shape, Shape]:
        """The source's and the sink's; FerryError(layout_mismatch) where the two do not fit."""
        pair = pair_of(source, sink)
        if pair not in self._kept:
            self._keep(pair, _outcome(source, sink))
        self._kept.move_to_end(pair)
        found, _ = self._kept[pair]
        if isinstance(found, FerryError):
            raise FerryError(found.code, found.message)
        return found

    def _keep(self, pair: Pair, found: Outcome) -> None:
        self.made += 1
        cells = _cells(found)
        self._kept[pair] = found, cells
        self.cells += cells
        while len(self._kept) > KEPT_MAX or self.cells > KEPT_CELLS_MAX:
            _, (_, fewer) = self._kept.popitem(last=False)
            self.cells -= fewer


def _outcome(source: Side, sink: Side) -> Outcome:
    try:
        return _plan(source, sink)
    except FerryError as error:
        return FerryError(error.code, error.message)  # without its traceback, which holds frames


def _cells(found: Outcome) -> int:
    """Its size; parts whose slices stand alike share them."""
    if isinstance(found, FerryError):
        return PAIR_CELLS + len(found.message) // CELL_BYTES
    kept = {id(one): len(one) for shape in found for one in shape.slices or ()}
    return PAIR_CELLS + sum(len(shape.ranks) for shape in found) + sum(kept.values())


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


@lru_cache(SIDES_MAX)
def check_side(side: Side, name: str) -> None:
    """FerryError(layout_mismatch) if no group of so many ranks has this layout."""
    check_ranks(side.layout, side.ranks, name)
