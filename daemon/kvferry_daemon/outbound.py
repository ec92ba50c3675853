"""What goes out: answers to workers and sinks, and the links to the daemons that we pull from."""

import asyncio
import logging
from collections.abc import Callable

import zmq

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.crowd import BAR_S
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.peer_effects import Say
from kvferry_daemon.inbound import Inbound
from kvferry_daemon.keys import Keys
from kvferry_daemon.links.liveness import Liveness
from kvferry_daemon.links.peer_link import PeerLink
from kvferry_daemon.links.zmq_link import ZmqLink
from kvferry_daemon.probe import key_of
from kvferry_proto import peer, worker
from kvferry_proto.errors import FerryError
from kvferry_proto.fields import ErrorInfo

log = logging.getLogger(__name__)


class Outbound:
    """Messages of this daemon, and the links that it opens itself."""

    _workers: ZmqLink
    _peers: ZmqLink
    _inbound: Inbound
    _feed: Callable[[out.NodeEvent], None]

    def __init__(
        self,
        node: Node,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: Keys | None,
        liveness: Liveness,
    ) -> None:
        """Nothing goes out before ``use_links``."""
        self._node = node
        self._context = context
        self._keys = keys
        self._liveness = liveness
        self._dealers: dict[str, PeerLink] = {}
        self._shunned: dict[str, asyncio.TimerHandle] = {}

    def use_links(
        self,
        workers: ZmqLink,
        peers: ZmqLink,
        inbound: Inbound,
        feed: Callable[[out.NodeEvent], None],
    ) -> None:
        """From now on messages go out by these, and what sources say goes in there."""
        self._workers = workers
        self._peers = peers
        self._inbound = inbound
        self._feed = feed

    def source_links(self) -> list[PeerLink]:
        """Those that are open."""
        return list(self._dealers.values())

    def close(self) -> None:
        """Drop the links to sources."""
        for timer in self._shunned.values():
            timer.cancel()
        for dealer in self._dealers.values():
            dealer.close()

    # --- messages ---

    def to_worker(self, route: bytes, reply: out.WorkerReply) -> None:
        """Answer a worker; what does not fit a frame becomes a typed failure."""
        try:
            frame = worker.REPLIES.encode(reply)
        except FerryError as error:
            info = ErrorInfo.of_error(error)
            frame = worker.REPLIES.encode(worker.Failure(call=reply.call, error=info))
        self._workers.send(route, frame)

    def to_sink(self, effect: out.ToSink) -> None:
        """Answer a daemon that pulls from us."""
        for frame in self._frames_of(effect.message):
            self._peers.send(effect.route, frame)

    def to_source(self, effect: Say) -> None:
        """Ask a daemon that we pull from."""
        if self._keys is not None and effect.address not in self._dealers:
            self.open_peer(effect.address)  # it may be trusted by now
        link = self._dealers.get(effect.address)
        if link is not None:
            for frame in self._frames_of(effect.message):
                link.send(frame)

    def _frames_of(self, message: peer.PeerMessage) -> list[bytes]:
        try:
            return peer.frames_of(message)
        except FerryError as error:  # a limit of ours is wrong; one message must not end us
            self._node.counters["unsendable_messages"] += 1
            log.error("cannot send a %s: %s", message.kind, error)
            return []

    # --- links to sources ---

    def open_peer(self, address: str) -> None:
        """Connect; ZeroMQ goes on trying until close_peer."""
        if address in self._shunned:
            return  # it is opened in time
        on_message: Callable[[list[bytes]], None] = lambda frames: self._inbound.on_source(
            address, frames
        )
        secret = b""
        if self._keys is not None:
            secret = self._keys.secret
            if self._keys.name_of(key_of(address)) is None:
                refusal = self._inbound.distrusted(f"the key of {address} is not trusted here")
                self._feed(out.SourceSaid(address, refusal))
                return
        try:
            self._dealers[address] = PeerLink(self._context, address, on_message, secret)
        except zmq.ZMQError as error:  # the node's own probe tells those who wait for it
            log.error("no link to %s: %s", address, error)

    def close_peer(self, address: str) -> None:
        """Drop the link."""
        link = self._dealers.pop(address, None)
        if link is not None:
            link.close()

    def shun_peer(self, address: str) -> None:
        """Drop the link to a source that floods us; it may try again after a while."""
        if address in self._shunned:
            return
        log.warning("%s goes on: its link is dropped for %g s", address, BAR_S)
        self._node.counters["sources_shunned"] += 1
        self.close_peer(address)
        loop = asyncio.get_running_loop()
        self._shunned[address] = loop.call_later(BAR_S, self._let_in_again, address)

    def shun_endpoint(self, endpoint: str) -> None:
        """The same, for all addresses that lead there."""
        for address, link in self._dealers.copy().items():
            if link.endpoint == endpoint:
                self.shun_peer(address)

    def _let_in_again(self, address: str) -> None:
        del self._shunned[address]
        if address in self._node.sinks.peers and address not in self._dealers:
            self.open_peer(address)

    def close_distrusted(self) -> None:
        """Some keys may not be trusted any more: with those we talk no more."""
        assert self._keys is not None
        for address in list(self._dealers):
            if self._keys.name_of(key_of(address)) is None:
                log.warning("%s is not trusted any more", address)
                self.close_peer(address)

    # --- workers' locks ---

    def watch_worker(self, session: str, lock: str) -> None:
        """From now on its flock is looked at."""
        self._liveness.watch(session, lock)

    def forget_worker(self, session: str) -> None:
        """Its session is over."""
        self._liveness.forget(session)
