"""spans: the right bytes, each once, and in an order that does not depend on where blocks lie."""

import itertools
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_daemon.memory.spans import Span, spans
from kvferry_proto.layout import Dtype, Layout, Order, Plane

POOL_BLOCKS = 24


class Case(NamedTuple):
    blocks: list[int]  # of the window, in token order
    base_token: int
    first_token: int
    tokens: int
    block_size: int
    block_bytes: int
    strips: list[tuple[int, int]]

    def spans(self, blocks: list[int] | None = None) -> list[Span]:
        return spans(
            runs_of(self.blocks if blocks is None else blocks),
            base_token=self.base_token,
            first_token=self.first_token,
            tokens=self.tokens,
            block_size=self.block_size,
            block_bytes=self.block_bytes,
            strips=self.strips,
        )


def runs_of(blocks: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and sum(runs[-1]) == block and block % 5:  # neighbours may be two runs as well
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.integers(1, 5))
    strips, end = [], 0
    for token_bytes in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)):
        strips.append((end, token_bytes))
        end += token_bytes * block_size + draw(st.integers(0, 2))  # and padding
    numbers = st.lists(st.integers(0, POOL_BLOCKS - 1), unique=True, min_size=1, max_size=8)
    first = draw(st.integers(0, POOL_BLOCKS - 8))
    blocks = draw(numbers | st.just(list(range(first, first + 8))))
    base = draw(st.integers(0, 3)) * block_size
    held = len(blocks) * block_size
    skip = draw(st.integers(0, held - 1))
    tokens = draw(st.integers(1, held - skip))
    return Case(blocks, base, base + skip, tokens, block_size, end, strips)


def bytes_of(found: list[Span]) -> list[int]:
    return [byte for offset, length in found for byte in range(offset, offset + length)]


def expected_bytes(case: Case) -> list[int]:
    """Block by block: all of it if every token is wanted, else the wanted tokens of each strip."""
    first = case.first_token - case.base_token
    wanted = range(first, first + case.tokens)
    found: list[int] = []
    for index, block in enumerate(case.blocks):
        inside = [t for t in range(case.block_size) if index * case.block_size + t in wanted]
        at = block * case.block_bytes
        if len(inside) == case.block_size:
            found += range(at, at + case.block_bytes)
            continue
        for offset, token_bytes in case.strips:
            for token in inside:
                start = at + offset + token * token_bytes
                found += range(start, start + token_bytes)
    return found


@given(cases())
def test_spans_cover_the_right_bytes_once_and_in_order(case: Case) -> None:
    found = bytes_of(case.spans())
    assert found == expected_bytes(case)
    assert len(found) == len(set(found))


@given(cases())
def test_neighbouring_spans_are_one(case: Case) -> None:
    found = case.spans()
    assert all(length > 0 for _, length in found)
    assert all(sum(a) != b[0] for a, b in itertools.pairwise(found))


@given(cases())
def test_source_and_sink_agree_on_the_order_of_the_bytes(case: Case) -> None:
    """The n-th byte on the wire is the same byte of the same token, wherever its block lies."""
    here = case.blocks
    there = list(range(len(here)))[::-1]
    sent, received = bytes_of(case.spans()), bytes_of(case.spans(there))
    place = dict(zip(here, there, strict=True))
    moved = [place[b // case.block_bytes] * case.block_bytes + b % case.block_bytes for b in sent]
    assert moved == received


# Blocks of 4 tokens: 2 bytes a token, then 1 byte a token, then 4 bytes of padding.
LAYOUT = (4, 16, [(0, 2), (8, 1)])
SHAPES: list[tuple[list[int], int, int, list[Span]]] = [
    ([0, 1, 2], 0, 12, [(0, 48)]),  # neighbours: one span with the padding
    ([5, 1, 2], 0, 12, [(80, 16), (16, 32)]),
    ([0, 1, 2], 1, 2, [(2, 4), (9, 2)]),  # inside a block: one span a strip
    ([0, 1, 2], 4, 3, [(16, 6), (24, 3)]),
    ([0, 1, 2], 2, 8, [(4, 4), (10, 2), (16, 20), (40, 2)]),  # whole, and what touches it
    ([0, 1, 2], 5, 0, []),
]


@pytest.mark.parametrize(("blocks", "first", "tokens", "expected"), SHAPES)
def test_shapes(blocks: list[int], first: int, tokens: int, expected: list[Span]) -> None:
    assert Case(blocks, 100, 100 + first, tokens, *LAYOUT).spans() == expected


@pytest.mark.parametrize(("first", "tokens"), [(7, 2), (19, 2), (7, 14), (20, 1), (0, 1)])
def test_tokens_outside_the_window_are_refused(first: int, tokens: int) -> None:
    with pytest.raises(ValueError, match=r"of a window \[8, 20\)"):
        Case([0, 1, 2], 8, first, tokens, *LAYOUT).spans()


def test_a_part_of_a_block_with_planes_in_both_orders() -> None:
    """Blocks of 4 tokens: 2 heads of 3 bytes head by head, then 2 of 1 byte token by token."""
    k = Plane(name="k", dtype=Dtype.UINT8, shape=(2, 3), order=Order.HND)
    v = Plane(name="v", dtype=Dtype.UINT8, shape=(2, 1))
    layout = Layout(planes=(k, v), block_size_tokens=4)
    assert (layout.places[1].offset_bytes, layout.block_bytes) == (64, 128)

    def found(first: int, tokens: int) -> list[Span]:
        return spans(
            [(1, 1), (0, 1)],
            base_token=0,
            first_token=first,
            tokens=tokens,
            block_size=4,
            block_bytes=128,
            strips=layout.strips,
        )

    assert found(1, 2) == [(128 + 3, 6), (128 + 12 + 3, 6), (128 + 64 + 2, 4)]
    assert found(0, 7) == [(128, 128), (0, 9), (12, 9), (64, 6)]
    assert found(0, 8) == [(128, 128), (0, 128)]
