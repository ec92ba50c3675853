"""The daemon: sockets, threads and the node, put together and taken apart."""

import asyncio
import gc
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import zmq

from kvferry_daemon import logs
from kvferry_daemon.config import Config
from kvferry_daemon.control_desk import ControlDesk, log_level
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.crowd import BAR_S, Crowd
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.peers import Say
from kvferry_daemon.core.records import HOST, RECORDS
from kvferry_daemon.core.report import status
from kvferry_daemon.effects import Effects
from kvferry_daemon.http.facts import Facts
from kvferry_daemon.http.listen import listen, url_of
from kvferry_daemon.inbound import Inbound
from kvferry_daemon.keys import Keys
from kvferry_daemon.lag import LoopLag
from kvferry_daemon.lately import Lately
from kvferry_daemon.ledger import Ledger
from kvferry_daemon.life import begin, settings_of
from kvferry_daemon.links.curve import prove_ourselves
from kvferry_daemon.links.gate import Gate, bounds_of, data_connections_max
from kvferry_daemon.links.io_thread import IoThreads
from kvferry_daemon.links.liveness import Liveness
from kvferry_daemon.links.peer_link import PeerLink
from kvferry_daemon.links.pressure import Pressure
from kvferry_daemon.links.zap import (
    CONTROL,
    PEER,
    WORKER,
    Door,
    Doorkeeper,
    LocalDoor,
    PeerDoor,
    guard,
)
from kvferry_daemon.links.zmq_link import ZmqLink, make_socket
from kvferry_daemon.memory.device import Device
from kvferry_daemon.memory.huge_pages import huge_pages
from kvferry_daemon.memory.opened import check_lists
from kvferry_daemon.memory.placement import Placement, cpu_list
from kvferry_daemon.probe import key_of
from kvferry_daemon.runtime_dir import RuntimeDir
from kvferry_daemon.streams import Streams
from kvferry_daemon.traces import traces
from kvferry_daemon.transports.nixl.agent import has_loaded_nixl
from kvferry_daemon.transports.nixl.ways import begin as begin_ways
from kvferry_daemon.transports.tcp.events import Enter
from kvferry_daemon.transports.tcp.staging import plain_buffer
from kvferry_daemon.transports.tcp.tls import Certificate
from kvferry_proto import control, peer, worker
from kvferry_proto.errors import FerryError
from kvferry_proto.fields import ErrorInfo

log = logging.getLogger(__name__)
DRAIN_LOOK_S = 0.05
EXIT_LEDGER = 7
SOCKETS_MAX = 4096
GC_THRESHOLDS = (10_000, 50, 100)  # a full pass over thousands of transfers takes 20 ms
CROWD = 3  # messages a turn, on average: then they wait for us, not we for them


class Daemon:
    """One life of a daemon. Create it inside a running event loop."""

    def __init__(self, config: Config) -> None:
        """Bind everything.

        Raises PlacementRefused, KeysRefused, NixlFailed, EncryptionFailed, DirectoryTaken, OSError
        (DeviceError and TracesRefused too), ZMQError.
        """
        self.config = config
        self._keys = None if config.keys_dir is None else Keys(config.keys_dir)
        device = None if config.device == HOST else Device(config.device)  # first: it may be none
        certificate = Certificate() if config.payload_encryption == "tls" else None
        placement = Placement.settle(config.numa_node, config.copy_cpus)
        os.umask(0o077)  # before any bind: an ipc file's mode is 0777 & ~umask
        access = config.access
        self.directory = RuntimeDir(config.runtime_dir, access)
        if access.by_tenant:
            check_lists(self.directory.pools)
        self._placed = control.PlacementStatus(
            huge_pages=huge_pages(self.directory.pools),
            numa_node=placement.node,
            copy_cpus=cpu_list(placement.cpus),
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)  # before the first one
        doors: dict[str, Door] = {
            WORKER: LocalDoor(access.workers),
            CONTROL: LocalDoor(access.readers),
        }
        if self._keys is not None:
            doors[PEER] = PeerDoor(self._keys.name_of)
        self._doorkeeper = Doorkeeper(self._context, doors, self._on_refused)
        self._gates: dict[str, Gate] = {}
        self._bounds = bounds_of(config.connections_max)
        self._peer_socket = self._guarded(PEER) if self._keys else self._gated(PEER)
        if self._keys is not None:
            prove_ourselves(self._peer_socket, self._keys.secret)
        if ":" in config.peer_host:
            self._peer_socket.setsockopt(zmq.IPV6, 1)
        loop = asyncio.get_running_loop()
        self.life = begin(self.directory, config, loop.time())
        port = self._bind_peers()
        host = _bracketed(config.advertise_host or config.peer_host)
        self.peer_address = f"tcp://{host}:{port}"
        if self._keys is not None:
            self.peer_address += f"?key={self._keys.public}"
        self._liveness = Liveness(self.directory.workers)
        self._dealers: dict[str, PeerLink] = {}
        self._shunned: dict[str, asyncio.TimerHandle] = {}
        self.node = Node(
            settings_of(config, self.peer_address, self.life.daemon_id, self.life.number),
            lambda: secrets.token_bytes(32),
            0,
            asyncio.get_running_loop().time(),
        )
        enter = placement.enter if device is None else _both(placement.enter, device.enter)
        new_buffer = plain_buffer if device is None else device.buffer
        self.effects = Effects(self.node, self, self.directory.pools, placement, device, new_buffer)
        self._traces = traces(config.otlp_endpoint, self.node.settings.boot_id, loop.time)
        if self._traces is not None:
            self.effects.tellers.append(self._traces.tell)
        self.node.ways, poller = begin_ways(
            config.transport, device is not None, enter, config.payload_encryption, access.by_tenant
        )
        self.streams = Streams(
            config.peer_host,
            config.data_port,
            config.checksum,
            self.effects.feed,
            self.node.sinks.named,
            poller,
            placement.enter,
            new_buffer,
            certificate,
        )
        self.node.data_port = self.streams.listener.port
        self.node.sources.streams.connections_max = data_connections_max()
        self.node.certificate_sha256 = None if certificate is None else certificate.sha256
        self.effects.use_streams(self.streams)
        self._inbound = Inbound(
            self.node, self.effects.feed, self, self._liveness, self._keys, config.messages_a_s
        )
        self._peers = ZmqLink(
            self._peer_socket,
            lambda frames: self._inbound.on_peer(frames, self._peers.user),
            names_users=self._keys is not None,
            throw_out=self._gates[PEER].throw_out_sender,
        )
        self._workers = ZmqLink(
            self._bound(self.directory.worker_socket, WORKER),
            lambda frames: self._inbound.on_worker(frames, self._workers.user),
            names_users=True,
            throw_out=self._gates[WORKER].throw_out_sender,
        )
        self._control = ZmqLink(
            self._bound(self.directory.control_socket, CONTROL),
            self._on_control,
            names_users=True,
            throw_out=self._gates[CONTROL].throw_out_sender,
        )
        links = {PEER: self._peers, WORKER: self._workers, CONTROL: self._control}
        self._pressure = Pressure(
            [(self._gates[name], link) for name, link in links.items()],
            lambda: list(self._dealers.values()),
        )
        self.operators = ControlDesk(self.node, self.effects.feed, self.status, access.operators)
        self.failed: asyncio.Future[str] = loop.create_future()  # why nothing can be kept any more
        self._begin_ledger(port)
        self._io_threads = IoThreads()
        self.lag = LoopLag()
        self._lately = Lately(self.node)
        self.closed_first: Callable[[], Awaitable[None]] | None = None
        self._messages = self._turns = 0
        self._watch = loop.create_task(self._watch_all())

    def _bind_peers(self) -> int:
        """Bind the configured port, else the earlier life's, where peers look for us."""
        host = f"tcp://{_bracketed(self.config.peer_host)}"
        wanted = self.config.peer_port or self.life.peer_port
        try:
            self._peer_socket.bind(f"{host}:{wanted or '*'}")
        except zmq.ZMQError as error:
            if self.config.peer_port or not wanted or error.errno != zmq.EADDRINUSE:
                raise
            log.warning("port %d of the earlier life is taken; its peers will not find us", wanted)
            self._peer_socket.bind(f"{host}:*")
        bound = self._peer_socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return int(bound.rpartition(":")[2])

    def _begin_ledger(self, peer_port: int) -> None:
        loop = asyncio.get_running_loop()
        self.ledger = Ledger(
            self.directory.ledger, loop, self.effects.on_written, self._on_ledger_failed
        )
        self.effects.use_ledger(self.ledger)
        self.ledger.write((("daemon", RECORDS.encode(self.life.record(peer_port))),))
        if self.life.past is not None:
            self.effects.pools.attach(self.life.past.pools, self.life.past.lost)
            self.effects.feed(out.Restored(self.life.past))
            log.info("life %d of this daemon goes on with its ledger", self.life.number)

    def _on_ledger_failed(self, why: str) -> None:
        if not self.failed.done():
            self.failed.set_result(why)

    def _bound(self, path: Path, domain: str) -> zmq.Socket[bytes]:
        socket = self._guarded(domain)
        socket.bind(f"ipc://{path}")
        self.directory.share_socket(path)
        return socket

    def _guarded(self, domain: str) -> zmq.Socket[bytes]:
        socket = self._gated(domain)
        guard(socket, domain)
        return socket

    def _gated(self, domain: str) -> zmq.Socket[bytes]:
        socket = make_socket(self._context, zmq.ROUTER)
        self._gates[domain] = Gate(socket, domain, Crowd(self._bounds[domain]))
        return socket

    def _on_refused(self) -> None:
        self.node.counters["connections_refused"] += 1

    async def close(self) -> None:
        """Take everything down; what workers still have is kept for the next life."""
        if self.closed_first is not None:
            await self.closed_first()
        self._watch.cancel()
        self.lag.close()
        self.effects.close()  # first: what it still does goes out by what is closed below
        self._pressure.close()
        for gate in self._gates.values():
            gate.close()
        for link in (self._workers, self._control, self._peers, self._doorkeeper):
            link.close()
        for timer in self._shunned.values():
            timer.cancel()
        for dealer in self._dealers.values():
            dealer.close()
        self.streams.close()
        self._liveness.close()
        self._context.term()
        self.directory.close(keep=bool(self.node.sessions))
        if self._traces is not None:  # last: whoever takes them may be slow
            self._traces.close()

    async def drain(self) -> bool:
        """Take no new transfers; wait for the live ones. False if they did not end in time."""
        self.operators.stopping = True
        self.effects.feed(out.DrainBegun())
        deadline_s = asyncio.get_running_loop().time() + self.config.deadlines.stop_s
        while not self.node.idle:
            if asyncio.get_running_loop().time() >= deadline_s:
                return False
            await asyncio.sleep(DRAIN_LOOK_S)
        return True

    async def _watch_all(self) -> None:
        while True:
            await asyncio.sleep(self.config.deadlines.heartbeat_s)
            try:
                self._watch_workers()
                self._watch_keys()
                self._watch_load()
                self.effects.note_deeds()
                self.effects.audit.settle()
                self._count()
                self._lately.look(asyncio.get_running_loop().time())
                self.effects.pools.beat()
            except Exception:  # a fault of ours must not end the watch of dead workers
                log.exception("could not watch")

    def _watch_workers(self) -> None:
        try:
            for session in self._liveness.dead():
                self.effects.feed(out.LockDropped(session))
            self._liveness.sweep()
        except OSError as error:
            log.error("cannot look at the workers' locks: %s", error)

    def _watch_keys(self) -> None:
        """Trusted keys may have come, or gone: with those we talk no more."""
        if self._keys is not None and self._keys.reload():
            self.effects.feed(out.TrustChanged(frozenset(self._keys.trusted)))
            for address in list(self._dealers):
                if self._keys.name_of(key_of(address)) is None:
                    log.warning("%s is not trusted any more", address)
                    self.close_peer(address)

    def _watch_load(self) -> None:
        """While messages wait for the loop, no send may cost it the core."""
        messages = self._workers.messages + self._peers.messages
        turns = self._workers.turns + self._peers.turns
        crowded = messages - self._messages > CROWD * (turns - self._turns)
        self._messages, self._turns = messages, turns
        self._io_threads.be_patient(crowded)

    def _on_control(self, frames: list[bytes]) -> None:
        self._control.send(frames[0], self.operators.reply(frames, self._control.user))

    def _count(self) -> None:
        """Into the books, what others count."""
        counters = self.node.counters
        counters["ledger_commits"] = self.ledger.commits
        counters["nixl_reads"] = self.streams.nixl_reads
        counters["handshakes_refused"] = self.streams.listener.refused
        counters["connections_cut_for_memory"] = self._pressure.cuts
        counters["audit_left_out"] = self.effects.audit.left_out
        counters["log_dropped"], counters["audit_dropped"] = logs.dropped()
        for name, gate in self._gates.items():
            counters[f"connections_over_bound_{name}"] = gate.refused

    def status(self, call: int = 0) -> control.Status:
        """The daemon as operators see it."""
        self._count()
        facts = self._placed, self.lag.status(), log_level()
        now_s = asyncio.get_running_loop().time()
        answer = status(self.node, call, str(self.directory.path), *facts, now_s)
        more = {"security": self._security(), "rates": self._lately.rates(now_s)}
        return answer.model_copy(update=more)

    def facts(self) -> Facts:
        """The same for those who ask by HTTP."""
        links = (self._workers, self._peers, self._control)
        return Facts(
            host=self.config.http_host,
            now_s=asyncio.get_running_loop().time,
            insecure=self.config.is_open_to_all,
            by_tenant=self.config.access.by_tenant,
            status=self.status,
            loop=self.lag.status,
            not_sent=lambda: sum(link.dropped for link in links),
            failing=lambda: self.ledger.failing,
        )

    def _security(self) -> control.SecurityStatus:
        return control.SecurityStatus(
            messages="clear" if self._keys is None else "curve",
            insecure=self.config.is_open_to_all,
            trusted_keys=0 if self._keys is None else len(self._keys.trusted),
            payload="clear" if self.node.certificate_sha256 is None else "tls",
        )

    # --- messages out (Links) ---

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
            self.node.counters["unsendable_messages"] += 1
            log.error("cannot send a %s: %s", message.kind, error)
            return []

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
                self.effects.feed(out.SourceSaid(address, refusal))
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
        log.warning("%s goes on: its link is dropped for %g s", address, BAR_S)
        self.node.counters["sources_shunned"] += 1
        self.close_peer(address)
        loop = asyncio.get_running_loop()
        self._shunned[address] = loop.call_later(BAR_S, self._let_in_again, address)

    def _let_in_again(self, address: str) -> None:
        del self._shunned[address]
        if address in self.node.sinks.peers and address not in self._dealers:
            self.open_peer(address)

    def watch_worker(self, session: str, lock: str) -> None:
        """From now on its flock is looked at."""
        self._liveness.watch(session, lock)

    def forget_worker(self, session: str) -> None:
        """Its session is over."""
        self._liveness.forget(session)


async def serve(config: Config) -> int:
    """Run until SIGTERM or SIGINT: the first drains, a second one stops at once."""
    port = config.http_port
    listener = None if port is None else listen(config.http_host, port)
    daemon = Daemon(config)
    facts: dict[str, object] = {"peer_address": daemon.peer_address, "pid": os.getpid()}
    if listener is not None:
        from kvferry_daemon.http.server import HttpServer  # a daemon without it pays nothing

        http = await HttpServer.start(listener, daemon.node, daemon.facts())
        daemon.closed_first = http.close
        facts["http"] = url_of(listener)
    gc.collect()
    gc.freeze()  # what there is now stays; a pass over it would hold the loop up for nothing
    gc.set_threshold(*GC_THRESHOLDS)
    loop = asyncio.get_running_loop()
    stop, now = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: now.set() if stop.is_set() else stop.set())
    print(json.dumps(facts), flush=True)
    if config.is_open_to_all:
        log.warning("INSECURE: whoever reaches %s may pull every payload", daemon.peer_address)
    log.info("ready: %s, runtime directory %s", daemon.peer_address, config.runtime_dir)
    daemon.lag.begin()
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((stopping, daemon.failed), return_when=asyncio.FIRST_COMPLETED)
    if daemon.failed.done():
        log.error("stopping, the ledger cannot be written: %s", daemon.failed.result())
        await daemon.close()
        return EXIT_LEDGER
    log.info("draining")
    draining = asyncio.ensure_future(daemon.drain())
    hurry = asyncio.ensure_future(now.wait())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    drained = draining.done() and draining.result()
    draining.cancel()
    hurry.cancel()
    await daemon.close()
    log.info("stopped%s", "" if drained else "; some transfers had not ended")
    return 0 if drained else 3


def _both(one: Enter, other: Enter) -> Enter:
    def enter() -> None:
        one()
        other()

    return enter


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def run(config: Config) -> int:
    """Serve on a uvloop event loop."""
    import uvloop

    from kvferry_daemon.timed_loop import TimedLoop

    logs.begin(config.log_level, config.log_format)
    status = uvloop.run(serve(config), loop_factory=TimedLoop)
    if has_loaded_nixl():
        # Its wheel brings a libnl whose destructors crash where the machine has one too, as every
        # one with RDMA has: all is closed by now, so leave without them.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    return status
