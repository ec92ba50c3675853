"""Which rank of the source brings what to which rank of the sink.

A *part* is one pair of ranks with slices of planes; each part's extents travel as chunks of their
own. Both daemons work the same plan out of the two layouts, so a part is named by its number.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout, Plane

CELLS_MAX = 1 << 17  # 10 MiB: 1,024 planes of one rank to 64 are half of it, and 128 layers 1/8
PIECES_MAX = 1 << 12  # 32 kinds of planes on 64 ranks each; models have a handful


class SideSlice(NamedTuple):
    """Heads [first_head, first_head + heads) of one side's plane; all of it if heads is None."""

    plane: int
    first_head: int
    heads: int | None


class Slice(NamedTuple):
    """Heads of one plane, and where they stand in the planes of the two ranks."""

    plane: int
    source_first: int
    sink_first: int
    heads: int | None  # None: the whole plane, which every rank has


class Part(NamedTuple):
    """What one rank of the source brings to one rank of the sink, in the order of the planes.

    Parts whose slices stand alike share them: of many ranks few differ.
    """

    sink_rank: int
    source_rank: int
    source_slices: tuple[SideSlice, ...]  # where they stand in the source's planes
    sink_slices: tuple[SideSlice, ...]  # and in the sink's

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Both sides' together."""
        both = zip(self.source_slices, self.sink_slices, strict=True)
        return tuple(
            Slice(one.plane, one.first_head, two.first_head, one.heads) for one, two in both
        )


class _Piece(NamedTuple):
    """A slice of any plane with these heads."""

    sink_rank: int
    source_rank: int
    source_first: int
    sink_first: int
    heads: int | None


_Kind = tuple[int, int | None]  # a plane's number, and its heads_total
_KindCut = tuple[int | None, int, int | None]  # heads_total of planes, first head, heads
_Cut = tuple[_KindCut, ...]  # a pair of ranks has one piece of a plane at most


def plan(source: Layout, source_ranks: int, sink: Layout, sink_ranks: int) -> tuple[Part, ...]:
    """Every part, sorted by (sink_rank, source_rank): a part's number is its index.

    Each sink rank gets each head of each of its planes exactly once. Raises
    FerryError(layout_mismatch) with both sides' values where the two do not fit, and where the plan
    would be larger than any that a model needs.
    """
    check_ranks(source, source_ranks, "source")
    check_ranks(sink, sink_ranks, "sink")
    difference = _difference(source, sink)
    if difference is not None:
        raise FerryError(Code.LAYOUT_MISMATCH, difference)
    planes = [(index, plane.heads_total) for index, plane in enumerate(source.planes)]
    found = _parts(source, source_ranks, sink, sink_ranks)
    cuts = {cut for both in found.values() for cut in both}
    _check_size(planes, cuts)
    slices = {cut: _slices(planes, cut) for cut in cuts}
    return tuple(
        Part(*ranks, slices[one], slices[two]) for ranks, (one, two) in sorted(found.items())
    )


def is_plain(source: Layout, source_ranks: int, sink: Layout, sink_ranks: int) -> bool:
    """Whether whole blocks can travel as they are: part r is then from rank r to rank r."""
    return source_ranks == sink_ranks and source.digest == sink.digest


def wire_block_tokens(source: Layout, sink: Layout) -> int:
    """Tokens of a block on the wire: the smaller block, of which the other is a multiple."""
    return min(source.block_size_tokens, sink.block_size_tokens)


def check_ranks(layout: Layout, ranks: int, side: str) -> None:
    """Raise FerryError(layout_mismatch) if no group of so many ranks has this layout.

    ``side``: whose, for the message.
    """
    if ranks < 1:
        raise FerryError(Code.LAYOUT_MISMATCH, f"the {side} has {ranks} ranks")
    for index, plane in enumerate(layout.planes):
        total = plane.heads_total
        if total is None:
            continue
        shared, doubled = total % ranks == 0, ranks % total == 0
        share = max(1, total // ranks)
        if not (shared or doubled) or plane.shape[0] != share:
            wanted = f"needs {share} a rank" if shared or doubled else "divides neither way"
            raise FerryError(
                Code.LAYOUT_MISMATCH,
                f"planes[{index}] ({plane.name}) of the {side}: {total} heads over {ranks} ranks "
                f"{wanted}, the layout has {plane.shape[0]}",
            )


def _parts(
    source: Layout, source_ranks: int, sink: Layout, sink_ranks: int
) -> dict[tuple[int, int], tuple[_Cut, _Cut]]:
    """By (sink_rank, source_rank): how both sides' planes are cut."""
    first_of = {
        one.heads_total: (one, two) for one, two in zip(source.planes, sink.planes, strict=True)
    }
    if len(first_of) * (source_ranks + sink_ranks) > PIECES_MAX:
        raise FerryError(
            Code.LAYOUT_MISMATCH,
            f"planes of {len(first_of)} different heads_total on {source_ranks} ranks at the source "
            f"and {sink_ranks} at the sink: over {PIECES_MAX} pieces",
        )
    found: dict[tuple[int, int], list[tuple[_KindCut, _KindCut]]] = {}
    for kind, (one, two) in first_of.items():  # the ranks' shares follow from it
        for piece in _pieces(one, source_ranks, two, sink_ranks):
            at_source = (kind, piece.source_first, piece.heads)
            at_sink = (kind, piece.sink_first, piece.heads)
            found.setdefault(piece[:2], []).append((at_source, at_sink))
    return {
        ranks: (tuple(one for one, _ in both), tuple(two for _, two in both))
        for ranks, both in found.items()
    }


def _check_size(planes: list[_Kind], cuts: set[_Cut]) -> None:
    """Raise FerryError(layout_mismatch) if there is too much to be worked out and kept."""
    of_kind = Counter(kind for _, kind in planes)
    cells = sum(of_kind[kind] for cut in cuts for kind, _, _ in cut)
    if cells > CELLS_MAX:
        raise FerryError(
            Code.LAYOUT_MISMATCH,
            f"{len(planes)} planes are cut in {len(cuts)} ways between the ranks of the two sides: "
            f"{cells} slices, over {CELLS_MAX}",
        )


def _slices(planes: list[_Kind], cut: _Cut) -> tuple[SideSlice, ...]:
    """Of every plane that has heads in this cut."""
    where = {kind: (first, heads) for kind, first, heads in cut}
    return tuple(SideSlice(plane, *where[kind]) for plane, kind in planes if kind in where)


def _pieces(source: Plane, source_ranks: int, sink: Plane, sink_ranks: int) -> Iterator[_Piece]:
    """How the heads of one plane come to every sink rank."""
    for sink_rank in range(sink_ranks):
        nearest = sink_rank * source_ranks // sink_ranks
        if source.heads_total is None:  # with heads or without: this pair has a part anyway
            yield _Piece(sink_rank, nearest, 0, 0, None)
            continue
        first = head = sink.first_head(sink_rank, sink_ranks)
        end = first + sink.shape[0]
        while head < end:
            source_rank = _holder(head, source.heads_total, source_ranks, nearest)
            source_first = head - source.first_head(source_rank, source_ranks)
            heads = min(end - head, source.shape[0] - source_first)
            yield _Piece(sink_rank, source_rank, source_first, head - first, heads)
            head += heads


def _holder(head: int, heads_total: int, ranks: int, nearest: int) -> int:
    """The source rank that brings a head.

    Of several that have it, the one at the sink rank's own place, so that sink ranks that want the
    same head do not all go to the same source rank, and a rank's planes come together.
    """
    first, end = head * ranks // heads_total, -(-(head + 1) * ranks // heads_total)
    return min(max(first, nearest), end - 1)


def _difference(source: Layout, sink: Layout) -> str | None:
    """The first thing in which the two do not fit, in words."""
    for index, (one, two) in enumerate(zip(source.planes, sink.planes, strict=False)):
        for what, mine, theirs in (
            ("name", one.name, two.name),
            ("dtype", one.dtype, two.dtype),
            ("heads_total", one.heads_total, two.heads_total),
            ("shape", _logical_shape(one), _logical_shape(two)),
        ):
            if mine != theirs:
                where = f"planes[{index}] ({one.name}) {what}"
                return f"{where}: {mine} at the source, {theirs} at the sink"
    if len(source.planes) != len(sink.planes):
        have, want = len(source.planes), len(sink.planes)
        return f"number of planes: {have} at the source, {want} at the sink"
    if source.aux != sink.aux:
        return f"aux: {list(source.aux)} at the source, {list(sink.aux)} at the sink"
    large, small = sorted((source.block_size_tokens, sink.block_size_tokens), reverse=True)
    if large % small:
        return (
            f"block_size_tokens: {source.block_size_tokens} at the source, "
            f"{sink.block_size_tokens} at the sink, and neither is a multiple of the other"
        )
    return None


def _logical_shape(plane: Plane) -> tuple[int, ...]:
    """What a token's shape is in all ranks together: heads are counted anew."""
    return plane.shape if plane.heads_total is None else (plane.heads_total, *plane.shape[1:])
