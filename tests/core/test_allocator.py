"""RunAllocator: random lives against a plain model, and the preferences one by one."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry_daemon.core.allocator import CLEAN, MIXED, Run, RunAllocator, TaggedRun

BLOCKS = 40


def blocks_of(run: Run) -> range:
    return range(run.first_block, run.first_block + run.blocks)


class FreeBlocks:
    """The model: one tag for every free block, and neighbours joined by walking all of them."""

    def __init__(self, blocks: int) -> None:
        self.tags = dict.fromkeys(range(blocks), CLEAN)
        self.last_given: Run | None = None  # not joined with its neighbours yet

    def give(self, run: Run, tag: int) -> None:
        self.join()
        self.tags |= dict.fromkeys(blocks_of(run), tag)
        self.last_given = run

    def join(self) -> None:
        self.last_given = None
        for run in self.runs():
            tags = {self.tags[block] for block in blocks_of(run)}
            self.tags |= dict.fromkeys(blocks_of(run), tags.pop() if len(tags) == 1 else MIXED)

    def runs(self) -> list[Run]:
        """Free neighbours; those that nobody ever had apart from the others."""
        found: list[Run] = []
        for block in sorted(self.tags):
            if found:
                first, size = found[-1]
                used = self.tags[block] != CLEAN
                if first + size == block and used == (self.tags[first] != CLEAN):
                    found[-1] = Run(first, size + 1)
                    continue
            found.append(Run(block, 1))
        return found

    def sizes_of(self, wanted: int) -> list[int]:
        """The sizes that a take must bring: one run if there is one, else the longest first."""
        if self.last_given is not None and self.last_given.blocks == wanted:
            return [wanted]
        self.join()
        free = sorted(run.blocks for run in self.runs())
        sizes: list[int] = []
        while wanted and free:
            size = min(wanted, free.pop())
            sizes.append(size)
            wanted -= size
        return sizes

    def take(self, taken: list[TaggedRun]) -> None:
        for run, tag in taken:
            assert {self.tags.pop(block) for block in blocks_of(run)} == {tag}
        if taken and taken[0][0] == self.last_given:
            self.last_given = None


class AllocatorLife(RuleBasedStateMachine):
    """Blocks are given back whole, in parts, and by several owners."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = RunAllocator(BLOCKS)
        self.model = FreeBlocks(BLOCKS)
        self.held: list[Run] = []

    @rule(wanted=st.integers(0, 9) | st.integers(0, BLOCKS + 2))
    def take(self, wanted: int) -> None:
        sizes = self.model.sizes_of(wanted)
        taken = self.allocator.take(wanted)
        assert [run.blocks for run, _ in taken] == sizes
        self.model.take(taken)
        self.held += [run for run, _ in taken]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tag=st.sampled_from([CLEAN, MIXED, 1, 2, 3]))
    def give(self, data: st.DataObject, tag: int) -> None:
        first, size = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        use = data.draw(st.integers(1, size))
        if use < size:
            self.held.append(Run(first + use, size - use))
        self.allocator.give(Run(first, use), tag)
        self.model.give(Run(first, use), tag)

    @precondition(lambda self: self.held)
    @rule(tag=st.integers(1, 2))
    def give_back_and_take_again(self, tag: int) -> None:
        run = self.held.pop()
        self.allocator.give(run, tag)
        self.model.give(run, tag)
        taken = self.allocator.take(run.blocks)
        assert taken == [(run, tag)]
        self.model.take(taken)
        self.held.append(run)

    @rule()
    def look_at_the_runs(self) -> None:
        """Not an invariant: looking joins what was given last, which must also go unlooked at."""
        self.model.join()
        assert self.allocator.runs() == self.model.runs()

    @invariant()
    def counts_what_is_free(self) -> None:
        assert self.allocator.free_blocks == len(self.model.tags)


TestAllocatorLife = AllocatorLife.TestCase


def holding_all(blocks: int) -> RunAllocator:
    allocator = RunAllocator(blocks)
    assert allocator.take(blocks) == [(Run(0, blocks), CLEAN)]
    return allocator


def test_a_fresh_pool_gives_one_run() -> None:
    assert [run.blocks for run, _ in RunAllocator(100_000).take(64)] == [64]


def test_what_was_freed_last_is_handed_out_first() -> None:
    allocator = holding_all(100)
    for first in (0, 40, 20):  # not neighbours; the last is neither the lowest nor the highest
        allocator.give(Run(first, 10), 1)
    assert allocator.take(10) == [(Run(20, 10), 1)]
    assert allocator.take(10) == [(Run(40, 10), 1)]


def test_used_blocks_are_handed_out_before_a_long_unused_run_is_cut() -> None:
    allocator = RunAllocator(100)
    allocator.take(20)
    allocator.give(Run(3, 5), 1)
    assert allocator.take(4) == [(Run(3, 4), 1)]


@pytest.mark.parametrize(("tag", "joined"), [(1, 1), (2, MIXED), (MIXED, MIXED)])
def test_neighbours_are_joined_on_both_sides(tag: int, joined: int) -> None:
    allocator = holding_all(10)
    allocator.give(Run(0, 4), 1)
    allocator.give(Run(6, 4), 1)
    allocator.give(Run(4, 2), tag)
    assert allocator.runs() == [Run(0, 10)]
    assert allocator.take(10) == [(Run(0, 10), joined)]


def test_a_mixed_run_stays_mixed_when_it_is_cut() -> None:
    allocator = holding_all(10)
    allocator.give(Run(0, 5), 1)
    allocator.give(Run(5, 5), 2)
    assert allocator.take(3) == [(Run(0, 3), MIXED)]
    assert allocator.take(7) == [(Run(3, 7), MIXED)]


def test_a_shattered_pool_still_gives_all_it_has() -> None:
    """Bins longer than a search: every block comes, none twice."""
    allocator = holding_all(1000)
    for first in range(0, 1000, 4):
        allocator.give(Run(first, 3), 1)
    assert [run.blocks for run, _ in allocator.take(2)] == [2]
    taken = allocator.take(1000)
    assert len(taken) == 250  # 249 whole runs and the rest of the one that was cut
    assert len({block for run, _ in taken for block in blocks_of(run)}) == 748
    assert allocator.free_blocks == 0
