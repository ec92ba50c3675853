"""The data connections that sinks' daemons open to us: those there are, and those that may come.

A stream of a link has one at a time: a newer one ends those before it. Each costs a thread,
descriptors and buffers, so a peer has so many and no more, those counted that it has a ticket for.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from kvferry_daemon.core.events import Key, StreamKey
from kvferry_proto.errors import exhausted
from kvferry_proto.peer import STREAMS_MAX

CONNECTIONS_MAX = 2048  # two descriptors each
OF_ONE_MAX = 512  # daemons of one key together: they may share it
TICKET_S = 10.0

Slot = tuple[str, int]  # a stream: the boot id of its link, and its number


class _Ticket(NamedTuple):
    whose: str
    connection: int
    until_s: float


class SinkStreams:
    """Knows connections from their tickets on until their threads have ended."""

    def __init__(self) -> None:
        self.connections_max = CONNECTIONS_MAX
        self._open: dict[StreamKey, str] = {}  # and whose
        self._read_for: dict[StreamKey, dict[Key, None]] = {}  # transfers that something left on it
        self._of: dict[Slot, set[StreamKey]] = {}
        self._newest: dict[Slot, int] = {}  # lowest connection that may still come
        self._tickets: OrderedDict[Slot, _Ticket] = OrderedDict()  # the first to expire comes first
        self._held: Counter[str] = Counter()  # connections and tickets

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: StreamKey) -> bool:
        return key in self._open

    def counted(self) -> Counter[str]:
        """How many each sink's daemon has open."""
        return Counter(key.peer for key in self._open)

    def admit(self, key: StreamKey, whose: str, now_s: float) -> bool:
        """Note a ticket for a connection; False if a newer one was named before.

        Raises FerryError(resource_exhausted) if there are too many. It takes the place of an
        earlier ticket of the same stream.
        """
        slot = (key.peer, key.stream)
        if key.connection < self._newest.get(slot, 0):
            return False
        self._drop_expired(now_s)
        before = self._tickets.get(slot)
        ours = before is not None and before.whose == whose
        if self._held[whose] - ours >= OF_ONE_MAX:
            raise exhausted(f"{OF_ONE_MAX} data connections of one daemon", TICKET_S)
        if len(self._open) + len(self._tickets) - ours >= self.connections_max:
            raise exhausted(f"{self.connections_max} data connections", TICKET_S)
        self._drop_ticket(slot)
        self._tickets[slot] = _Ticket(whose, key.connection, now_s + TICKET_S)
        self._held[whose] += 1
        self._newest[slot] = key.connection
        return True

    def before(self, key: StreamKey) -> list[StreamKey]:
        """The connections that a newer one of their stream ends."""
        of_slot = self._of.get((key.peer, key.stream), ())
        return sorted(one for one in of_slot if one.connection < key.connection)

    def came(self, key: StreamKey, whose: str) -> bool:
        """It is open; whether it may be. No ticket admits another one under the same number."""
        slot = (key.peer, key.stream)
        ticket = self._tickets.get(slot)
        if ticket is not None and ticket.connection == key.connection:
            self._drop_ticket(slot)
        self._open[key] = whose
        self._of.setdefault(slot, set()).add(key)
        self._held[whose] += 1
        newest = self._newest.get(slot, 0)
        if whose:  # else its link was forgotten, and with it what is newest
            self._newest[slot] = max(newest, key.connection + 1)
        return key.connection >= newest

    def reads(self, key: StreamKey, transfer: Key) -> bool:
        """Note that blocks of a transfer are read for it; False if it is not open."""
        if key not in self._open:
            return False
        self._read_for.setdefault(key, {})[transfer] = None
        return True

    def ended(self, key: StreamKey) -> dict[Key, None]:
        """No thread of it is left; return the transfers that may wait for that."""
        whose = self._open.pop(key, None)
        if whose is None:
            return {}
        self._let_go(whose)
        slot = (key.peer, key.stream)
        self._of[slot].discard(key)
        if not self._of[slot]:
            del self._of[slot]
        return self._read_for.pop(key, {})

    def forget_transfer(self, transfer: Key, keys: Iterable[StreamKey]) -> None:
        """It is gone, and was served on these connections."""
        for key in keys:
            if key in self._read_for:
                self._read_for[key].pop(transfer, None)

    def forget(self, boot_id: str) -> list[StreamKey]:
        """A link is over; return its connections, which still have to end. Tickets still count."""
        slots = [(boot_id, stream) for stream in range(STREAMS_MAX)]
        for slot in slots:
            self._newest.pop(slot, None)
        return sorted(key for slot in slots for key in self._of.get(slot, ()))

    def _drop_expired(self, now_s: float) -> None:
        while self._tickets:
            slot, ticket = next(iter(self._tickets.items()))
            if now_s < ticket.until_s:
                return
            self._drop_ticket(slot)

    def _drop_ticket(self, slot: Slot) -> None:
        ticket = self._tickets.pop(slot, None)
        if ticket is not None:
            self._let_go(ticket.whose)

    def _let_go(self, whose: str) -> None:
        self._held[whose] -= 1
        if not self._held[whose]:
            del self._held[whose]
