"""The data connections of this daemon: which threads there are, and what they are to do."""

import asyncio
import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Key, StreamKey
from kvferry_daemon.core.peer_effects import Connect
from kvferry_daemon.core.sink_streams import TICKET_S
from kvferry_daemon.logs import about
from kvferry_daemon.probe import split_address
from kvferry_daemon.transports.nixl.agent import Memory
from kvferry_daemon.transports.nixl.poller import Poller
from kvferry_daemon.transports.nixl.receiver import OfferReceiver
from kvferry_daemon.transports.nixl.sender import OfferSender
from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp.bridge import LoopBridge
from kvferry_daemon.transports.tcp.listener import ConnectError, Listener, connect
from kvferry_daemon.transports.tcp.receiver import StreamReceiver
from kvferry_daemon.transports.tcp.sender import SendJob, StreamSender
from kvferry_daemon.transports.tcp.staging import Blocks, NewBuffer, Place, plain_buffer
from kvferry_daemon.transports.tcp.tls import Certificate
from kvferry_proto.peer import PARTS_MAX, Transport

CONNECT_S = 5.0
CONNECTS_MAX = 256  # threads come only as they are needed: a few sick sources must not fill them
log = logging.getLogger(__name__)


class Streams:
    """Owns senders and receivers; posts what happens to them as node events."""

    def __init__(
        self,
        host: str,
        port: int,
        checksum: bool,
        feed: Callable[[out.NodeEvent], None],
        whose: Callable[[int], tuple[Key, int]],
        poller: Poller | None = None,
        enter: te.Enter = te.stay,
        new_buffer: NewBuffer = plain_buffer,
        certificate: Certificate | None = None,
    ) -> None:
        """``whose`` names the transfer and part of a handle.

        ``enter`` is called by every thread that moves bytes, before all else.
        ``certificate``: what sinks are shown; without one their connections are in clear.
        """
        loop = asyncio.get_running_loop()
        self._new_buffer = new_buffer
        self._feed = feed
        self._whose = whose
        self._checksum = checksum
        self._poller = poller
        self._enter = enter
        self._receivers: dict[StreamKey, StreamReceiver] = {}
        self._senders: dict[StreamKey, StreamSender] = {}
        self._connecting: dict[StreamKey, bool] = {}  # key -> still wanted
        self._executor = ThreadPoolExecutor(CONNECTS_MAX, "kvferry-connect")
        self._sink_bridge = LoopBridge(loop, self._on_sink_event)
        self._source_bridge = LoopBridge(loop, self._on_source_event)
        self.listener = Listener(host, port, self._source_bridge.post, certificate)

    # --- sink: connections that we open ---

    def connect(self, effect: Connect) -> None:
        """Open a connection off the loop."""
        self._connecting[effect.key] = True
        task = asyncio.get_running_loop().run_in_executor(self._executor, self._connect, effect)
        task.add_done_callback(lambda done: self._on_connected(effect.key, effect.transport, done))

    @staticmethod
    def _connect(effect: Connect) -> socket.socket:
        host, _ = split_address(effect.key.peer)
        return connect(host, effect.port, effect.ticket, CONNECT_S, effect.certificate_sha256)

    def _on_connected(
        self, key: StreamKey, transport: Transport, done: "asyncio.Future[socket.socket]"
    ) -> None:
        wanted = self._connecting.pop(key)
        try:
            sock = done.result()
        except (ConnectError, OSError, UnicodeError) as error:
            log.warning("stream %s to %s: %s", key.stream, key.peer, error)
            self._feed(out.SinkStreamDown(key, str(error)))
            return
        if not wanted:
            sock.close()
            self._feed(out.SinkStreamDown(key, "closed while it was being opened"))
            return
        self._receivers[key] = self._receiver(sock, key, transport)
        self._feed(out.SinkStreamUp(key))

    def _receiver(
        self, sock: socket.socket, key: StreamKey, transport: Transport
    ) -> StreamReceiver:
        post = self._sink_bridge.post
        if transport == "nixl":
            assert self._poller is not None  # else our ways had not offered it
            return OfferReceiver(sock, key, post, self._poller, self._enter, self._new_buffer)
        return StreamReceiver(sock, key, post, self._enter, self._new_buffer)

    def disconnect(self, key: StreamKey) -> None:
        """Close a connection that we opened; SinkStreamDown follows."""
        if key in self._connecting:
            self._connecting[key] = False
        elif key in self._receivers:
            self._receivers[key].close()

    def expect(self, effect: out.Expect, place: Place, blocks: Blocks | None) -> bool:
        """Claim an extent; False if the connection is gone."""
        receiver = self._receivers.get(effect.key)
        if receiver is None:
            return False
        receiver.claim(effect.handle, effect.first_token, effect.tokens, place, blocks)
        return True

    def cancel(self, handle: int) -> list[tuple[StreamKey, int, int]]:
        """Take back the claims that no thread has begun; return where, handle and first token."""
        handles = range(handle, handle + PARTS_MAX)
        return [
            (key, *claim)
            for key, receiver in self._receivers.items()
            for claim in receiver.cancel(handles)
        ]

    def _on_sink_event(self, event: te.StreamEvent) -> None:
        match event:
            case te.Received():
                self._feed(
                    out.ChunkReceived(
                        _stream_key(event.key), event.handle, event.first_token, event.payload_bytes
                    )
                )
            case te.Rejected():
                words = ("stream %s: chunk refused: %s", event.key, event.why)
                log.warning(*words, extra=about(self._whose(event.handle)[0]))
                self._feed(out.ChunkMissed(_stream_key(event.key), event.handle, event.first_token))
            case te.Drained():
                self._feed(out.ChunkDrained(event.payload_bytes))
            case te.StreamDown():
                key = _stream_key(event.key)
                self._receivers.pop(key, None)
                self._feed(out.SinkStreamDown(key, event.reason))
            case _:
                raise AssertionError(event)

    # --- source: connections that sinks open ---

    def admit(self, effect: out.Admit) -> None:
        """Let one connection in that shows the ticket."""
        stream = effect.key.peer, effect.key.stream
        self.listener.admit(effect.ticket, (effect.key, effect.transport), TICKET_S, stream)

    def catch_up(self) -> None:
        """Hear of connections that are open: their sinks may know it already, and ask."""
        self._source_bridge.catch_up()

    def transmit(self, effect: out.Transmit, place: Place, blocks: Blocks | None) -> bool:
        """Queue an extent; False if the connection is gone (its end is an event of its own)."""
        sender = self._senders.get(effect.key)
        if sender is None:
            return False
        owner = effect.owner, effect.part
        sender.put(SendJob(owner, effect.handle, effect.first_token, effect.tokens, place, blocks))
        return True

    def expel(self, key: StreamKey) -> None:
        """Close a connection that a sink opened; SourceStreamDown follows."""
        sender = self._senders.get(key)
        if sender is not None:
            sender.close()

    def _on_source_event(self, event: te.StreamEvent) -> None:
        match event:
            case te.StreamOpened():
                assert isinstance(event.key, tuple), event
                key, transport = event.key
                self.listener.opened(event.key)
                self._senders[key] = self._sender(event.sock, key, transport)
                self._feed(out.SourceStreamUp(key))
            case te.Sent():
                assert isinstance(event.owner, tuple), event
                owner, part = event.owner
                key = _stream_key(event.key)
                sent = out.ChunkSent(key, owner, part, event.first_token, event.payload_bytes)
                self._feed(sent)
            case te.StreamDown():
                key = _stream_key(event.key)
                self._senders.pop(key, None)
                self._feed(out.SourceStreamDown(key, event.reason))
            case _:
                raise AssertionError(event)

    def _sender(self, sock: socket.socket, key: StreamKey, transport: Transport) -> StreamSender:
        post = self._source_bridge.post
        if transport == "nixl":
            assert self._poller is not None  # else we had not chosen it
            return OfferSender(
                sock, key, post, self._checksum, self._poller, self._enter, self._new_buffer
            )
        return StreamSender(sock, key, post, self._checksum, self._enter, self._new_buffer)

    # --- pools that NIXL reads ---

    def add_pool(self, pool_id: str, memory: Memory) -> None:
        """Register a pool's memory where it may be read, or read into, one-sided."""
        if self._poller is not None:
            self._poller.add_pool(pool_id, memory)

    def drop_pool(self, pool_id: str) -> None:
        """Wait until nothing here holds a pool's memory; not on the loop."""
        if self._poller is not None:
            self._poller.drop_pool(pool_id).result()

    @property
    def nixl_reads(self) -> int:
        """Extents that were read one-sided."""
        return 0 if self._poller is None else self._poller.reads

    # --- both ---

    @property
    def count(self) -> int:
        """Connections with a thread."""
        return len(self._receivers) + len(self._senders)

    def close(self) -> None:
        """Close everything; the threads end by themselves."""
        self.listener.close()
        for receiver in self._receivers.values():
            receiver.close()
        for sender in self._senders.values():
            sender.close()
        if self._poller is not None:
            self._poller.close()
        self._executor.shutdown(wait=False, cancel_futures=True)


def _stream_key(key: object) -> StreamKey:
    assert isinstance(key, StreamKey), key
    return key
