"""plan: every head comes to every sink rank that has it, once; what does not fit is refused."""

import itertools
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.parts import (
    CELLS_MAX,
    Part,
    Slice,
    check_ranks,
    is_plain,
    plan,
    wire_block_tokens,
)

HEADS = (1, 2, 4, 6, 8, 12)
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24)


def share(heads_total: int, ranks: int) -> int | None:
    """How many heads a rank has; None where they do not divide."""
    if heads_total % ranks and ranks % heads_total:
        return None
    return max(1, heads_total // ranks)


def plane(name: str, heads_total: int | None, ranks: int, **fields: Any) -> Plane:
    """What one of so many ranks has of a plane of shape (heads, 3); (5,) if it is replicated."""
    if heads_total is None:
        return Plane(name=name, dtype=Dtype.FLOAT16, **{"shape": (5,), **fields})
    heads = share(heads_total, ranks)
    assert heads is not None
    return Plane(
        name=name,
        **{"dtype": Dtype.FLOAT16, "shape": (heads, 3), "heads_total": heads_total, **fields},
    )


def layout(planes: list[int | None], ranks: int, **fields: Any) -> Layout:
    made = tuple(plane(f"p{index}", heads, ranks) for index, heads in enumerate(planes))
    return Layout(planes=made, **{"block_size_tokens": 16, **fields})


def holders(heads_total: int | None, ranks: int) -> dict[int, set[int]]:
    """Which heads each rank has, by the words of the rule rather than by its arithmetic."""
    if heads_total is None:
        return {rank: {0} for rank in range(ranks)}
    if ranks <= heads_total:
        each = heads_total // ranks
        heads = iter(range(heads_total))
        return {rank: set(itertools.islice(heads, each)) for rank in range(ranks)}
    copies = ranks // heads_total
    return {
        rank: {head}
        for head in range(heads_total)
        for rank in range(head * copies, (head + 1) * copies)
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int | None], int, int]:
    source_ranks, sink_ranks = draw(st.sampled_from(RANKS)), draw(st.sampled_from(RANKS))
    fit = [h for h in HEADS if share(h, source_ranks) and share(h, sink_ranks)]
    planes = draw(st.lists(st.sampled_from([None, *fit]), min_size=1, max_size=5))
    return planes, source_ranks, sink_ranks


@given(cases())
def test_every_head_of_every_plane_comes_to_every_sink_rank_once(
    case: tuple[list[int | None], int, int],
) -> None:
    planes, source_ranks, sink_ranks = case
    parts = plan(layout(planes, source_ranks), source_ranks, layout(planes, sink_ranks), sink_ranks)
    came: Counter[tuple[int, int, int]] = Counter()
    for part in parts:
        for one in part.slices:
            total = planes[one.plane]
            have = sorted(holders(total, source_ranks)[part.source_rank])
            want = sorted(holders(total, sink_ranks)[part.sink_rank])
            if total is None:
                assert (one.source_first, one.sink_first, one.heads) == (0, 0, None)
                came[part.sink_rank, one.plane, 0] += 1
                continue
            assert one.heads
            moved = have[one.source_first : one.source_first + one.heads]
            assert moved == want[one.sink_first : one.sink_first + one.heads]
            assert len(moved) == one.heads
            came.update((part.sink_rank, one.plane, head) for head in moved)
    assert came == {
        (rank, index, head): 1
        for index, total in enumerate(planes)
        for rank, heads in holders(total, sink_ranks).items()
        for head in heads
    }


@given(cases())
def test_parts_are_numbered_by_their_ranks_and_none_is_empty(
    case: tuple[list[int | None], int, int],
) -> None:
    planes, source_ranks, sink_ranks = case
    one, two = layout(planes, source_ranks), layout(planes, sink_ranks)
    parts = plan(one, source_ranks, two, sink_ranks)
    ranks = [(part.sink_rank, part.source_rank) for part in parts]
    assert ranks == sorted(set(ranks))
    for part in parts:
        indexes = [one.plane for one in part.slices]
        assert indexes
        assert indexes == sorted(set(indexes))
    assert parts == plan(one, source_ranks, two, sink_ranks)


@given(cases())
def test_what_every_rank_has_needs_no_part_of_its_own(
    case: tuple[list[int | None], int, int],
) -> None:
    planes, source_ranks, sink_ranks = case

    def pairs(planes: list[int | None]) -> set[tuple[int, int]]:
        parts = plan(
            layout(planes, source_ranks), source_ranks, layout(planes, sink_ranks), sink_ranks
        )
        return {(part.sink_rank, part.source_rank) for part in parts}

    headed: list[int | None] = [heads for heads in planes if heads is not None]
    nearest = {(rank, rank * source_ranks // sink_ranks) for rank in range(sink_ranks)}
    assert pairs([None]) == nearest
    assert pairs([*headed, None]) == (pairs(headed) if headed else nearest)


def test_copies_of_a_head_share_the_work() -> None:
    """2 heads on 8 ranks here and 4 there: each of these four brings one head, two stay idle."""
    parts = plan(layout([2], 8), 8, layout([2], 4), 4)
    assert [(part.sink_rank, part.source_rank) for part in parts] == [
        (0, 0),
        (1, 2),
        (2, 4),
        (3, 6),
    ]
    parts = plan(layout([2], 4), 4, layout([2], 8), 8)
    assert [part.source_rank for part in parts] == [0, 0, 1, 1, 2, 2, 3, 3]


def read(parts: tuple[Part, ...]) -> list[tuple[int, int, tuple[Slice, ...]]]:
    """Each part's ranks, and its slices with both sides' places."""
    return [(part.sink_rank, part.source_rank, part.slices) for part in parts]


def test_a_plan_by_hand() -> None:
    """4 ranks to 2, 8 heads; a latent plane between two of heads."""
    parts = plan(layout([8, None, 4], 4), 4, layout([8, None, 4], 2), 2)
    assert read(parts) == [
        (0, 0, (Slice(0, 0, 0, 2), Slice(1, 0, 0, None), Slice(2, 0, 0, 1))),
        (0, 1, (Slice(0, 0, 2, 2), Slice(2, 0, 1, 1))),
        (1, 2, (Slice(0, 0, 0, 2), Slice(1, 0, 0, None), Slice(2, 0, 0, 1))),
        (1, 3, (Slice(0, 0, 2, 2), Slice(2, 0, 1, 1))),
    ]
    assert parts[3].source_slices == ((0, 0, 2), (2, 0, 1))
    assert parts[3].sink_slices == ((0, 2, 2), (2, 1, 1))
    back = plan(layout([8], 2), 2, layout([8], 4), 4)
    assert read(back) == [(rank, rank // 2, (Slice(0, 2 * (rank % 2), 0, 2),)) for rank in range(4)]


def test_a_plain_pair_of_groups_has_one_whole_part_a_rank() -> None:
    one = layout([8, None], 4)
    assert is_plain(one, 4, layout([8, None], 4), 4)
    assert [(p.sink_rank, p.source_rank) for p in plan(one, 4, one, 4)] == [
        (r, r) for r in range(4)
    ]
    assert not is_plain(one, 4, layout([8, None], 2), 2)
    assert not is_plain(layout([None], 1), 1, layout([None], 1), 2)  # the ranks alone differ
    assert not is_plain(one, 4, layout([8, None], 4, block_size_tokens=32), 4)
    hnd = Layout(planes=(plane("p0", 8, 4, order=Order.HND), one.planes[1]), block_size_tokens=16)
    assert not is_plain(one, 4, hnd, 4)
    assert plan(one, 4, hnd, 4) == plan(one, 4, one, 4)  # the order is no hindrance


@pytest.mark.parametrize(("one", "two", "wire"), [(16, 128, 16), (128, 16, 16), (48, 48, 48)])
def test_a_wire_block_is_the_smaller_block(one: int, two: int, wire: int) -> None:
    source = layout([2], 1, block_size_tokens=one)
    sink = layout([2], 1, block_size_tokens=two)
    assert plan(source, 1, sink, 1)
    assert wire_block_tokens(source, sink) == wire


def two_planes(*planes: Plane, **fields: Any) -> Layout:
    return Layout(planes=planes, **{"block_size_tokens": 16, **fields})


K, V, LATENT = plane("k", 8, 2), plane("v", 8, 2), plane("c", None, 2)
BASE = two_planes(K, V, LATENT, aux=("rope",))
REFUSED = [
    (two_planes(K, LATENT, V, aux=("rope",)), r"planes\[1\] \(v\) name: v .* source, c .* sink"),
    (two_planes(K, V, aux=("rope",)), "number of planes: 3 at the source, 2 at the sink"),
    (
        two_planes(plane("k", 8, 2, dtype=Dtype.BFLOAT16), V, LATENT, aux=("rope",)),
        r"planes\[0\] \(k\) dtype: float16 at the source, bfloat16 at the sink",
    ),
    (
        two_planes(plane("k", 8, 2, shape=(4, 5)), V, LATENT, aux=("rope",)),
        r"planes\[0\] \(k\) shape: \(8, 3\) at the source, \(8, 5\) at the sink",
    ),
    (
        two_planes(K, V, plane("c", None, 2, shape=(6,)), aux=("rope",)),
        r"planes\[2\] \(c\) shape: \(5,\) at the source, \(6,\) at the sink",
    ),
    (
        two_planes(plane("k", 4, 2), V, LATENT, aux=("rope",)),
        r"planes\[0\] \(k\) heads_total: 8 at the source, 4 at the sink",
    ),
    (
        two_planes(plane("k", None, 2, shape=(4, 3)), V, LATENT, aux=("rope",)),
        r"planes\[0\] \(k\) heads_total: 8 at the source, None at the sink",
    ),
    (two_planes(K, V, LATENT), r"aux: \['rope'\] at the source, \[\] at the sink"),
    (
        two_planes(K, V, LATENT, aux=("rope",), block_size_tokens=24),
        "block_size_tokens: 16 at the source, 24 at the sink, and neither is a multiple",
    ),
]


@pytest.mark.parametrize(("sink", "words"), REFUSED)
def test_what_does_not_fit_is_refused_with_both_values(sink: Layout, words: str) -> None:
    with pytest.raises(FerryError, match=words) as refused:
        plan(BASE, 2, sink, 2)
    assert refused.value.code is Code.LAYOUT_MISMATCH


RANKS_REFUSED = [
    (plane("k", 8, 2), 4, "8 heads over 4 ranks needs 2 a rank, the layout has 4"),
    (plane("k", 8, 2), 3, "8 heads over 3 ranks divides neither way, the layout has 4"),
    (plane("k", 8, 8), 12, "8 heads over 12 ranks divides neither way, the layout has 1"),
    (plane("k", 2, 1), 4, "2 heads over 4 ranks needs 1 a rank, the layout has 2"),
    (plane("k", 2, 1), 0, "has 0 ranks"),
    (plane("k", None, 1), -1, "has -1 ranks"),
]


@pytest.mark.parametrize(("one", "ranks", "words"), RANKS_REFUSED)
def test_ranks_that_cannot_share_the_heads_are_refused(one: Plane, ranks: int, words: str) -> None:
    with pytest.raises(FerryError, match=words) as refused:
        check_ranks(two_planes(one), ranks, "sink")
    assert refused.value.code is Code.LAYOUT_MISMATCH
    whole = two_planes(plane("k", one.heads_total, 1))
    with pytest.raises(FerryError, match=words):
        plan(whole, 1, two_planes(one), ranks)
    with pytest.raises(FerryError, match=words):
        plan(two_planes(one), ranks, whole, 1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_fit_exactly_where_heads_divide(heads: int, ranks: int) -> None:
    each = share(heads, ranks)
    for wrong in {1, heads} - {each}:
        with pytest.raises(FerryError):
            check_ranks(two_planes(plane("k", heads, 1, shape=(wrong, 3))), ranks, "source")
    if each is not None:
        check_ranks(two_planes(plane("k", heads, ranks)), ranks, "source")


def test_a_plan_of_160_planes_is_cheap() -> None:
    source, sink = layout([8] * 160, 8), layout([8] * 160, 4)
    began_s = time.perf_counter()
    for _ in range(10):
        parts = plan(source, 8, sink, 4)
    assert time.perf_counter() - began_s < 2.0  # about 10 ms in truth
    assert len(parts) == 8


def slices_of(parts: tuple[Part, ...]) -> int:
    """How many are kept: those that stand alike are the same ones."""
    of_parts = {id(one): one for part in parts for one in (part.source_slices, part.sink_slices)}
    return sum(map(len, of_parts.values()))


def test_parts_whose_slices_stand_alike_share_them() -> None:
    """It was a slice for each plane and pair of ranks, twice: 131,072 in 10 MiB for these."""
    parts = plan(layout([64] * 1024, 64), 64, layout([64] * 1024, 32), 32)
    assert len(parts) == 64
    assert slices_of(parts) == 2 * 1024  # the first head of two, which is a source's only one, too


LARGE = [  # heads, planes, ranks of both sides
    (64, 1024, 1, 64),
    (64, 1024, 64, 1),
    (128, 512, 64, 1),
    (192, 256, 64, 48),
    (4032, 256, 64, 63),
]


@pytest.mark.parametrize(("heads", "planes", "source_ranks", "sink_ranks"), LARGE)
def test_what_models_need_is_no_plan_too_large(
    heads: int, planes: int, source_ranks: int, sink_ranks: int
) -> None:
    """128 layers are 256 planes, and 512 where each has scales; a group has 64 ranks at most."""
    one, two = layout([heads] * planes, source_ranks), layout([heads] * planes, sink_ranks)
    assert slices_of(plan(one, source_ranks, two, sink_ranks)) <= CELLS_MAX


TOO_LARGE = [
    ([4032] * 1024, "1024 planes are cut in .* slices, over 131072"),
    ([4032 * (1 + number) for number in range(33)], "33 different heads_total .* over 4096 pieces"),
]


@pytest.mark.parametrize(("planes", "words"), TOO_LARGE)
def test_a_plan_that_no_model_needs_is_refused(planes: list[int | None], words: str) -> None:
    with pytest.raises(FerryError, match=words) as refused:
        plan(layout(planes, 64), 64, layout(planes, 63), 63)
    assert refused.value.code is Code.LAYOUT_MISMATCH
