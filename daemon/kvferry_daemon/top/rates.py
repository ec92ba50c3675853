"""How fast things go: what two looks at a daemon differ in, by the time between them."""

from collections.abc import Iterable
from typing import NamedTuple

from kvferry_proto.control import Status, TransferStatus
from kvferry_proto.states import Role


class Side(NamedTuple):
    """One side of one attempt."""

    role: Role
    transfer_id: str
    attempt: int


def side_of(row: TransferStatus) -> Side:
    """Which side of which attempt a row is of."""
    seen = row.snapshot
    return Side(seen.role, seen.transfer_id, seen.attempt)


class Rates:
    """Per second, between the last two looks; 0 before there are two."""

    def __init__(self) -> None:
        self._boot_id = ""
        self._at_s = 0.0
        self._counters: dict[str, int] = {}
        self._tokens: dict[Side, int] = {}
        self._grown: dict[str, float] = {}
        self._moved: dict[Side, float] = {}

    def look(self, at_s: float, status: Status, rows: Iterable[TransferStatus]) -> None:
        """Take one more look; ``at_s`` is when it was made. Another life counts anew."""
        tokens = {side_of(row): row.snapshot.sent_tokens for row in rows}
        if status.boot_id != self._boot_id:
            self._grown, self._moved = {}, {}
        elif (took_s := at_s - self._at_s) > 0:
            self._grown = {
                name: (count - self._counters.get(name, 0)) / took_s
                for name, count in status.counters.items()
            }
            self._moved = {
                side: (count - self._tokens[side]) / took_s
                for side, count in tokens.items()
                if side in self._tokens
            }
        self._boot_id, self._at_s = status.boot_id, at_s
        self._counters, self._tokens = status.counters, tokens

    def of(self, *counters: str) -> float:
        """How much these counters of the status grew together."""
        return sum(self._grown.get(name, 0.0) for name in counters)

    def tokens_of(self, side: Side) -> float:
        """How many tokens a transfer moved."""
        return self._moved.get(side, 0.0)
