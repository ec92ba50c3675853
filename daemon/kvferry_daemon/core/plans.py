"""How often another daemon may have us work out what of its blocks goes where: that takes a while.

Daemons have few layouts, and what was worked out is kept, so only new ones are counted.
"""

from collections import OrderedDict

from kvferry_daemon.core.allowance import NAMES_MAX, Allowances
from kvferry_daemon.core.shape import Side

NEW_MAX = 8  # at once, and then one in NEW_S: a plan takes up to a second
NEW_S = 4.0
KNOWN_MAX = 64  # of one daemon: these are free

Pair = tuple[bytes, int, bytes, int]


class Plans:
    """What each daemon has asked for lately; those that asked first are forgotten first."""

    def __init__(self) -> None:
        self._new = Allowances(NEW_MAX)
        self._known: OrderedDict[str, OrderedDict[Pair, None]] = OrderedDict()

    def may_make(self, whose: str, source: Side, sink: Side, now_s: float) -> bool:
        """Whether it may have this plan now."""
        known = self._known.setdefault(whose, OrderedDict())
        if len(self._known) > NAMES_MAX:
            self._known.popitem(last=False)
        pair = (source.digest, source.ranks, sink.digest, sink.ranks)
        if pair in known:
            known.move_to_end(pair)
            return True
        if self._new.wait_s(whose, now_s / (NEW_S * NEW_MAX)):
            return False
        known[pair] = None
        if len(known) > KNOWN_MAX:
            known.popitem(last=False)
        return True
