"""The audit log: one line for each deed, and no more of a kind a second than a log can take."""

import logging
from collections import Counter
from time import monotonic

from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.deeds import Deed, Deeds
from kvferry_daemon.logs import AUDIT, fields

LINES_A_S = 50  # of each kind: a flood of one hides no other
log = logging.getLogger(AUDIT)


class Audit:
    """One a daemon. The event of a line is what was done; all else are its fields."""

    def __init__(self) -> None:
        self._allowed = Allowances(LINES_A_S)
        self._untold: Counter[str] = Counter()
        self.left_out = 0  # deeds that have no line

    def take(self, deeds: Deeds) -> None:
        """Write down what there is."""
        kept, dropped = deeds.take()
        for deed in kept:
            self.tell(deed)
        for what, count in dropped.items():
            self._leave_out(what, count)

    def tell(self, deed: Deed) -> None:
        """Write a deed down, or count it for the next line of its kind."""
        if self._allowed.wait_s(deed.what, monotonic()):
            self._leave_out(deed.what, 1)
            return
        facts = {name: value or None for name, value in deed._asdict().items()}
        facts["attempt"] = deed.attempt
        facts["left_out"] = self._untold.pop(deed.what, None)  # before it
        log.info("%s", facts.pop("what"), extra=fields(**facts))

    def settle(self) -> None:
        """Tell how many were left out of which kind, where no line has come since that tells it."""
        for what in list(self._untold):
            if not self._allowed.wait_s(what, monotonic()):
                log.info("left_out", extra=fields(of=what, left_out=self._untold.pop(what)))

    def _leave_out(self, what: str, count: int) -> None:
        self._untold[what] += count
        self.left_out += count
