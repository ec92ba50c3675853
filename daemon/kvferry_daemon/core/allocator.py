"""Free blocks as runs of neighbours: taken whole where possible, joined again when given back.

Runs lie in bins by size (powers of two), the last one given back on top. The very last one is kept
at hand outside of the books: a transfer that frees a window and asks for the next gets the same
warm blocks, and that common case costs next to nothing.
"""

from itertools import islice
from typing import NamedTuple, TypeAlias

CLEAN = 0  # tag of blocks that nobody ever had
MIXED = -1  # tag of neighbours that several owners had
SCANNED_RUNS = 32  # how far a bin is searched: bounds the cost of a take in a shattered pool


class Run(NamedTuple):
    """Neighbouring blocks."""

    first_block: int
    blocks: int


TaggedRun: TypeAlias = tuple[Run, int]  # and who had it last: an owner's number, CLEAN or MIXED


class RunAllocator:
    """``take`` and ``give`` cost the runs they touch, whatever the size of the pool."""

    __slots__ = ("_at_hand", "_bins", "_firsts", "_sizes", "_tags", "free_blocks")

    def __init__(self, blocks: int) -> None:
        assert blocks >= 0
        self.free_blocks = blocks
        self._bins: list[dict[int, None]] = [{} for _ in range(blocks.bit_length() + 1)]
        self._sizes: dict[int, int] = {}  # by first block
        self._firsts: dict[int, int] = {}  # by the block behind the last
        self._tags: dict[int, int] = {}  # by first block
        self._at_hand: TaggedRun | None = None
        if blocks:
            self._put(0, blocks, CLEAN)

    @classmethod
    def around(cls, blocks: int, taken: list[Run]) -> "RunAllocator":
        """All that is not taken is free, and has had an owner. ValueError if runs overlap."""
        free = cls(0)
        free._bins = [{} for _ in range(blocks.bit_length() + 1)]
        at = 0
        for run in sorted([*taken, Run(blocks, 0)]):
            if run.first_block < at or run.blocks < 0 or sum(run) > blocks:
                raise ValueError(f"{run} overlaps, or is not in a pool of {blocks} blocks")
            if run.first_block > at:
                free._put(at, run.first_block - at, MIXED)
                free.free_blocks += run.first_block - at
            at = sum(run)
        return free

    def take(self, blocks: int) -> list[TaggedRun]:
        """Take up to ``blocks``: one run if one is long enough, else the longest ones first."""
        at_hand = self._at_hand
        if at_hand is not None and at_hand[0][1] == blocks:
            self._at_hand = None
            self.free_blocks -= blocks
            return [at_hand]
        assert blocks >= 0, blocks
        self._book()
        wanted = min(blocks, self.free_blocks)
        self.free_blocks -= wanted
        taken: list[TaggedRun] = []
        while wanted:
            first = self._find(wanted)
            size = self._sizes.pop(first)
            del self._bins[size.bit_length()][first]
            del self._firsts[first + size]
            tag = self._tags.pop(first)
            use = min(wanted, size)
            if size > use:
                self._put(first + use, size - use, tag)
            taken.append((Run(first, use), tag))
            wanted -= use
        return taken

    def give(self, run: Run, tag: int) -> None:
        """Give blocks back; ``tag`` names who had them last."""
        if self._at_hand is not None:
            self._book()
        self.free_blocks += run[1]
        self._at_hand = (run, tag)

    def _book(self) -> None:
        """Enter the run at hand, joined with its neighbours; used and unused ones stay apart."""
        if self._at_hand is None:
            return
        (first, blocks), tag = self._at_hand
        self._at_hand = None
        end = first + blocks
        size = self._sizes.get(end)
        if size is not None and (self._tags[end] == CLEAN) == (tag == CLEAN):
            tag = self._join(end, size, tag)
            end += size
        left = self._firsts.get(first)
        if left is not None and (self._tags[left] == CLEAN) == (tag == CLEAN):
            tag = self._join(left, first - left, tag)
            first = left
        self._put(first, end - first, tag)

    def runs(self) -> list[Run]:
        """Every free run, by first block."""
        self._book()
        return [Run(first, size) for first, size in sorted(self._sizes.items())]

    def _find(self, wanted: int) -> int:
        """The run to take from: the smallest class with one long enough, else the longest.

        In its class the last one given back comes first.
        """
        sizes, own = self._sizes, wanted.bit_length()
        for first in islice(reversed(self._bins[own]), SCANNED_RUNS):
            if sizes[first] >= wanted:
                return first
        for longer in self._bins[own + 1 :]:
            if longer:
                return next(reversed(longer))
        for shorter in self._bins[own::-1]:
            if shorter:
                return max(islice(reversed(shorter), SCANNED_RUNS), key=sizes.__getitem__)
        raise AssertionError("the count of free blocks is wrong")

    def _put(self, first: int, size: int, tag: int) -> None:
        self._bins[size.bit_length()][first] = None
        self._sizes[first] = size
        self._firsts[first + size] = first
        self._tags[first] = tag

    def _join(self, first: int, size: int, tag: int) -> int:
        """Take a neighbour out of the books; return the tag of the two together."""
        del self._bins[size.bit_length()][first]
        del self._sizes[first]
        del self._firsts[first + size]
        other = self._tags.pop(first)
        return tag if tag == other else MIXED
