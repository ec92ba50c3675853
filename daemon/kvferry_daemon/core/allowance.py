"""How often somebody may do something: so many a second, and as many at once after a quiet second."""

from collections.abc import Hashable

NAMES_MAX = 4096  # known at once; who is forgotten begins anew, with a whole second's


class Allowances:
    """One each; a name that was seen first is forgotten first."""

    def __init__(self, a_s: float) -> None:
        self.a_s = a_s
        self._left: dict[Hashable, list[float]] = {}  # what was left, and when

    def wait_s(self, name: Hashable, now_s: float) -> float:
        """Take one: 0 if there was one, else how long until there is. Every message asks."""
        known = self._left.get(name)
        if known is None:
            known = self._left[name] = [self.a_s, now_s]
            if len(self._left) > NAMES_MAX:
                del self._left[next(iter(self._left))]
        left = known[0] + (now_s - known[1]) * self.a_s
        left = min(left, self.a_s)
        known[1] = now_s
        if left >= 1.0:
            known[0] = left - 1.0
            return 0.0
        known[0] = left
        return (1.0 - left) / self.a_s

    def is_over(self, name: Hashable, now_s: float) -> bool:
        """Whether there is none just now; takes none."""
        known = self._left.get(name)
        return known is not None and known[0] + (now_s - known[1]) * self.a_s < 1.0

    def owe(self, name: Hashable, more: float) -> None:
        """What was taken turned out to be worth so many more; there may be fewer than none left."""
        self._left[name][0] -= more
