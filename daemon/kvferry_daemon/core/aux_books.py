"""How many bytes of aux values are kept for transfers, and whose they are."""

from __future__ import annotations

from collections import Counter

from kvferry_daemon.core.events import Key
from kvferry_daemon.core.transfer import Aux, Opening, Transfer
from kvferry_proto.errors import FerryError, exhausted

OF_ONE_MAX = 1 << 26  # of one worker's transfers, and of those that come from one daemon
OF_ALL_MAX = 1 << 28
SMALL_BYTES = 1 << 12  # so few always have room: there are only so many transfers
NUMBER_BYTES = 8


class AuxBooks:
    """One a node. A sink's values are its worker's and its source's daemon's, who told them."""

    def __init__(self) -> None:
        self._kept: dict[Key, tuple[int, tuple[str, ...]]] = {}
        self._of: Counter[str] = Counter()  # by session, and by address
        self.kept_bytes = 0

    def check(self, opening: Opening, aux: Aux | None) -> None:
        """Raise FerryError(resource_exhausted) if these would be too many."""
        size = 0 if aux is None else bytes_of(aux)
        if size <= SMALL_BYTES or opening.key in self._kept:  # they do not change
            return
        for whose in _owners(opening):
            if self._of[whose] + size > OF_ONE_MAX:
                raise _too_many(size, OF_ONE_MAX, f"of one {_kind(opening, whose)}")
        if self.kept_bytes + size > OF_ALL_MAX:
            raise _too_many(size, OF_ALL_MAX, "in all")

    def note(self, transfer: Transfer) -> None:
        """A transfer may have aux values now; it keeps them until it is forgotten."""
        if transfer.aux is None or transfer.key in self._kept:
            return
        size = bytes_of(transfer.aux)
        small = size <= SMALL_BYTES  # noted, too: each event of a transfer comes by here
        self._kept[transfer.key] = (0, ()) if small else (size, _owners(transfer.opening))
        self._count(transfer.key, 1)

    def forget(self, key: Key) -> None:
        """The transfer is gone."""
        if key in self._kept:
            self._count(key, -1)
            del self._kept[key]

    def _count(self, key: Key, sign: int) -> None:
        size, owners = self._kept[key]
        self.kept_bytes += sign * size
        for whose in owners:
            self._of[whose] += sign * size
            if not self._of[whose]:
                del self._of[whose]


def bytes_of(aux: Aux) -> int:
    """What they take, but for Python's own."""
    return sum(len(name) + _bytes_of_value(value) for name, value in aux.items())


def _bytes_of_value(value: float | str | bytes) -> int:
    if isinstance(value, str):
        return len(value.encode())
    return len(value) if isinstance(value, bytes) else NUMBER_BYTES


def _owners(opening: Opening) -> tuple[str, ...]:
    return (opening.session,) if opening.source is None else (opening.session, opening.source)


def _kind(opening: Opening, whose: str) -> str:
    return "worker" if whose == opening.session else "source's daemon"


def _too_many(size: int, limit: int, whose: str) -> FerryError:
    return exhausted(f"{size} bytes of aux values are too many: {limit} {whose} are kept at most")
