"""The whole daemon without I/O: events in, effects out. The shell performs them.

``Node.handle`` is the one way in. Every transfer is run from one queue, so that what one transfer
causes in another (a hand-over, blocks that came free) is an event like any other.
"""

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.aux_books import AuxBooks
from kvferry_daemon.core.blocks import PoolBook
from kvferry_daemon.core.boards import Boards
from kvferry_daemon.core.census import Census
from kvferry_daemon.core.chronicle import Chronicle
from kvferry_daemon.core.deeds import Deed, Deeds
from kvferry_daemon.core.effects_of import EffectDesk
from kvferry_daemon.core.here import Here
from kvferry_daemon.core.meters import Meters
from kvferry_daemon.core.notes import Notes
from kvferry_daemon.core.opening import Opened
from kvferry_daemon.core.owed import Loss, Owed
from kvferry_daemon.core.plans import Plans
from kvferry_daemon.core.polls import Polls
from kvferry_daemon.core.restore import restore
from kvferry_daemon.core.session import Session
from kvferry_daemon.core.settings import Settings
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.sink_desk import SinkDesk
from kvferry_daemon.core.source import SourceTransfer
from kvferry_daemon.core.source_desk import SourceDesk
from kvferry_daemon.core.timers import Timers
from kvferry_daemon.core.tombstones import Left, Tombstones
from kvferry_daemon.core.transfer import Aux
from kvferry_daemon.core.worker_desk import WorkerDesk
from kvferry_proto import worker
from kvferry_proto.errors import Code
from kvferry_proto.peer import Ways
from kvferry_proto.states import Role

OWED_A_TURN = 8  # an end costs 60 us here, and as much again where it is performed
EXPIRED_A_TURN = 128  # of what is only to be forgotten
STALE_CLOCK_S = 0.005  # a transfer's clock may lag so much before an event brings it a Tick
OF_CLOCKS = (ev.Tick, ev.Slept)  # which comes first: time that we slept is not its
ANSWERS_A_TURN_BYTES = 1 << 25  # to polls that waited; to those left: nothing yet, so they ask anew
SWEEP_S = 1.0  # at most; see Node.sweep_s
AnyTransfer = SinkTransfer | SourceTransfer


class Node:
    """Transfers, pools, sessions and peers of one daemon, and the queue that runs them."""

    def __init__(
        self, settings: Settings, new_secret: Callable[[], bytes], data_port: int, now_s: float
    ) -> None:
        self.settings = settings
        self.data_port = data_port  # where sinks' data connections come in
        self.ways = Ways()  # by which bytes may go
        self.certificate_sha256: bytes | None = None  # of the data port, where it has one
        self.new_secret = new_secret
        self.now_s = self.started_s = now_s
        self.draining = False
        self.counters: Counter[str] = Counter()
        self.meters = Meters()
        self.chronicle = Chronicle(self, traced=settings.traced)
        self.books: dict[str, PoolBook] = {}
        self.sessions: dict[str, Session] = {}
        self.transfers: dict[ev.Key, AnyTransfer] = {}
        self.current: dict[tuple[Role, str], int] = {}  # the newest attempt of an id
        self.census = Census()
        self.tombstones = Tombstones(settings.timing.tombstone_s)
        self.polls = Polls()
        self.boards = Boards()
        self.aux_books = AuxBooks()
        self.plans = Plans()
        self.effects: list[out.NodeEffect] = []
        self.deeds = Deeds()  # for whoever keeps an audit log
        self._changed: dict[ev.Key, int] = {}
        self._queue: deque[tuple[ev.Key, object]] = deque()
        self.owed = Owed()
        self.owed_a_turn = OWED_A_TURN
        self.timers = Timers()
        # We are woken for every sweep; who comes a whole one too late has not run. Of a sleep two of
        # them are not noticed: with a worker's beat, that must stay below what it is lost after.
        self.sweep_s = min(SWEEP_S, settings.timing.lost_s / 4)
        self._sweep_at_s = now_s + self.sweep_s
        self.crumbs_due: dict[str, float] = {}  # by pool: when blocks were held back long enough
        self.workers = WorkerDesk(self)
        self.sources = SourceDesk(self)
        self.sinks = SinkDesk(self)
        self.here = Here(self)
        self._effects_of = EffectDesk(self)
        self.notes = Notes(self)
        self._moves = self._table()

    def _table(self) -> dict[type, Callable[[Any], None]]:
        """What is done with each event."""
        return {
            out.WorkerCalled: self.workers.on_call,
            out.LockDropped: self.workers.on_lock_dropped,
            out.PoolMade: self.workers.on_pool_made,
            out.PoolNotMade: self.workers.on_pool_not_made,
            out.PoolBroken: self.workers.on_pool_broken,
            out.Zeroed: self._effects_of.on_zeroed,
            out.SourceSaid: self.sinks.on_message,
            out.Probed: self.sinks.on_probed,
            out.SinkStreamUp: self.sinks.on_stream_up,
            out.SinkStreamDown: self.sinks.on_stream_down,
            out.ChunkReceived: self.sinks.on_received,
            out.ChunkMissed: self.sinks.on_missed,
            out.ChunkDrained: self.sinks.on_drained,
            out.SinkSaid: self.sources.on_message,
            out.SourceStreamUp: self.sources.on_stream_up,
            out.SourceStreamDown: self.sources.on_stream_down,
            out.ChunkSent: self.sources.on_sent,
            out.TrustChanged: self.sources.on_trust_changed,
            out.Restored: lambda event: restore(self, event.past),
            out.DrainBegun: self._on_drain_begun,
            out.DrainEnded: self._on_drain_ended,
            out.TransfersAborted: self._on_transfers_aborted,
            out.TimePassed: lambda _event: None,
        }

    # --- the one way in ---

    def handle(self, event: out.NodeEvent, now_s: float) -> list[out.NodeEffect]:
        """Apply one event at ``now_s`` (monotonic seconds); return what is to be done, in order."""
        owed = len(self.owed)
        self._notice_sleep(now_s)
        self.now_s = max(self.now_s, now_s)
        self._run_timers()
        self._moves[type(event)](event)
        if self.owed and (not owed or type(event) is out.TimePassed):
            for key in self.owed.first(self.owed_a_turn):
                self.pay(key)
        self._run_queue()
        self._answer_polls()
        self.sinks.flush()
        self.sources.flush()
        rows = self.notes.take()
        effects, self.effects = self.effects, []
        if shown := self.boards.take():  # before the answers: a board is not older than they are
            effects = [*shown, *effects]
        return [out.Write(rows), *effects] if rows else effects

    def _answer_polls(self) -> None:
        """Only now: what workers see is where things have come to, not a step on the way."""
        changed, self._changed = self._changed, {}
        room_bytes = ANSWERS_A_TURN_BYTES
        for key, version in changed.items():
            for number, poll in self.polls.take_changed(key, version):
                self.timers.unschedule(number)
                room_bytes -= self.workers.answer_poll(poll, is_full=room_bytes <= 0)

    @property
    def wake_at_s(self) -> float:
        """When ``handle(TimePassed)`` is due at the latest."""
        if self.owed:
            return self.now_s
        due_s = self.timers.wake_at_s
        if self.crumbs_due:
            due_s = min(due_s, *self.crumbs_due.values())
        return min(due_s, self._sweep_at_s)

    def check(self) -> None:
        """Raise if the books of a pool do not add up (I1, I8), or the census. For tests."""
        for book in self.books.values():
            book.pool.check()
        self.census.check(self.transfers.values())

    @property
    def idle(self) -> bool:
        """Whether no transfer is live or still draining."""
        return not self.census.unsettled

    # --- running transfers ---

    def post(self, key: ev.Key, event: object) -> None:
        """Let an event reach a transfer, after those that wait already."""
        self._queue.append((key, event))

    def tell(self, keys: dict[ev.Key, None], event: object) -> None:
        """Let an event reach many transfers: some of them in this turn, see ``owed``."""
        self.owed.add(keys, event)

    def pay(self, key: ev.Key) -> None:
        """Tell a transfer what it is owed."""
        for event in self.owed.take(key):
            if isinstance(event, Loss):
                self.workers.tell_loss(key, event)
            else:
                self.apply(key, event)

    def run_now(self, key: ev.Key, event: object) -> None:
        """Apply an event to a transfer at once, so that a refusal reaches the caller."""
        self._run_queue()
        self.apply(key, event)
        self._run_queue()

    def open(self, transfer: AnyTransfer, opened: Opened) -> None:
        """Take a new transfer in."""
        key = transfer.key
        self.notes.opened(transfer, opened)
        self.transfers[key] = transfer
        self.current[key.role, key.transfer_id] = key.attempt
        self.sessions[transfer.opening.session].keys[key] = None
        self.counters[f"{key.role.value}_opened"] += 1
        self.note("opened", self.sessions[transfer.opening.session], key)
        self.chronicle.opened(transfer)
        self.run_now(key, self._tick(transfer))

    def note(self, what: str, session: Session, key: ev.Key, why: str = "") -> None:
        """A worker did something to a transfer."""
        deed = Deed(
            what,
            session.user,
            session.name,
            role=key.role.value,
            transfer_id=key.transfer_id,
            attempt=key.attempt,
            why=why,
        )
        self.deeds.append(deed)

    def _book(self, transfer: AnyTransfer) -> PoolBook:
        return self.books[transfer.opening.pool_id]

    def _arrived(self, transfer: AnyTransfer, event: ev.Granted | ev.TookOver) -> None:
        blocks = sum([lease.run.blocks for lease in event.leases])
        self._book(transfer).on_the_way(transfer.key, -blocks)

    def _run_queue(self) -> None:
        while self._queue:
            self.apply(*self._queue.popleft())

    def check_aux(self, key: ev.Key, aux: Aux | None) -> None:
        """Raise FerryError(resource_exhausted) if a transfer must not keep these beside others."""
        transfer = self.transfers.get(key)
        if aux is not None and transfer is not None and not transfer.ended:
            self.aux_books.check(transfer.opening, aux)

    def apply(self, key: ev.Key, event: object) -> None:
        """Let an event reach a transfer at once."""
        if self.owed:
            self.pay(key)
        transfer = self.transfers.get(key)
        if transfer is None:
            self._effects_of.on_missing(key, event)
            return
        if self.now_s - transfer.now_s > STALE_CLOCK_S and type(event) not in OF_CLOCKS:
            self.apply(key, self._tick(transfer))
            if key not in self.transfers:
                self._effects_of.on_missing(key, event)
                return
        if isinstance(event, (ev.Granted, ev.TookOver)):  # a union would be built each time
            self._arrived(transfer, event)
        version, ended, stall = transfer.version, transfer.ended, transfer.stall
        for effect in transfer.handle(event):
            self._effects_of.perform(transfer, effect)
        if transfer.ended and not ended:
            self.counters[f"{key.role.value}_{transfer.state.name.lower()}"] += 1
            self.meters.ended(transfer)
            self.chronicle.ended(transfer)
        elif self.chronicle.traced and not ended:
            self.chronicle.handled(transfer, event)
        if transfer.version != version or transfer.stall is not stall:  # a group's shows later
            self.meters.moved(transfer)
        if transfer.version != version:
            self._changed[key] = transfer.version
            if transfer.slots:
                self.boards.changed(transfer)
        self.notes.moved(transfer)
        if transfer.aux is not None:
            self.aux_books.note(transfer)
        self.census.changed(transfer)
        if transfer.forgettable and not self._book(transfer).expects(key):
            self._forget(transfer)
        else:
            self.timers.schedule(key, transfer.wake_at_s)

    def _forget(self, transfer: AnyTransfer) -> None:
        key = transfer.key
        sessions = transfer.ranks.sessions
        self.boards.forget(transfer)  # first: a tombstone has no slot
        left = Left(*transfer.history.kept(), transfer.opened_s, transfer.opening.block_size_tokens)
        sink = getattr(transfer, "sink_daemon", None)
        self.tombstones.add(key, transfer.snapshot(), sessions, self.now_s, left, sink)
        self.notes.forgotten(key)
        self.aux_books.forget(key)
        self.notes.stone(key)
        self._effects_of.forget(transfer)
        self.sinks.forget(key)
        if isinstance(transfer, SourceTransfer):
            self.sources.forget(transfer)
        del self.transfers[key]
        self.census.gone(key)
        for secret in sessions:
            if secret in self.sessions:
                self.sessions[secret].keys.pop(key, None)

    # --- time ---

    def _notice_sleep(self, now_s: float) -> None:
        """Time in which this process did not run is nobody's silence: a pause, a moved machine."""
        slept_s = now_s - max(self.now_s, self._sweep_at_s)
        if slept_s < self.sweep_s:
            return
        self.counters["slept"] += 1
        self.workers.on_slept(slept_s)
        self.sinks.on_slept(slept_s)
        self.tell(dict.fromkeys(self.transfers), ev.Slept(slept_s))  # before any timer of theirs

    def _run_timers(self) -> None:
        due = self.timers.take_due(self.now_s)
        for thing in due:  # what is due again at once waits for the next event
            if isinstance(thing, ev.Key):
                self._wake_transfer(thing)
            elif isinstance(thing, int):
                poll = self.polls.take_expired(thing, self.now_s)
                if poll is not None:
                    self.effects.append(out.ToWorker(poll.route, worker.Snapshots(call=poll.call)))
            else:
                self.sinks.tick(str(thing))
        for pool_id in [one for one, at_s in self.crumbs_due.items() if self.now_s >= at_s]:
            self._effects_of.hand_out_crumbs(pool_id)
        if self.now_s >= self._sweep_at_s:
            self._sweep_at_s = self.now_s + self.sweep_s
            self._sweep()

    def _wake_transfer(self, key: ev.Key) -> None:
        transfer = self.transfers.get(key)
        if transfer is None:
            return
        if transfer.wake_at_s > self.now_s:
            self.timers.schedule(key, transfer.wake_at_s)
        else:
            self.post(key, self._tick(transfer))

    def _tick(self, transfer: AnyTransfer) -> ev.Tick:
        if isinstance(transfer, SourceTransfer):
            return ev.Tick(self.now_s, self.sources.heard_s(transfer.sink))
        return ev.Tick(self.now_s)

    def _sweep(self) -> None:
        self.workers.notice_silence()
        gone = self.tombstones.expire(self.now_s, EXPIRED_A_TURN)
        for key in gone:
            name = (key.role, key.transfer_id)
            if self.current.get(name) == key.attempt and key not in self.transfers:
                del self.current[name]
            self.workers.openings.forget(key)
            self.notes.stone_gone(key)
        taken_back = self.sources.unmet.expire(EXPIRED_A_TURN)
        if EXPIRED_A_TURN in (len(gone), taken_back):
            self._sweep_at_s = self.now_s  # those left go in the next turns

    def _on_drain_begun(self, _event: out.DrainBegun) -> None:
        self.draining = True

    def _on_drain_ended(self, _event: out.DrainEnded) -> None:
        self.draining = False

    def _on_transfers_aborted(self, event: out.TransfersAborted) -> None:
        for key in event.keys:  # before any of them tells its other side
            self.post(key, ev.Fail(Code.ABORTED, f"by an operator: {event.reason}"))
