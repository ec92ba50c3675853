"""How often somebody may have us work out what of his blocks goes where: that takes a while.

Daemons have few layouts, and what was worked out is kept, so only new ones are counted.
"""

from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.shape import Planned, Shape, Side, pair_of

NEW_MAX = 8  # at once, and then one in NEW_S
NEW_S = 4.0
SHARED_MAX = 16  # of all for whom one answers: at once, and then one in SHARED_S
SHARED_S = 1.0
ALL_A_S = 16.0  # of everybody: an eighth of the loop's time, and as many at once
UNIT_CELLS = 1 << 12  # so many slices more count as one more: 5 ms

ALL = ("", "")
Name = tuple[str, str]  # a source's address, or a peer; in clear, what it says that it is


class Plans:
    """Of all peers and sources, each of them, and all of those for whom one answers."""

    def __init__(self) -> None:
        self.kept = Planned()
        self._each = Allowances(NEW_MAX)
        self._shared = Allowances(SHARED_MAX)
        self._all = Allowances(ALL_A_S)

    def may_make(self, whose: Name, shared: Name, source: Side, sink: Side, now_s: float) -> bool:
        """Whether it may have this plan now. ``shared``: who answers for it, as addresses are free.

        One that is kept is free: a fleet has few, and each of its daemons asks for the same.
        """
        if pair_of(source, sink) in self.kept:
            return True
        taken: list[tuple[Allowances, Name]] = []
        for allowances, name, at in (
            (self._each, whose, now_s / (NEW_S * NEW_MAX)),
            (self._shared, shared, now_s / (SHARED_S * SHARED_MAX)),
            (self._all, ALL, now_s),
        ):
            if allowances.wait_s(name, at):
                for one, of in taken:  # who is refused for others' sake has lost nothing
                    one.owe(of, -1.0)
                return False
            taken.append((allowances, name))
        return True

    def make(self, source: Side, sink: Side) -> tuple[Shape, Shape]:
        """The plan that it may have; FerryError(layout_mismatch) where the two do not fit.

        How large it is, and how long it took by that, is known only now.
        """
        before = self.kept.made
        try:
            return self.kept.shapes(source, sink)
        finally:
            if self.kept.made > before:
                cells = self.kept.cells_of(pair_of(source, sink))
                self._all.owe(ALL, cells // UNIT_CELLS)
