"""The one place where effects are performed, and where their outcome becomes an event."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from kvferry_daemon import logs
from kvferry_daemon.audit import Audit
from kvferry_daemon.copies import Copies
from kvferry_daemon.core import outside as out
from kvferry_daemon.core import peer_effects as pr
from kvferry_daemon.core import told
from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.core.node import Node
from kvferry_daemon.ledger import Ledger
from kvferry_daemon.logs import about
from kvferry_daemon.memory.device import Device
from kvferry_daemon.memory.placement import ANYWHERE, Placement
from kvferry_daemon.pools import Pools
from kvferry_daemon.probe import probe
from kvferry_daemon.streams import Streams
from kvferry_daemon.transports.tcp.staging import Blocks, NewBuffer, Place, plain_buffer

TURN_S = 0.002  # of the loop, for what waited for a commit; then others have theirs
log = logging.getLogger(__name__)


class Links(Protocol):
    """Where messages go out."""

    def to_worker(self, route: bytes, reply: out.WorkerReply) -> None: ...
    def to_sink(self, effect: out.ToSink) -> None: ...
    def to_source(self, effect: pr.Say) -> None: ...
    def open_peer(self, address: str) -> None: ...
    def close_peer(self, address: str) -> None: ...
    def watch_worker(self, session: str, lock: str) -> None: ...
    def forget_worker(self, session: str) -> None: ...


class Effects:
    """Feeds events to the node, one after the other, and performs what it answers."""

    def __init__(
        self,
        node: Node,
        links: Links,
        pools_dir: Path,
        placement: Placement = ANYWHERE,
        device: Device | None = None,
        new_buffer: NewBuffer = plain_buffer,
    ) -> None:
        """``device``: where new pools lie; None: in host memory."""
        self._node = node
        self._loop = asyncio.get_running_loop()
        self.audit = Audit()
        self._streams: Streams | None = None
        self._ledger: Ledger | None = None
        self._unwritten: deque[tuple[int, list[out.NodeEffect]]] = deque()
        self._events: deque[out.NodeEvent] = deque()
        self._going_on = False  # in the next turn, with what is kept
        self._feeding = False
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = float("inf")
        self._tasks: set[asyncio.Future[Any]] = set()
        boot_id, lost_s = node.settings.boot_id, node.settings.timing.lost_s
        self.pools = Pools(pools_dir, boot_id, lost_s, self.feed, placement, device)
        self._copies = Copies(self.feed, placement.enter, new_buffer)
        self._moves: dict[type, Callable[[Any], None]] = {
            out.ToWorker: lambda e: links.to_worker(e.route, e.reply),
            out.ToSink: links.to_sink,
            pr.Say: links.to_source,
            out.OpenPeer: lambda e: links.open_peer(e.address),
            out.ClosePeer: lambda e: links.close_peer(e.address),
            out.WatchWorker: lambda e: links.watch_worker(e.session, e.lock),
            out.ForgetWorker: lambda e: links.forget_worker(e.session),
            pr.Probe: self._probe,
            out.Expect: self._expect,
            out.CancelExpected: self._cancel_expected,
            out.Transmit: self._transmit,
            out.Zero: self.pools.zero,
            out.MakePool: self.pools.make,
            out.DropPool: self.pools.drop,
            out.ShowSlot: self.pools.show_slot,
            out.ClearSlot: self.pools.clear_slot,
            **dict.fromkeys(told.EVERY, self._tell),
        }
        self.tellers: list[Callable[[told.Told], None]] = [logs.tell]

    def use_streams(self, streams: Streams) -> None:
        """Streams post events here and are told effects from here."""
        self._streams = streams
        self.pools.use_registry(streams)
        self._moves[pr.Connect] = streams.connect
        self._moves[pr.Disconnect] = lambda e: streams.disconnect(e.key)
        self._moves[out.Admit] = streams.admit
        self._moves[out.Expel] = lambda e: streams.expel(e.key)

    def use_ledger(self, ledger: Ledger) -> None:
        """From now on nothing is said or done that it does not hold."""
        self._ledger = ledger

    def feed(self, event: out.NodeEvent) -> None:
        """Let the node handle an event; events that come up meanwhile wait their turn."""
        if not self._closed:  # threads still tell of their ends then
            self._events.append(event)
            self._feed_waiting()

    def _feed_waiting(self) -> None:
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                event = self._events.popleft()
                effects = self._node.handle(event, self._loop.time())
                # Beside moving bytes the loop would wait for the GIL several times a commit.
                self._perform_once_written(effects, at_once=type(event) is out.WorkerCalled)
        finally:
            self._feeding = False
            self._arm()
            self.note_deeds()

    def note_deeds(self) -> None:
        """What was done since this was asked last goes into the audit log."""
        if self._node.deeds:
            self.audit.take(self._node.deeds)

    def _perform_once_written(self, effects: list[out.NodeEffect], *, at_once: bool) -> None:
        """Nobody sees what the ledger does not hold: effects wait for the writes before them."""
        if effects and isinstance(effects[0], out.Write):
            assert self._ledger is not None
            number = self._ledger.write(effects[0].rows, at_once=at_once)
            self._unwritten.append((number, effects[1:]))
            if self._ledger.kept >= number:
                self.on_written(number)
        elif self._unwritten and effects:
            self._unwritten.append((self._unwritten[-1][0], effects))
        else:
            for effect in effects:
                self._perform(effect)

    def on_written(self, number: int) -> None:
        """The ledger holds all rows up to this number: one commit's may be thousands."""
        if self._closed:
            return
        begun_s = monotonic()
        while self._is_kept(number):
            if monotonic() - begun_s >= TURN_S:
                self._go_on_soon()
                break
            for effect in self._unwritten.popleft()[1]:
                self._perform(effect)
        self._feed_waiting()

    def _is_kept(self, number: int) -> bool:
        return bool(self._unwritten) and self._unwritten[0][0] <= number

    def _go_on_soon(self) -> None:
        if not self._going_on:
            self._going_on = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        assert self._ledger is not None
        self._going_on = False
        self.on_written(self._ledger.kept)

    def _perform(self, effect: out.NodeEffect) -> None:
        """One that fails must not take those behind it along: they are other transfers'."""
        try:
            self._moves[type(effect)](effect)
        except Exception:
            self._node.counters["effects_failed"] += 1
            log.exception("could not do %s", _named(effect), extra=self._about(effect))

    def _about(self, effect: out.NodeEffect) -> dict[str, dict[str, object]]:
        """Whose it is, where it is one transfer's."""
        match effect:
            case out.Transmit():
                return about(effect.owner)
            case out.Expect():
                return about(self._node.sinks.named(effect.handle)[0])
            case _:
                return {}

    def close(self) -> None:
        """Do what only waits for the ledger; stop timers and threads. The pools' files stay."""
        if self._ledger is not None:
            kept = self._ledger.close()
            while self._is_kept(kept):
                self.on_written(kept)
        self.note_deeds()
        self.audit.settle()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        self.pools.close()
        self._copies.close()

    def _tell(self, effect: told.Told) -> None:
        for tell in self.tellers:
            tell(effect)

    # --- time ---

    def _arm(self) -> None:
        at_s = self._node.wake_at_s
        if at_s == self._timer_at_s or max(at_s, self._timer_at_s) <= self._node.now_s:
            return  # it comes in the next turn, and anew it would come in the one after that
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at_s = at_s
        self._timer = self._loop.call_at(at_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at_s = float("inf")
        self.feed(out.TimePassed())

    # --- bytes ---

    def _place(self, effect: out.Expect | out.Transmit) -> Place:
        return self.pools.place(effect, self._node.books[effect.pool_id].layout)

    def _expect(self, effect: out.Expect) -> None:
        if effect.key.is_here:
            try:
                self._copies.expect(effect, self._place(effect))
            except Exception:
                log.exception("could not do %s", _named(effect), extra=self._about(effect))
                self._events.append(out.ChunkMissed(effect.key, effect.handle, effect.first_token))
            return
        assert self._streams is not None
        if not self._streams.expect(effect, self._place(effect), _blocks(effect)):
            self._events.append(out.ChunkMissed(effect.key, effect.handle, effect.first_token))

    def _cancel_expected(self, effect: out.CancelExpected) -> None:
        assert self._streams is not None
        claims = self._streams.cancel(effect.handle) + self._copies.cancel(effect.handle)
        for key, handle, first_token in claims:
            self._events.append(out.ChunkMissed(key, handle, first_token))

    def _transmit(self, effect: out.Transmit) -> None:
        if effect.key.is_here:
            try:
                self._copies.transmit(effect, self._place(effect))
            except Exception:  # a connection's end would tell; here nothing else does
                log.exception("could not do %s", _named(effect), extra=self._about(effect))
                first, part = effect.first_token, effect.part
                self._events.append(out.ChunkSent(effect.key, effect.owner, part, first, 0))
            return
        assert self._streams is not None
        # If it is gone, its end tells the transfer.
        self._streams.transmit(effect, self._place(effect), _blocks(effect))

    # --- tasks ---

    def _on_task_done(self, task: "asyncio.Future[out.NodeEvent]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self.feed(task.result())

    def _probe(self, effect: pr.Probe) -> None:
        async def ask() -> out.NodeEvent:
            return out.Probed(effect.address, await probe(effect.address))

        task = self._loop.create_task(ask())
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)


def _named(effect: out.NodeEffect) -> str:
    """What it is, and no more of what it holds: that may be a secret, or payload."""
    key, kind = getattr(effect, "key", None), type(effect).__name__
    return f"{kind}, stream {key.stream}.{key.connection}" if isinstance(key, StreamKey) else kind


def _blocks(effect: out.Expect | out.Transmit) -> Blocks | None:
    """The blocks of an extent, where it has them whole but for the payload's end."""
    base_tokens, runs = effect.place
    if effect.slices is not None or effect.first_token != base_tokens:
        return None
    return Blocks(effect.pool_id, runs)
