"""What is remembered of ended transfers, so that late messages get the right answer."""

from collections import Counter, OrderedDict
from dataclasses import dataclass

from kvferry_daemon.core.events import Done, Key
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.states import State
from kvferry_proto.worker import Snapshot

TOMBSTONES_MAX = 1 << 14  # about 1 KiB each; beyond it the oldest go early
UNKNOWN_MAX = 1 << 13  # of them, of attempts that nobody here has opened: a peer may name any


@dataclass(frozen=True, slots=True)
class Left:
    """What is kept of a transfer's history, for those who ask why it ended so."""

    records: bytes
    lost: int
    opened_s: float
    block_tokens: int


@dataclass(slots=True)
class Tombstone:
    """The last snapshot of a transfer, and each rank's session: empty for one that never came."""

    snapshot: Snapshot
    sessions: tuple[str, ...]
    until_s: float
    left: Left | None = None  # of a transfer that ended in this life
    sink_daemon: str | None = None  # who pulled it, and may still say that it has arrived

    @property
    def total_tokens(self) -> int | None:
        """How long it was, if anybody has said so."""
        return self.snapshot.total_tokens

    def owner(self, rank: int) -> str | None:
        """The session that a rank belongs to; empty if nobody ever came, None if there was none."""
        if not self.sessions:
            return ""  # of an attempt that nobody here has opened
        return self.sessions[rank] if rank < len(self.sessions) else None

    def shown_to(self, rank: int) -> Snapshot:
        """What a rank is answered."""
        if rank == self.snapshot.rank:
            return self.snapshot
        return self.snapshot.model_copy(update={"rank": rank})


def without_aux(snapshot: Snapshot) -> Snapshot:
    """Nobody asks for the values any more, and they may be as large as 200 tombstones."""
    return snapshot if snapshot.aux is None else snapshot.model_copy(update={"aux": None})


class Tombstones:
    """In the order of their making, which is the order of their expiry."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._stones: OrderedDict[Key, Tombstone] = OrderedDict()
        self._unknown: OrderedDict[Key, None] = OrderedDict()
        self.states: Counter[State] = Counter()  # how many of each: operators ask often

    def __len__(self) -> int:
        return len(self._stones)

    def get(self, key: Key) -> Tombstone | None:
        """The tombstone of exactly this attempt."""
        return self._stones.get(key)

    def snapshots(self) -> list[Snapshot]:
        """What is remembered, oldest first."""
        return [stone.snapshot for stone in self._stones.values()]

    def of(self, transfer_id: str) -> list[Tombstone]:
        """Those of one id, oldest first."""
        return [stone for key, stone in self._stones.items() if key.transfer_id == transfer_id]

    def add(
        self,
        key: Key,
        snapshot: Snapshot,
        sessions: tuple[str, ...],
        now_s: float,
        left: Left | None = None,
        sink_daemon: str | None = None,
    ) -> None:
        """Remember how a transfer ended."""
        self.put(key, Tombstone(snapshot, sessions, now_s + self._keep_s, left, sink_daemon))

    def put(self, key: Key, stone: Tombstone) -> None:
        """Take one up, in the order of their expiry; it replaces what was remembered before."""
        self._drop(key)
        stone.snapshot = without_aux(stone.snapshot)
        self._stones[key] = stone
        if not stone.sessions:
            self._unknown[key] = None
        self.states[stone.snapshot.state] += 1

    def add_unknown(self, key: Key, done: Done, now_s: float) -> None:
        """The sink has ended an attempt that no worker here has opened yet."""
        error = done.error or ErrorInfo.of(Code.SINK_FAILED, "the sink ended it before it began")
        snapshot = Snapshot(
            role=key.role,
            transfer_id=key.transfer_id,
            attempt=key.attempt,
            snapshot=1,
            state=State.FAILED,
            error=error,
        )
        self.add(key, snapshot, (), now_s)

    def on_done(self, key: Key, done: Done) -> bool:
        """A late success corrects a failure that was only a guess (its lease had run out).

        Whether it did.
        """
        stone = self._stones[key]
        error = stone.snapshot.error
        if done.state is not State.SUCCESS or error is None or error.code != Code.LEASE_EXPIRED:
            return False
        self.states[State.FAILED] -= 1
        self.states[State.SUCCESS] += 1
        corrected = {"state": State.SUCCESS, "error": None, "snapshot": stone.snapshot.snapshot + 1}
        stone.snapshot = stone.snapshot.model_copy(update=corrected)
        return True

    def expire(self, now_s: float, at_most: int) -> list[Key]:
        """Forget what is old enough or too much, so many of it; return what was forgotten."""
        gone: list[Key] = []
        while len(self._unknown) > UNKNOWN_MAX and len(gone) < at_most:  # before any of a worker
            gone.append(next(iter(self._unknown)))
            self._drop(gone[-1])
        while self._stones and len(gone) < at_most:
            key, stone = next(iter(self._stones.items()))
            if stone.until_s > now_s and len(self._stones) <= TOMBSTONES_MAX:
                break
            self._drop(key)
            gone.append(key)
        return gone

    def _drop(self, key: Key) -> None:
        stone = self._stones.pop(key, None)
        self._unknown.pop(key, None)
        if stone is not None:
            self.states[stone.snapshot.state] -= 1
