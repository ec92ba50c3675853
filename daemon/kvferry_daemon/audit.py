"""The audit log: one line for each deed, and no more of a kind a second than a log can take."""

import json
import logging
import re
from collections import Counter
from time import monotonic

from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.deeds import Deed

LINES_A_S = 50  # of each kind: a flood of one hides no other
PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)
log = logging.getLogger("kvferry.audit")


class Audit:
    """One a daemon. A line has `key=value` pairs; the record has the same as ``audit``."""

    def __init__(self) -> None:
        self._allowed = Allowances(LINES_A_S)
        self._left_out: Counter[str] = Counter()

    def tell(self, deed: Deed) -> None:
        """Write a deed down, or count it for the next line of its kind."""
        if self._allowed.wait_s(deed.what, monotonic()):
            self._left_out[deed.what] += 1
            return
        facts = {name: value for name, value in deed._asdict().items() if value not in ("", None)}
        if left_out := self._left_out.pop(deed.what, 0):
            facts["left_out"] = left_out  # before it
        line = " ".join(f"{name}={_plain(str(value))}" for name, value in facts.items())
        log.info("%s", line, extra={"audit": facts})


def _plain(value: str) -> str:
    """As it is, or as a JSON string: it may be a stranger's."""
    return value if PLAIN.fullmatch(value) else json.dumps(value)
