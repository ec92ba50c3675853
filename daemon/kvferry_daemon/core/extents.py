"""Sets of tokens as sorted, disjoint, half-open extents."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class ExtentSet:
    """A set of tokens; every operation costs the extents it touches, not the tokens."""

    __slots__ = ("_ends", "_firsts")

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (first, end) in order."""
        return zip(tuple(self._firsts), tuple(self._ends), strict=True)

    def __bool__(self) -> bool:
        return bool(self._firsts)

    def add(self, first: int, end: int) -> None:
        """Put [first, end) in, merging neighbours."""
        assert first < end, (first, end)
        low = bisect_left(self._ends, first)
        high = bisect_right(self._firsts, end)
        if low < high:
            first = min(first, self._firsts[low])
            end = max(end, self._ends[high - 1])
        self._firsts[low:high] = [first]
        self._ends[low:high] = [end]

    def remove(self, first: int, end: int) -> None:
        """Take [first, end) out; tokens that are not in are no error."""
        low = bisect_right(self._ends, first)
        high = bisect_left(self._firsts, end)
        if low >= high:
            return
        keep = [(self._firsts[low], first), (end, self._ends[high - 1])]
        kept = [(one, two) for one, two in keep if one < two]
        self._firsts[low:high] = [one for one, _ in kept]
        self._ends[low:high] = [two for _, two in kept]

    def gaps(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of [first, end) that are not in the set, in order."""
        for index in range(bisect_right(self._ends, first), len(self._firsts)):
            if self._firsts[index] >= end:
                break
            if first < self._firsts[index]:
                yield first, self._firsts[index]
            first = self._ends[index]
        if first < end:
            yield first, end

    def covers(self, first: int, end: int) -> bool:
        """Whether every token of [first, end) is in the set."""
        index = bisect_right(self._firsts, first) - 1
        return index >= 0 and end <= self._ends[index]

    def prefix_end(self, first: int) -> int:
        """The end of the gapless run that starts at ``first``; ``first`` itself if it is out."""
        index = bisect_right(self._firsts, first) - 1
        return max(first, self._ends[index]) if index >= 0 else first
