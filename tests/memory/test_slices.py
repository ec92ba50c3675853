"""Sliced chunks, bit by bit: what every source rank has ends up where every sink rank has it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry_daemon.memory.slices import SlicePlan
from kvferry_proto.layout import Dtype, Order
from kvferry_proto.parts import SideSlice
from slicing import Group, Move, PlaneKind, Window, content, layout_of

BF16 = Dtype.BFLOAT16
LAYERS = [PlaneKind(4, (6,), BF16), PlaneKind(4, (6,), BF16)] * 2
MLA = [PlaneKind(None, (9,), BF16), PlaneKind(None, ())]
KINDS: dict[str, list[PlaneKind]] = {
    "layers": LAYERS,
    "latent": MLA,
    "grouped queries": [PlaneKind(2, (3,), BF16), PlaneKind(2, (5,))],
    "one head": [PlaneKind(1, (3,))],
    "all at once": [
        *LAYERS,
        PlaneKind(2, ()),  # a scale a head
        PlaneKind(None, (2, 3), Dtype.FLOAT32),
        PlaneKind(None, (), Dtype.INT64),
        PlaneKind(4, (2, 3)),
        *MLA,
    ],
}
TOKENS = 300  # of the longest payload


def moved(
    kinds: list[PlaneKind],
    source: tuple[int, int, Order, Window],
    sink: tuple[int, int, Order, Window],
    first: int,
    end: int,
    wires: int,
) -> None:
    """Move tokens [first, end) and compare every byte of every sink rank, and on the wire."""
    made = content(kinds, end)
    one, two, expected = (
        Group(layout_of(kinds, ranks, block, order), ranks, window)
        for ranks, block, order, window in (source, sink, sink)
    )
    one.fill(made, first, end)
    expected.fill(made, first, end)
    before = [bytes(pool) for pool in one.pools]
    move = Move(one, two)
    for part in move.parts:
        for start, tokens in reversed(list(move.chunks(first, end, wires))):
            gathered, scattered = move.extents(part, start, tokens)
            wire = bytearray(gathered.payload_bytes)
            gathered.gather(memoryview(wire))
            assert wire == move.on_the_wire(part, made, start, tokens)
            assert scattered.payload_bytes == gathered.payload_bytes
            scattered.scatter(memoryview(bytes(wire)))
    assert two.pools == expected.pools  # padding, other tokens and other blocks too
    assert [bytes(pool) for pool in one.pools] == before


def window(block: int, base_blocks: int = 0, end: int = TOKENS) -> Window:
    """Scattered runs that hold tokens up to ``end``: neighbours, single ones, and backwards."""
    left, block_at = -(-end // block) - base_blocks, 200
    runs: list[tuple[int, int]] = []
    sizes = [3, 1, 1, 4, 2]
    while left > 0:
        count = min(left, sizes[len(runs) % len(sizes)])
        block_at -= count + (len(runs) % 2)
        runs.append((block_at, count))
        left -= count
    lowest = min(first for first, _ in runs) - 1  # a block in front must stay as it is
    return Window(base_blocks * block, tuple((first - lowest, count) for first, count in runs))


RANKS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 4), (4, 2), (2, 2), (3, 3), (8, 2), (2, 8)]
N, H = Order.NHD, Order.HND


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("source_ranks", "sink_ranks"), RANKS)
@pytest.mark.parametrize(
    ("source_block", "sink_block", "orders"),
    [(16, 128, (N, N)), (128, 16, (H, H)), (16, 128, (H, N)), (128, 16, (N, H)), (16, 16, (N, H))],
)
def test_every_byte_comes_to_its_place(
    name: str,
    source_ranks: int,
    sink_ranks: int,
    source_block: int,
    sink_block: int,
    orders: tuple[Order, Order],
) -> None:
    kinds = KINDS[name]
    if 3 in (source_ranks, sink_ranks):
        kinds = [kind for kind in kinds if kind.heads in (None, 1, 3)] or [PlaneKind(3, (2,))]
    moved(
        kinds,
        (source_ranks, source_block, orders[0], window(source_block)),
        (sink_ranks, sink_block, orders[1], window(sink_block)),
        first=0,
        end=TOKENS - 7,  # the last block is part full, of either size
        wires=5,
    )


@st.composite
def moves(draw: st.DrawFn) -> dict[str, Any]:
    small, times = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    blocks = draw(st.permutations([small, small * times]))
    ranks = [draw(st.sampled_from([1, 2, 4, 8])) for _ in range(2)]
    kind = st.builds(
        PlaneKind,
        st.sampled_from([None, 1, 2, 4, 8]),
        st.lists(st.integers(1, 4), max_size=2).map(tuple),
        st.sampled_from([Dtype.UINT8, BF16, Dtype.FLOAT32, Dtype.INT64]),
    )
    kinds = draw(st.lists(kind, min_size=1, max_size=5))
    kinds *= draw(st.integers(1, 2))  # and layers that are alike
    end = draw(st.integers(1, 60))
    first = draw(st.integers(0, (end - 1) // small)) * small
    sides = []
    for number, block in zip(ranks, blocks, strict=True):
        base = draw(st.integers(0, first // block))
        count = -(-end // block) - base
        held = draw(st.permutations(range(1, count + 3)))[:count]
        runs = tuple((at, 1) for at in held)
        if draw(st.booleans()):
            runs = ((1, count),)
        sides.append((number, block, draw(st.sampled_from(Order)), Window(base * block, runs)))
    return {
        "kinds": kinds,
        "source": sides[0],
        "sink": sides[1],
        "first": first,
        "end": end,
        "wires": draw(st.integers(1, 7)),
    }


@given(moves())
@settings(max_examples=150, deadline=None)
def test_any_two_groups(case: dict[str, Any]) -> None:
    moved(**case)


LAYOUT = layout_of(LAYERS, 2, 8, N)
BOTH = [SideSlice(0, 0, 2), SideSlice(1, 1, 1)]
POOL = memoryview(bytearray(6 * LAYOUT.block_bytes))
WHERE: dict[str, Any] = {"base_token": 16, "first_token": 16, "tokens": 8}


def test_a_chunk_has_no_padding() -> None:
    side = SlicePlan(LAYOUT, BOTH, 4)
    assert side.token_bytes == 3 * 6 * 2
    assert side.chunk_bytes(5) == 5 * 36
    assert side.extent(POOL, [(1, 1)], **{**WHERE, "tokens": 5}).payload_bytes == 180


@pytest.mark.parametrize(
    ("runs", "where", "words"),
    [
        ([(0, 2)], {"first_token": 12}, r"tokens \[12, 20\) of a window \[16, 32\)"),
        ([(0, 2)], {"tokens": 17}, r"tokens \[16, 33\) of a window \[16, 32\)"),
        ([(0, 2)], {"tokens": 0}, r"tokens \[16, 16\)"),
        ([(0, 2)], {"first_token": 18}, "token 18 begins no wire block of 4"),
        ([(0, 2)], {"base_token": 14}, "token 16 begins no wire block of 4"),
        ([(5, 2)], {}, "blocks 5 to 7 of no such pool"),
        ([(-1, 2)], {}, "blocks -1 to 1 of no such pool"),
    ],
)
def test_what_would_be_other_bytes_is_refused_before_any_is_copied(
    runs: list[tuple[int, int]], where: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        SlicePlan(LAYOUT, BOTH, 4).extent(POOL, runs, **{**WHERE, **where})


@pytest.mark.parametrize("one", [(0, 1, 2), (0, -1, 1), (0, 0, 0), (1, 2, 1)])
def test_heads_that_a_plane_has_not_are_refused(one: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="which has 2 heads"):
        SlicePlan(LAYOUT, [SideSlice(*one)], 4)


def test_wire_blocks_that_do_not_fill_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 8 tokens, wire blocks of 3"):
        SlicePlan(LAYOUT, BOTH, 3)


@pytest.mark.parametrize("size", [0, 287, 289])
def test_a_buffer_of_another_size_is_refused(size: int) -> None:
    extent = SlicePlan(LAYOUT, BOTH, 4).extent(POOL, [(1, 1)], **WHERE)
    assert extent.payload_bytes == 288
    for copy in (extent.gather, extent.scatter):
        with pytest.raises(ValueError, match=f"288 bytes in {size}"):
            copy(memoryview(bytearray(size)))
