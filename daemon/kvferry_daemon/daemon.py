"""The daemon: sockets, threads and the node, put together, watched and taken apart."""

import asyncio
import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from kvferry_daemon import logs
from kvferry_daemon.config import Config
from kvferry_daemon.control_desk import ControlDesk, log_level
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.records import HOST, RECORDS
from kvferry_daemon.core.report import status
from kvferry_daemon.effects import Effects
from kvferry_daemon.http.facts import Facts
from kvferry_daemon.inbound import Inbound
from kvferry_daemon.keys import Keys
from kvferry_daemon.lag import LoopLag
from kvferry_daemon.lately import Lately
from kvferry_daemon.ledger import Ledger
from kvferry_daemon.life import begin, settings_of
from kvferry_daemon.links.gate import data_connections_max
from kvferry_daemon.links.io_thread import IoThreads
from kvferry_daemon.links.liveness import Liveness
from kvferry_daemon.links.pressure import Pressure
from kvferry_daemon.links.sockets import Sockets, bracketed
from kvferry_daemon.links.zap import CONTROL, PEER, WORKER
from kvferry_daemon.links.zmq_link import ZmqLink
from kvferry_daemon.memory.device import Device
from kvferry_daemon.memory.huge_pages import huge_pages
from kvferry_daemon.memory.opened import check_lists
from kvferry_daemon.memory.placement import Placement, cpu_list
from kvferry_daemon.outbound import Outbound
from kvferry_daemon.runtime_dir import RuntimeDir
from kvferry_daemon.streams import Streams
from kvferry_daemon.traces import traces
from kvferry_daemon.transports.nixl.ways import begin as begin_ways
from kvferry_daemon.transports.tcp.events import Enter
from kvferry_daemon.transports.tcp.staging import plain_buffer
from kvferry_daemon.transports.tcp.tls import Certificate
from kvferry_proto import control

log = logging.getLogger(__name__)
DRAIN_LOOK_S = 0.05
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
        self._take_directory(placement)
        access = config.access
        self._sockets = Sockets(access, self._keys, config.connections_max, self._on_refused)
        loop = asyncio.get_running_loop()
        self.life = begin(self.directory, config, loop.time())
        port = self._sockets.bind_peer(config.peer_host, config.peer_port, self.life.peer_port)
        self.peer_address = self._address_at(port)
        self._liveness = Liveness(self.directory.workers)
        self.node = Node(
            settings_of(config, self.peer_address, self.life.daemon_id, self.life.number),
            lambda: secrets.token_bytes(32),
            0,
            loop.time(),
        )
        self._outbound = Outbound(self.node, self._sockets.context, self._keys, self._liveness)
        self._begin_effects(placement, device)
        self._begin_streams(placement, device, certificate)
        self._begin_links()
        self.operators = ControlDesk(self.node, self.effects.feed, self.status, access.operators)
        self.failed: asyncio.Future[str] = loop.create_future()  # why nothing can be kept any more
        self._begin_ledger(port)
        self._io_threads = IoThreads()
        self.lag = LoopLag()
        self._lately = Lately(self.node)
        self.closed_first: Callable[[], Awaitable[None]] | None = None
        self._messages = self._turns = 0
        self._watch = loop.create_task(self._watch_all())

    def _take_directory(self, placement: Placement) -> None:
        access = self.config.access
        self.directory = RuntimeDir(self.config.runtime_dir, access)
        if access.by_tenant:
            check_lists(self.directory.pools)
        self._placed = control.PlacementStatus(
            huge_pages=huge_pages(self.directory.pools),
            numa_node=placement.node,
            copy_cpus=cpu_list(placement.cpus),
        )

    def _address_at(self, port: int) -> str:
        host = bracketed(self.config.advertise_host or self.config.peer_host)
        address = f"tcp://{host}:{port}"
        return address if self._keys is None else f"{address}?key={self._keys.public}"

    def _begin_effects(self, placement: Placement, device: Device | None) -> None:
        new_buffer = plain_buffer if device is None else device.buffer
        self.effects = Effects(
            self.node, self._outbound, self.directory.pools, placement, device, new_buffer
        )
        now_s = asyncio.get_running_loop().time
        self._traces = traces(self.config.otlp_endpoint, self.node.settings.boot_id, now_s)
        if self._traces is not None:
            self.effects.tellers.append(self._traces.tell)

    def _begin_streams(
        self, placement: Placement, device: Device | None, certificate: Certificate | None
    ) -> None:
        config, node = self.config, self.node
        enter = placement.enter if device is None else _both(placement.enter, device.enter)
        node.ways, poller = begin_ways(
            config.transport,
            device is not None,
            enter,
            config.payload_encryption,
            config.access.by_tenant,
        )
        self.streams = Streams(
            config.peer_host,
            config.data_port,
            config.checksum,
            self.effects.feed,
            node.sinks.named,
            poller,
            placement.enter,
            plain_buffer if device is None else device.buffer,
            certificate,
        )
        node.data_port = self.streams.listener.port
        node.sources.streams.connections_max = data_connections_max()
        node.certificate_sha256 = None if certificate is None else certificate.sha256
        self.effects.use_streams(self.streams)

    def _begin_links(self) -> None:
        """From here on workers and operators reach us."""
        gates, feed = self._sockets.gates, self.effects.feed
        rate = self.config.messages_a_s
        inbound = Inbound(self.node, feed, self._outbound, self._liveness, self._keys, rate)
        self._peers = ZmqLink(
            self._sockets.peer,
            lambda frames: self._on_peer(inbound, frames),
            names_users=self._keys is not None,
            throw_out=gates[PEER].throw_out_sender,
            is_unwanted=inbound.is_unwanted_of_peer,
            cut_off=gates[PEER].cut_off,
        )
        self._workers = self._local_link(
            self.directory.worker_socket,
            WORKER,
            lambda frames: inbound.on_worker(frames, self._workers.user),
            inbound.is_unwanted_of_worker,
        )
        self._control = self._local_link(self.directory.control_socket, CONTROL, self._on_control)
        links = {PEER: self._peers, WORKER: self._workers, CONTROL: self._control}
        self._pressure = Pressure(
            [(gates[name], link) for name, link in links.items()],
            self._outbound.source_links,
            self._outbound.shun_endpoint,
        )
        self._outbound.use_links(self._workers, self._peers, inbound, feed)

    def _on_peer(self, inbound: Inbound, frames: list[bytes]) -> None:
        self.streams.catch_up()
        inbound.on_peer(frames, self._peers.user)

    def _local_link(
        self,
        path: Path,
        domain: str,
        on_message: Callable[[list[bytes]], None],
        is_unwanted: Callable[[bytes, str], bool] | None = None,
    ) -> ZmqLink:
        socket = self._sockets.bind_local(path, domain)
        self.directory.share_socket(path)
        gate = self._sockets.gates[domain]
        return ZmqLink(
            socket,
            on_message,
            names_users=True,
            throw_out=gate.throw_out_sender,
            is_unwanted=is_unwanted,
            cut_off=gate.cut_off,
        )

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
        for link in (self._workers, self._control, self._peers, self._sockets.doorkeeper):
            link.close()
        self._sockets.close_gates()
        self._outbound.close()
        self.streams.close()
        self._liveness.close()
        self._sockets.context.term()
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
            self._outbound.close_distrusted()

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
        for name, gate in self._sockets.gates.items():
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


def _both(one: Enter, other: Enter) -> Enter:
    def enter() -> None:
        one()
        other()

    return enter
