"""Who may have how many connections to a socket that listens, and how fast."""

from collections import Counter
from typing import NamedTuple

from kvferry_daemon.core.allowance import Allowances

ANYBODY = ""
MANY = "processes without a number, uid "  # a source of all that one user has elsewhere
BAR_S = 10.0


class Bounds(NamedTuple):
    """Of one socket: of all who connect, and of one of them. MANY may have half of the first."""

    at_once: int
    of_one: int
    a_s: float
    of_one_a_s: float

    def of(self, source: str) -> tuple[int, float]:
        """What this source may have at once, and a second."""
        if source.startswith(MANY):
            return self.at_once // 2, self.a_s / 2
        return self.of_one, self.of_one_a_s


class Crowd:
    """Connections of one socket, by number. Those that are over a bound are never taken in."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._of: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._barred: dict[str, float] = {}  # until when
        self._all = Allowances(bounds.a_s)
        self._each = Allowances(bounds.of_one_a_s)
        self._many = Allowances(bounds.a_s / 2)

    def __len__(self) -> int:
        return len(self._of)

    @property
    def inside(self) -> dict[int, str]:
        """The connections that there are, and who opened each."""
        return dict(self._of)

    def arrived(self, number: int, source: str, now_s: float) -> str:
        """Take a connection in, or say which bound it is over.

        ``source``: who opened it, as far as that is known; nobody knows of one that is empty.
        """
        self.left(number)  # its number was given out again, so it has ended
        bounds, is_known = self.bounds, source != ANYBODY
        at_once, a_s = bounds.of(source)
        rates = self._many if source.startswith(MANY) else self._each
        if self._barred:
            self._barred = {one: at_s for one, at_s in self._barred.items() if now_s < at_s}
        if self.is_barred(source):
            return f"{source}: has to stay away for {BAR_S:g} s"
        if is_known and rates.wait_s(source, now_s):
            return f"{source}: over {a_s:g} connections a second"
        if self._all.wait_s(ANYBODY, now_s):
            return f"over {bounds.a_s:g} connections a second"
        if is_known and self._counts[source] >= at_once:
            return f"{source}: over {at_once} connections at once"
        if len(self._of) >= bounds.at_once:
            return f"over {bounds.at_once} connections at once"
        self._of[number] = source
        self._counts[source] += 1
        return ""

    def bar(self, source: str, now_s: float) -> None:
        """Whoever this is may not come again for a while."""
        if source != ANYBODY:
            self._barred[source] = now_s + BAR_S

    def is_barred(self, source: str) -> bool:
        """Whether it had to stay away when somebody arrived last."""
        return source in self._barred

    def left(self, number: int) -> None:
        """A connection has ended, or was never taken in."""
        source = self._of.pop(number, None)
        if source is not None:
            self._counts[source] -= 1
            if not self._counts[source]:
                del self._counts[source]
