"""The virtual clock: everything that will happen, in order, in one heap."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

STEPS_MAX = 100_000  # a world that needs more goes round in circles


class Endless(AssertionError):
    """Things happen without end."""


class Clock:
    """Two things at the same moment happen in the order in which they were put down."""

    __slots__ = ("_count", "_due", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, at_s: float, do: Callable[..., Any], *args: Any) -> None:
        """Let ``do(*args)`` happen at ``at_s``, or now if that is past."""
        self._count += 1
        heappush(self._due, (max(at_s, self.now_s), self._count, do, args))

    def after(self, wait_s: float, do: Callable[..., Any], *args: Any) -> None:
        """Let ``do(*args)`` happen in ``wait_s``."""
        self._count += 1
        heappush(self._due, (self.now_s + wait_s, self._count, do, args))

    def run(self, until_s: float, done: Callable[[], bool]) -> bool:
        """Let things happen until ``done()`` or ``until_s``; say whether it is done."""
        due = self._due
        most = self._count + STEPS_MAX
        while due and due[0][0] <= until_s:
            if done():
                return True
            if self._count > most:
                raise Endless(f"{STEPS_MAX} steps, and it is only {self.now_s:.6f} s")
            self.now_s, _, do, args = heappop(due)
            do(*args)
        if done():
            return True
        self.now_s = until_s
        return False
