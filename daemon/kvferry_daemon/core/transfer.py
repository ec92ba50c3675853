"""What both sides of a transfer share: how an event is handled, and how a life ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from kvferry_daemon.core.events import (
    Effect,
    Fail,
    Free,
    Granted,
    Joined,
    Key,
    Promised,
    Quarantine,
    Release,
    Slept,
    Tick,
    Timing,
    WantBlocks,
    WorkerLost,
)
from kvferry_daemon.core.history import History
from kvferry_daemon.core.pool import Lease
from kvferry_daemon.core.ranks import Ranks
from kvferry_daemon.core.records import RankRecord, TransferRecord
from kvferry_daemon.core.shape import whole_blocks
from kvferry_daemon.core.window import Window
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.states import TERMINAL, StallReason, State
from kvferry_proto.worker import BoardSlot, Snapshot

NEVER_S = float("inf")
SHOWN = set(Snapshot.model_fields)  # one for all snapshots: of its own each would have 2 KiB
Aux = dict[str, int | float | str | bytes]


@dataclass(frozen=True, slots=True)
class Opening:
    """What a transfer is opened with; the same call again must bring the same.

    The first rank of a group opens it, for all of them; the others join.
    """

    key: Key
    session: str
    pool_id: str
    window_tokens: int
    block_size_tokens: int
    start_tokens: int = 0
    source: str | None = None  # sink only: the source daemon's address; None is this daemon
    max_tokens: int | None = None  # sink only: whole mode, and how much it reserves
    aux_names: tuple[str, ...] = ()
    chunk_tokens: int = 128  # sink only: a multiple of the block size
    rank: int = 0
    world_size: int = 1
    traceparent: str | None = None


class Transfer:
    """One side of one attempt. Only ``handle`` changes it.

    ``LIVE`` and ``ENDED`` are the table of moves: which method an event has in a live and in a
    terminal state. An event without an entry is absorbed. A method that refuses its event raises
    FerryError before it changes anything.
    """

    LIVE: ClassVar[dict[type, Callable[[Any, Any], None]]]
    ENDED: ClassVar[dict[type, Callable[[Any, Any], None]]]

    def __init__(self, opening: Opening, timing: Timing, now_s: float) -> None:
        self.opening = opening
        self.key = opening.key
        self.timing = timing
        self.now_s = self.opened_s = self.progress_s = now_s
        self.state = State.BOOTSTRAPPING
        self.stall: StallReason | None = None
        self.error: ErrorInfo | None = None
        self.version = 0  # the snapshot number
        self.history = History(now_s)
        self.ranks = Ranks(opening.world_size, self._first_level)
        self.ranks.join(opening.rank, opening.session)
        self.window = Window(opening.start_tokens, opening.block_size_tokens, opening.world_size)
        self.sent_tokens = self.partial_sent_tokens = opening.start_tokens
        self.last_resume_at = -1
        self.total_tokens: int | None = None
        self.available_tokens = 0
        self.aux: Aux | None = None
        self.shape = whole_blocks(opening.block_size_tokens, opening.world_size)
        self.quarantined = False
        self._join_by_s = now_s + timing.stall_s
        self._ended_s = NEVER_S
        self._wanted = 0
        self._urgent = False
        self._promised_blocks = 0
        self._effects: list[Effect] = []
        self._seen: tuple[object, ...] = ()
        self._shown: list[Snapshot | None] = [None] * opening.world_size
        self.slots: dict[int, BoardSlot] = {}  # of the status board, by rank

    @property
    def _first_level(self) -> int:
        """The level that a rank begins with."""
        raise NotImplementedError

    @property
    def released(self) -> bool:
        """Whether no worker touches a block any more, or all are dead."""
        return self.ranks.released

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in TERMINAL

    @property
    def target_tokens(self) -> int:
        """The edge up to which the window may be topped up."""
        raise NotImplementedError

    @property
    def wake_at_s(self) -> float:
        """When the next Tick is due at the latest."""
        raise NotImplementedError

    @property
    def forgettable(self) -> bool:
        """Whether nothing is left to do, so that a tombstone can take its place."""
        raise NotImplementedError

    @property
    def settled(self) -> bool:
        """Whether a daemon that stops now takes nothing away from anybody."""
        return self.ended and not self.window.blocks

    def handle(self, event: object) -> list[Effect]:
        """Apply one event and return what must now be done, in order."""
        move = (self.ENDED if self.ended else self.LIVE).get(type(event))
        if move is None:
            return []  # late events are ordinary races, not mistakes
        move(self, event)
        if not self.ended:
            self._settle()
        if self.ended:
            self._settle_ended()
        self._publish()
        seen = self._visible()
        if seen != self._seen:
            self._seen = seen
            self.version += 1
        # Who gives blocks back and wants others asks first. A source would else lose its last
        # block to one whose sink waits for room that this one's sink holds: neither could go on.
        effects = sorted(self._effects, key=lambda effect: type(effect) is not WantBlocks)
        self._effects = []
        return effects

    def snapshot(self, rank: int = 0) -> Snapshot:
        """Everything a worker may know at this moment; built once for each number."""
        shown = self._shown[rank]
        if shown is None or shown.snapshot != self.version:
            shown = self._shown[rank] = self._snapshot(rank)
        return shown

    def _snapshot(self, rank: int) -> Snapshot:
        state, stall, sent_tokens = self._ask
        return Snapshot.model_construct(
            SHOWN,
            role=self.key.role,
            transfer_id=self.key.transfer_id,
            attempt=self.key.attempt,
            rank=rank,
            world_size=self.ranks.size,
            snapshot=self.version,
            state=state,
            stall=stall,
            error=self.error,
            start_tokens=self.opening.start_tokens,
            sent_tokens=sent_tokens,
            partial_sent_tokens=self.partial_sent_tokens,
            last_resume_at=self.last_resume_at,
            total_tokens=self.total_tokens,
            available_tokens=self._available_to(rank),
            base_tokens=self.window.base_tokens,
            allocated_tokens=self.window.allocated_tokens,
            target_tokens=self.target_tokens,
            runs=self.window.runs(rank),
            aux=self.aux,
            slot=self.slots.get(rank),
        )

    def take_slot(self, rank: int, slot: BoardSlot) -> None:
        """A rank is on the status board from now on, and its snapshots say where."""
        self.slots[rank] = slot
        self._shown[rank] = None

    def drop_slots(self) -> dict[int, BoardSlot]:
        """No rank is on the board any more; return the slots that they had."""
        slots, self.slots = self.slots, {}
        for rank in slots:
            self._shown[rank] = None
        return slots

    @property
    def _ask(self) -> tuple[State, StallReason | None, int]:
        """State, stall reason and sent_tokens as workers are shown them."""
        return self.state, self.stall, self.sent_tokens

    def _publish(self) -> None:
        """Decide what workers are shown from now on."""

    def _available_to(self, _rank: int) -> int:
        """The available tokens that a rank is shown."""
        return self.available_tokens

    def _visible(self) -> tuple[object, ...]:
        """What a snapshot shows, as far as it can change; runs change with base or blocks."""
        window = self.window
        return (
            *self._ask,
            self.partial_sent_tokens,
            self.last_resume_at,
            self.total_tokens,
            self.available_tokens,
            window.base_tokens,
            window.blocks,
            self.aux is None,
        )

    def mark(self) -> tuple[object, ...]:
        """What must last, in a form that is cheap to compare; see ``record``."""
        window = self.window
        return (
            self.version,
            self.state,
            self.sent_tokens,
            self.last_resume_at,
            window.base_tokens,
            window.blocks,
            self.ranks.mark,
            self.quarantined,
            self.available_tokens,
            self.total_tokens,
        )

    def record(self) -> TransferRecord:
        """Where this transfer is, for a later life of the daemon."""
        return TransferRecord.model_construct(**self._record())

    def _record(self) -> dict[str, Any]:
        return {
            "kind": "transfer",
            "version": self.version,
            "state": self.state,
            "error": self.error,
            "sent_tokens": self.sent_tokens,
            "partial_sent_tokens": self.partial_sent_tokens,
            "last_resume_at": self.last_resume_at,
            "total_tokens": self.total_tokens,
            "available_tokens": self.available_tokens,
            "base_tokens": self.window.base_tokens,
            "leases": [(one.lease_id, *one.run) for one in self.window.leases],
            "ranks": [RankRecord.model_construct(**one) for one in self.ranks.rows()],
            "quarantined": self.quarantined,
            "ended_s": self._ended_s if self.ended else None,
        }

    def take_up(self, record: TransferRecord, leases: tuple[Lease, ...], aux: Aux | None) -> None:
        """Go on where an earlier life of the daemon was; before any event."""
        self.version = record.version
        self.state = record.state
        self.error = record.error
        self.sent_tokens = record.sent_tokens
        self.partial_sent_tokens = record.partial_sent_tokens
        self.last_resume_at = record.last_resume_at
        self.total_tokens = record.total_tokens
        self.available_tokens = record.available_tokens
        self.aux = aux
        self.window = Window(
            record.base_tokens, self.opening.block_size_tokens, self.opening.world_size
        )
        self.window.add(leases)
        self.ranks.take_up(record.ranks)
        self.quarantined = record.quarantined
        if record.ended_s is not None:
            self._ended_s = min(record.ended_s, self.now_s)
        self._seen = self._visible()

    def _settle(self) -> None:
        """Draw the conclusions that follow from the counters alone, while live."""
        raise NotImplementedError

    def _settle_ended(self) -> None:
        """The same once the state is terminal: draining, freeing, telling the other side."""
        raise NotImplementedError

    def _on_end(self) -> None:
        """What a side does once, at its end."""
        raise NotImplementedError

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def _progressed(self) -> None:
        self.progress_s = self.now_s

    def _want(self, blocks: int, *, whole: bool = False, urgent: bool = False) -> None:
        if (blocks, urgent) != (self._wanted, self._urgent):
            self._wanted, self._urgent = blocks, urgent
            self._emit(WantBlocks(blocks * self.ranks.size, whole, urgent, self.ranks.size))

    def _on_granted(self, event: Granted) -> None:
        blocks = self.window.add(event.leases)
        self._wanted = max(0, self._wanted - blocks)
        if event.promised:
            self._promised_blocks -= blocks
        self._progressed()

    def _end(self, state: State, error: ErrorInfo | None = None) -> None:
        """The one way into a terminal state."""
        self.state = state
        self.error = error
        self.stall = None
        self._ended_s = self.now_s
        self._want(0)
        self._on_end()

    def _fail(self, code: Code, message: str, retry_after_s: float | None = None) -> None:
        missing = self.ranks.missing
        if missing and code is not Code.RANK_MISSING:
            which = ", ".join(map(str, missing))
            message = f"{message}; of {self.ranks.size} ranks, {which} had not come"
        self._end(State.FAILED, ErrorInfo.of(code, message, retry_after_s))

    def _free_all(self) -> None:
        leases = self.window.clear()
        if leases:
            self._emit(Free(leases))
        self.quarantined = False
        self.stall = None

    def _quarantine(self) -> None:
        if not self.quarantined and self.window.blocks:
            self.quarantined = True
            self._emit(Quarantine(self.window.leases))

    # --- moves that both sides have ---

    def _on_tick(self, event: Tick) -> None:
        self.now_s = event.now_s

    def _on_slept(self, event: Slept) -> None:
        self.progress_s += event.for_s
        self._join_by_s += event.for_s

    def _on_promised(self, event: Promised) -> None:
        self._promised_blocks += event.blocks // self.ranks.size

    def _on_joined(self, event: Joined) -> None:
        self.ranks.join(event.rank, event.session)
        self._progressed()

    def _on_joined_ended(self, event: Joined) -> None:
        """It comes to hear how it ended, and was never shown a block."""
        self.ranks.join(event.rank, event.session)
        self.ranks.let_go(event.rank)

    def _on_fail(self, event: Fail) -> None:
        self._fail(event.code, event.message, event.retry_after_s)

    def _on_release_ended(self, event: Release) -> None:
        self.ranks.let_go(event.rank)

    def _on_worker_lost(self, event: WorkerLost) -> None:
        if event.dead:
            self.ranks.let_go(event.rank)
        self._fail(Code.WORKER_LOST, self._by(event.rank) + event.message)

    def _on_worker_lost_ended(self, event: WorkerLost) -> None:
        if event.dead:
            self.ranks.let_go(event.rank)  # else it may come back, to act as the others did

    def _by(self, rank: int) -> str:
        """Names a rank where there are several."""
        return f"rank {rank} of {self.ranks.size}: " if self.ranks.size > 1 else ""

    @property
    def _stalled_at_s(self) -> float:
        stalled_s = self.progress_s + self.timing.stall_s
        return stalled_s if self.ranks.complete else min(stalled_s, self._join_by_s)

    def _fail_if_stalled(self) -> None:
        missing = self.ranks.missing
        if missing and self.now_s >= self._join_by_s:
            which = ", ".join(map(str, missing))
            waited = f"{self.timing.stall_s:g} s"
            message = f"of {self.ranks.size} ranks, {which} did not come within {waited}"
            self._fail(Code.RANK_MISSING, message)
            return
        waited_s = self.now_s - self.progress_s
        if waited_s >= self.timing.stall_s:
            why = self.stall or "moving"
            message = f"no progress for {waited_s:.1f} s, {why}, state {self.state.name}"
            self._fail(Code.STALLED, message)
