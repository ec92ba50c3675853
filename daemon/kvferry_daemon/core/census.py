"""How many transfers are in which state, counted as they change, so that nobody has to walk over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from kvferry_daemon.core.events import Key
from kvferry_proto.states import Role, StallReason, State

if TYPE_CHECKING:
    from kvferry_daemon.core.node import AnyTransfer


class Kind(NamedTuple):
    """What transfers are counted by."""

    role: Role
    state: State
    stall: StallReason | None
    settled: bool


class Census:
    """One a node: of the transfers in its books."""

    def __init__(self) -> None:
        self.kinds: Counter[Kind] = Counter()
        self._kind_of: dict[Key, Kind] = {}

    def changed(self, transfer: AnyTransfer) -> None:
        """A transfer is new, or has handled an event."""
        key, kind = transfer.key, _kind(transfer)
        before = self._kind_of.get(key)
        if kind != before:
            self.gone(key)
            self._kind_of[key] = kind
            self.kinds[kind] += 1

    def gone(self, key: Key) -> None:
        """It is in the books no more."""
        before = self._kind_of.pop(key, None)
        if before is not None:
            self.kinds[before] -= 1
            if not self.kinds[before]:
                del self.kinds[before]

    @property
    def unsettled(self) -> int:
        """Transfers from which a daemon that stops now takes something away."""
        return sum(count for kind, count in self.kinds.items() if not kind.settled)

    def check(self, transfers: Iterable[AnyTransfer]) -> None:
        """Raise AssertionError unless this is what counting them gives. Walks them all."""
        counted = Counter(_kind(transfer) for transfer in transfers)
        assert counted == self.kinds, (counted, self.kinds)


def _kind(transfer: AnyTransfer) -> Kind:
    return Kind(transfer.key.role, transfer.state, transfer.stall, transfer.settled)
