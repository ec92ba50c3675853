"""ExtentSet against a plain set of tokens."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_daemon.core.extents import ExtentSet

TOKENS = 40
EXTENTS = st.tuples(st.integers(0, TOKENS), st.integers(0, TOKENS)).filter(lambda e: e[0] < e[1])
STEPS = st.lists(st.tuples(st.booleans(), EXTENTS), max_size=20)


def built(steps: list[tuple[bool, tuple[int, int]]]) -> tuple[ExtentSet, set[int]]:
    extents: ExtentSet = ExtentSet()
    naive: set[int] = set()
    for adds, (first, end) in steps:
        if adds:
            extents.add(first, end)
            naive |= set(range(first, end))
        else:
            extents.remove(first, end)
            naive -= set(range(first, end))
    return extents, naive


@given(steps=STEPS)
def test_holds_the_tokens_of_a_plain_set(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    extents, naive = built(steps)
    assert {token for first, end in extents for token in range(first, end)} == naive
    assert bool(extents) == bool(naive)


@given(steps=STEPS)
def test_extents_are_sorted_and_never_touch(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    extents = list(built(steps)[0])
    assert all(first < end for first, end in extents)
    assert all(one[1] < two[0] for one, two in itertools.pairwise(extents))


@given(steps=STEPS, asked=EXTENTS)
def test_gaps_and_covers(steps: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]) -> None:
    extents, naive = built(steps)
    missing = set(range(*asked)) - naive
    gaps = list(extents.gaps(*asked))
    assert {token for first, end in gaps for token in range(first, end)} == missing
    assert all(one[1] < two[0] for one, two in itertools.pairwise(gaps))
    assert extents.covers(*asked) == (not missing)


@given(steps=STEPS, first=st.integers(0, TOKENS))
def test_prefix_end_is_the_first_token_that_is_missing(
    steps: list[tuple[bool, tuple[int, int]]], first: int
) -> None:
    extents, naive = built(steps)
    end = first
    while end in naive:
        end += 1
    assert extents.prefix_end(first) == end


def test_an_empty_extent_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        ExtentSet().add(3, 3)


def test_extents_may_change_while_gaps_are_walked() -> None:
    extents = ExtentSet()
    extents.add(2, 4)
    for first, end in list(extents.gaps(0, 6)):
        extents.add(first, end)
    assert list(extents) == [(0, 6)]
