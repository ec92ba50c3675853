"""The daemons that we pull from: their links, their streams, and what they say of transfers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core import peer_effects as pr
from kvferry_daemon.core.peers import Peer
from kvferry_daemon.core.session import Session
from kvferry_daemon.core.shape import Side
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.tenants import sharer_of
from kvferry_proto import peer as wire
from kvferry_proto.errors import Code, FerryError, exhausted
from kvferry_proto.states import Role

if TYPE_CHECKING:
    from kvferry_daemon.core.node import Node

FRAME_WANTS_MAX = 4096  # bounds a frame well below its limit
FRAME_PULLS_MAX = 16  # so that the other daemon is not held up by one frame for long
IDLE_PEER_S = 60.0
PEERS_MAX = 1000  # each costs a socket
PEERS_OF_ONE_MAX = 500  # that workers of one process, or of one tenant, were the first to name


class SinkDesk:
    """Everything about sources elsewhere."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.peers: dict[str, Peer] = {}
        self.linked_for: dict[str, str] = {}  # by address: who named it first
        self._sinks_of: dict[str, dict[ev.Key, None]] = {}
        self._up: set[ev.StreamKey] = set()  # data connections of which sinks were told
        self._handles: dict[ev.Key, int] = {}
        self._keys: dict[int, ev.Key] = {}
        self._next_handle = 0
        self._pulls: dict[str, list[wire.Pull]] = {}

    # --- transfers ---

    def check_room(self, address: str | None, session: Session) -> None:
        """Raise FerryError(resource_exhausted) if a link to one more source would be too much."""
        if address is None or address in self.peers:
            return
        if len(self.peers) >= PEERS_MAX:
            raise exhausted(f"{PEERS_MAX} sources are linked already")
        sharer = sharer_of(session.user, self._node.settings.tenancy)
        if list(self.linked_for.values()).count(sharer) >= PEERS_OF_ONE_MAX:
            raise exhausted(f"{PEERS_OF_ONE_MAX} sources are linked for this worker's like already")

    def attach(self, key: ev.Key) -> None:
        """A sink has opened: give it its source's link and streams."""
        transfer = self._node.transfers.get(key)
        address = transfer.opening.source if transfer else None
        if address is None:
            return  # local, or over already: a payload of 0 tokens
        self._sinks_of.setdefault(address, {})[key] = None
        peer = self.peers.get(address)
        if peer is None:
            peer = self._open(address)
            session = self._node.sessions.get(transfer.opening.session) if transfer else None
            if session is not None:
                self.linked_for[address] = sharer_of(session.user, self._node.settings.tenancy)
        peer.used_s = self._node.now_s
        if peer.state == "up":
            self._node.run_now(key, ev.PeerUp())
            for stream in peer.streams_open:
                self._node.run_now(key, ev.StreamUp(stream))

    def handle_of(self, key: ev.Key) -> int:
        """The number that names this attempt in pulls and chunk headers; never reused.

        Those behind it, up to PARTS_MAX, name its other parts.
        """
        if key not in self._handles:
            self._next_handle += wire.PARTS_MAX
            self._handles[key] = self._next_handle
            self._keys[self._next_handle] = key
        return self._handles[key]

    def named(self, handle: int) -> tuple[ev.Key, int]:
        """The transfer and the part that a handle names."""
        part = handle % wire.PARTS_MAX
        return self._keys[handle - part], part

    def forget(self, key: ev.Key) -> None:
        """The transfer is gone."""
        handle = self._handles.pop(key, None)
        if handle is not None:
            del self._keys[handle]
        transfer = self._node.transfers[key]
        sinks = self._sinks_of.get(transfer.opening.source or "")
        if sinks is not None:
            sinks.pop(key, None)

    def _tell_all(self, address: str, event: object) -> None:
        self._node.tell(self._sinks_of.get(address, {}), event)

    # --- what the link brings ---

    def on_message(self, event: out.SourceSaid) -> None:
        """A daemon that we pull from said something."""
        peer = self.peers.get(event.address)
        if peer is None:
            return
        message = event.message
        self._do(peer, peer.on_message(message, self._node.now_s))
        if not peer.is_current(message):
            return
        if isinstance(message, wire.Progresses):
            for progress in message.progresses:
                self._on_progress(event.address, progress)
        elif isinstance(message, wire.DoneNoted):
            key = ev.Key(Role.SINK, message.transfer_id, message.attempt)
            if key in self._sinks_of.get(event.address, ()):
                self._node.post(key, ev.DoneNoted())

    def _on_progress(self, address: str, progress: wire.Progress) -> None:
        node = self._node
        key = ev.Key(Role.SINK, progress.transfer_id, progress.attempt)
        if key not in self._sinks_of.get(address, ()):
            return
        if progress.layout is None:
            self.hear(key, progress)
        elif not node.transfers[key].ended:
            self._on_layout(address, key, Side.of(progress.layout, progress.world_size))

    def _on_layout(self, address: str, key: ev.Key, theirs: Side) -> None:
        """The source's layout or ranks are not ours."""
        node, opening = self._node, self._node.transfers[key].opening
        ours = Side.of(node.books[opening.pool_id].layout, opening.world_size)
        shared = self.linked_for.get(address, "")  # whoever may name one address may name hundreds
        names = ("source", address), ("worker", shared)
        if not node.plans.may_make(*names, theirs, ours, node.now_s):
            node.counters["plans_refused"] += 1  # the next pull is answered the same
            return
        try:
            _, shape = node.plans.make(theirs, ours)
        except FerryError as error:
            node.post(key, ev.Fail(error.code, error.message))
        else:
            node.post(key, ev.Shaped(shape))

    def hear(self, key: ev.Key, progress: wire.Progress) -> None:
        """Let a sink know of its source; one that would have to keep too much fails."""
        node = self._node
        try:
            node.check_aux(key, progress.aux)
        except FerryError as error:
            node.counters["aux_over_bound"] += 1
            node.post(key, ev.Fail(error.code, error.message, error.retry_after_s))
        else:
            node.post(key, ev.Heard(progress))

    def on_slept(self, for_s: float) -> None:
        """We stood still ourselves."""
        for peer in self.peers.values():
            peer.forgive(for_s)

    def on_probed(self, event: out.Probed) -> None:
        """We know why nobody answers."""
        peer = self.peers.get(event.address)
        if peer is not None:
            self._do(peer, peer.on_probed(event.reason))

    def on_stream_up(self, event: out.SinkStreamUp) -> None:
        """A data connection is open."""
        peer = self.peers.get(event.key.peer)
        if peer is None:
            self._node.effects.append(pr.Disconnect(event.key))
            return
        self._do(peer, peer.on_stream_up(event.key, self._node.now_s))
        if event.key in peer.streams_open:
            self._up.add(event.key)
            self._tell_all(peer.address, ev.StreamUp(event.key))

    def on_stream_down(self, event: out.SinkStreamDown) -> None:
        """A data connection has ended; no thread writes through it any more."""
        self._node.counters["streams_closed"] += 1
        self._node.meters.stream_down(event.key)
        self._node.chronicle.stream_down(event.key)
        if event.key in self._up:  # of one that never came nobody has heard
            self._up.remove(event.key)
            self._tell_all(event.key.peer, ev.StreamDown(event.key))
        peer = self.peers.get(event.key.peer)
        if peer is not None:
            self._do(peer, peer.on_stream_down(event.key, event.reason, self._node.now_s))

    def on_received(self, event: out.ChunkReceived) -> None:
        """An extent is in place."""
        how = "copied" if event.key.is_here else "received"
        self._node.counters[f"chunks_{how}"] += 1
        self._node.counters[f"bytes_{how}"] += event.payload_bytes
        key, part = self.named(event.handle)
        claim = (event.key, event.handle, event.first_token)
        self._node.meters.received(*claim, self._node.now_s, key.transfer_id)
        self._node.chronicle.chunk_ended(event.key, key, part, event.first_token)
        self._node.post(key, ev.Received(event.key, event.first_token, part))

    def on_missed(self, event: out.ChunkMissed) -> None:
        """A claim came to nothing."""
        self._node.counters["chunks_missed"] += 1
        self._node.meters.missed(event.key, event.handle, event.first_token)
        key, part = self.named(event.handle)
        self._node.chronicle.chunk_ended(event.key, key, part, event.first_token, missed=True)
        self._node.post(key, ev.Missed(event.key, event.first_token, part))
        if event.key.is_here:  # taken back only once it has ended, which absorbs this: it failed
            self._node.post(key, ev.Fail(Code.INTERNAL, "a copy within the daemon failed"))

    def on_drained(self, event: out.ChunkDrained) -> None:
        """Bytes that nobody had claimed."""
        self._node.counters["chunks_drained"] += 1
        self._node.counters["bytes_drained"] += event.payload_bytes

    # --- what transfers say ---

    def say_pull(self, address: str, pull: wire.Pull) -> None:
        """Send a pull with the others that are due to the same daemon."""
        if self._is_us(address):
            key = ev.Key(Role.SINK, pull.transfer_id, pull.attempt)
            words = f"{address} is this daemon: receive from it without naming a source"
            self._node.post(key, ev.Fail(Code.BAD_ADDRESS, words))
            return
        self._pulls.setdefault(address, []).append(pull)

    def _is_us(self, address: str) -> bool:
        """Whether it leads back to us: past what keeps tenants apart within a daemon."""
        settings, peer = self._node.settings, self.peers.get(address)
        return settings.tenancy != "off" and peer is not None and peer.boot_id == settings.boot_id

    def say_done(self, transfer: SinkTransfer) -> None:
        """Tell the source's daemon how it ended; the transfer repeats it until it is noted."""
        assert transfer.opening.source is not None
        if self._is_us(transfer.opening.source):
            self._node.post(transfer.key, ev.DoneNoted())
            return
        peer = self.peers.get(transfer.opening.source)
        if peer is None or peer.state != "up" or peer.boot_id is None:
            return
        done = wire.Done(
            transfer_id=transfer.key.transfer_id,
            attempt=transfer.key.attempt,
            state=transfer.state,
            error=transfer.error,
            source_boot_id=peer.boot_id,
            sink_boot_id=peer.our_boot_id,
        )
        self._node.effects.append(pr.Say(peer.address, done))

    def close_stream(self, key: ev.StreamKey) -> None:
        """Somebody needs proof that nothing is written through it any more."""
        self._node.effects.append(pr.Disconnect(key))

    def flush(self) -> None:
        """Send the pulls of this turn, one frame a daemon (or a few)."""
        pulls, self._pulls = self._pulls, {}
        for address, due in pulls.items():
            peer = self.peers.get(address)
            if peer is None or peer.state != "up" or peer.boot_id is None:
                continue  # repeated once it is up
            frame: list[wire.Pull] = []
            wants = 0
            for pull in due:
                if frame and (
                    wants + len(pull.want) > FRAME_WANTS_MAX or len(frame) >= FRAME_PULLS_MAX
                ):
                    self._say_pulls(peer, frame)
                    frame, wants = [], 0
                frame.append(pull)
                wants += len(pull.want)
            self._say_pulls(peer, frame)

    def _say_pulls(self, peer: Peer, pulls: list[wire.Pull]) -> None:
        assert peer.boot_id is not None
        message = wire.Pulls.model_construct(
            kind="pulls",
            source_boot_id=peer.boot_id,
            sink_boot_id=peer.our_boot_id,
            pulls=pulls,
        )
        self._node.effects.append(pr.Say(peer.address, message))

    # --- links ---

    def _open(self, address: str) -> Peer:
        node = self._node
        settings = node.settings
        # A link's id: one source may be reached by two addresses, or again later. Nobody but that
        # source may know it: others that it trusts could take the name first.
        hello = wire.PeerHello(
            boot_id=node.new_secret()[-16:].hex(),
            daemon_id=settings.daemon_id,
            life=settings.life,
            address=settings.peer_address[: wire.ADDRESS_CHARS_MAX],
        )
        peer = Peer(address, hello, settings.timing, settings.streams, node.now_s, node.ways)
        self.peers[address] = peer
        node.effects.append(out.OpenPeer(address))
        self._do(peer, peer.tick(node.now_s))
        return peer

    def tick(self, address: str) -> None:
        """A link's timer is due; a link that nobody needs any more goes."""
        peer = self.peers.get(address)
        if peer is None:
            return
        now_s = self._node.now_s
        if self._sinks_of.get(address):
            peer.used_s = now_s
        elif now_s - peer.used_s >= IDLE_PEER_S:
            if peer.closed:
                del self.peers[address]
                self.linked_for.pop(address, None)
                self._sinks_of.pop(address, None)
                self._node.effects.append(out.ClosePeer(address))
                return
            self._do(peer, peer.shut())
        self._do(peer, peer.tick(now_s))

    def _do(self, peer: Peer, effects: list[pr.PeerEffect]) -> None:
        node = self._node
        for effect in effects:
            match effect:
                case pr.PeerIsUp():
                    self._tell_all(peer.address, ev.PeerUp())
                case pr.PeerIsDown():
                    node.counters["peers_restarted" if effect.restarted else "peers_lost"] += 1
                    self._tell_all(peer.address, ev.PeerDown())
                case pr.NewsAreLost():
                    node.counters["news_lost"] += 1
                    self._tell_all(peer.address, ev.NewsLost())
                case pr.PeerFailed():
                    self._tell_all(peer.address, ev.Fail(effect.code, effect.message))
                case pr.Say() | pr.Connect() | pr.Disconnect() | pr.Probe():
                    node.effects.append(effect)
        node.timers.schedule(peer.address, max(peer.wake_at_s, node.now_s))
