"""The audit log: one line for each deed, and no more of a kind a second than a log can take."""

import logging
from collections import Counter
from time import monotonic

from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.deeds import Deed
from kvferry_daemon.logs import AUDIT, fields

LINES_A_S = 50  # of each kind: a flood of one hides no other
log = logging.getLogger(AUDIT)


class Audit:
    """One a daemon. The event of a line is what was done; all else are its fields."""

    def __init__(self) -> None:
        self._allowed = Allowances(LINES_A_S)
        self._left_out: Counter[str] = Counter()

    def tell(self, deed: Deed) -> None:
        """Write a deed down, or count it for the next line of its kind."""
        if self._allowed.wait_s(deed.what, monotonic()):
            self._left_out[deed.what] += 1
            return
        facts = {name: value or None for name, value in deed._asdict().items()}
        facts["attempt"] = deed.attempt
        facts["left_out"] = self._left_out.pop(deed.what, None)  # before it
        log.info("%s", facts.pop("what"), extra=fields(**facts))
