"""How often somebody may do something: so many a second, and as many at once after a quiet second."""

from collections.abc import Hashable

NAMES_MAX = 4096  # known at once; who is forgotten begins anew, with a whole second's


class Allowances:
    """One each; a name that was seen first is forgotten first."""

    def __init__(self, a_s: float) -> None:
        self.a_s = a_s
        self._left: dict[Hashable, tuple[float, float]] = {}  # what was left, and when

    def wait_s(self, name: Hashable, now_s: float) -> float:
        """Take one: 0 if there was one, else how long until there is."""
        left, at_s = self._left.get(name, (self.a_s, now_s))
        left = min(self.a_s, left + (now_s - at_s) * self.a_s)
        taken = left >= 1.0
        self._left[name] = (left - taken, now_s)
        if len(self._left) > NAMES_MAX:
            del self._left[next(iter(self._left))]
        return 0.0 if taken else (1.0 - left) / self.a_s

    def owe(self, name: Hashable, more: float) -> None:
        """What was taken turned out to be worth so many more; there may be fewer than none left."""
        left, at_s = self._left[name]
        self._left[name] = (left - more, at_s)
