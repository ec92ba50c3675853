"""What people and programs did, for the audit log: no secret and no payload is in it."""

from collections import Counter
from typing import NamedTuple

KEPT_MAX = 256  # of a kind, until they are taken; the log has room for fewer
WHY_MAX = 300


class Deed(NamedTuple):
    """Somebody did something, or was not let do it.

    ``user``: uid:gid:pid as the kernel has it, or the name of a peer. ``name``: what it calls itself;
    ``asked``: the kind of the message that was refused, or said by an operator.
    """

    what: str
    user: str
    name: str = ""
    asked: str = ""
    role: str = ""
    transfer_id: str = ""
    attempt: int | None = None
    code: str = ""
    why: str = ""


class Deeds:
    """Deeds that nobody has taken yet. A flood of one kind takes no other's place."""

    def __init__(self) -> None:
        self._kept: list[Deed] = []
        self._of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, deed: Deed) -> None:
        """Keep it, or only count it."""
        self._of[deed.what] += 1
        if self._of[deed.what] <= KEPT_MAX:
            self._kept.append(deed._replace(why=deed.why[:WHY_MAX]))

    def take(self) -> tuple[list[Deed], Counter[str]]:
        """Those that were kept, in order, and how many of each kind were not."""
        kept, self._kept = self._kept, []
        of, self._of = self._of, Counter()
        return kept, +Counter({what: count - KEPT_MAX for what, count in of.items()})
