"""Window against a plain list of blocks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_daemon.core.allocator import Run
from kvferry_daemon.core.pool import Lease
from kvferry_daemon.core.window import Window
from kvferry_proto.states import Role

SIZE = 4
RUNS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), min_size=1, max_size=6)


def leases_of(runs: list[tuple[int, int]]) -> list[Lease]:
    return [Lease(number, 1, Role.SINK, Run(*run)) for number, run in enumerate(runs, 1)]


def blocks_of(leases: list[Lease]) -> list[tuple[int, int]]:
    """(lease_id, block) of every block, in token order."""
    return [
        (lease.lease_id, block)
        for lease in leases
        for block in range(lease.run.first_block, sum(lease.run))
    ]


@given(runs=RUNS, base=st.integers(0, 5), drops=st.lists(st.integers(0, 6), max_size=4))
def test_dropping_returns_the_front_blocks_in_token_order(
    runs: list[tuple[int, int]], base: int, drops: list[int]
) -> None:
    window = Window(base * SIZE, SIZE)
    window.add(leases_of(runs))
    naive = blocks_of(leases_of(runs))
    edge = window.edge_tokens
    for drop in drops:
        base += drop
        fronts = window.drop_to(base * SIZE)
        assert blocks_of(fronts) == naive[:drop]
        naive = naive[drop:]
        assert blocks_of(list(window.leases)) == naive
        assert window.base_tokens == base * SIZE
        assert window.allocated_tokens == len(naive) * SIZE
        assert window.edge_tokens == max(edge, base * SIZE)


@given(runs=RUNS, data=st.data())
def test_cover_names_exactly_the_blocks_of_an_extent(
    runs: list[tuple[int, int]], data: st.DataObject
) -> None:
    window = Window(8, SIZE)
    window.add(leases_of(runs))
    first = data.draw(st.integers(8, window.edge_tokens - 1))
    end = data.draw(st.integers(first + 1, window.edge_tokens))
    place = window.cover(first, end - first)
    naive = [block for _, block in blocks_of(leases_of(runs))]
    shown = [block for run in place.runs for block in range(run.first_block, sum(run))]
    assert place.base_tokens == first // SIZE * SIZE
    assert shown == naive[(first - 8) // SIZE : -(-(end - 8) // SIZE)]


@given(runs=RUNS)
def test_runs_are_joined_where_blocks_are_neighbours(runs: list[tuple[int, int]]) -> None:
    window = Window(0, SIZE)
    window.add(leases_of(runs))
    shown = window.runs()
    blocks = [block for first, count in shown for block in range(first, first + count)]
    assert blocks == [block for _, block in blocks_of(leases_of(runs))]
    assert all(sum(one) != two[0] for one, two in itertools.pairwise(shown))


def test_clear_gives_every_lease_up() -> None:
    window = Window(0, SIZE)
    leases = leases_of([(3, 2), (9, 1)])
    window.add(leases)
    assert list(window.clear()) == leases
    assert (window.blocks, window.leases, window.edge_tokens) == (0, (), 0)


def test_a_base_beyond_the_edge_drops_all_and_the_next_block_starts_there() -> None:
    window = Window(0, SIZE)
    window.add(leases_of([(3, 1)]))
    assert len(window.drop_to(12)) == 1
    assert (window.base_tokens, window.edge_tokens) == (12, 12)
    window.add(leases_of([(5, 1)]))
    assert window.cover(12, 4).base_tokens == 12


@pytest.mark.parametrize("base", [1, 3, 6])
def test_windows_start_block_aligned(base: int) -> None:
    with pytest.raises(AssertionError):
        Window(base, SIZE)
    with pytest.raises(AssertionError):
        Window(0, SIZE).drop_to(base)


def test_nothing_outside_of_the_window_is_covered() -> None:
    window = Window(4, SIZE)
    window.add(leases_of([(0, 1)]))
    for first, tokens in ((0, 4), (4, 5), (8, 1)):
        with pytest.raises(AssertionError):
            window.cover(first, tokens)


def test_the_base_never_goes_back() -> None:
    window = Window(8, SIZE)
    with pytest.raises(AssertionError):
        window.drop_to(4)
