"""Bounds the connections of ZeroMQ sockets: libzmq itself takes in whoever connects.

It tells of each connection that it has accepted, with its descriptor (a socket monitor). One over a
bound is shut down at once, before its handshake has begun. A thread listens: libzmq's own one waits
for who is told, so a loop that stands still would hold all sockets up.
"""

import errno
import logging
import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from stat import S_ISSOCK
from time import monotonic

import zmq

from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.crowd import MANY, Bounds, Crowd
from kvferry_daemon.core.hosts import host_of
from kvferry_daemon.core.sink_streams import CONNECTIONS_MAX
from kvferry_daemon.links.zap import CONTROL, LOCAL, PEER, WORKER

HEARD = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
EVENT = struct.Struct("=Hi")  # which, and the descriptor
CREDENTIALS = struct.Struct("3i")
ONE = "pid "
OTHER_DESCRIPTORS = 8192  # data connections, pools, locks, links to sources
JOIN_S = 5.0
TELL_S = 1.0
log = logging.getLogger(__name__)


def bounds_of(connections_max: int) -> dict[str, Bounds]:
    """By socket. A client has up to 33 connections, a daemon one to each that it pulls from.

    Takes as many descriptors as the process may have: without one left, libzmq would go on trying
    to take a connection in, and the ledger and data connections would fail.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * connections_max + OTHER_DESCRIPTORS
    if soft < wanted and soft != resource.RLIM_INFINITY:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    at_once = connections_max if soft == resource.RLIM_INFINITY else min(connections_max, soft // 4)
    return {
        WORKER: Bounds(at_once, of_one=128, a_s=2000, of_one_a_s=200),
        PEER: Bounds(at_once, of_one=256, a_s=2000, of_one_a_s=200),
        CONTROL: Bounds(256, of_one=64, a_s=500, of_one_a_s=200),
    }


def data_connections_max() -> int:
    """How many sinks may open in all, by the descriptors that ``bounds_of`` has got: two each."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else min(CONNECTIONS_MAX, soft // 8)


class Gate:
    """One a listening socket. Make it before the socket binds."""

    def __init__(self, listening: zmq.Socket[bytes], name: str, crowd: Crowd) -> None:
        self.refused = 0
        self.cut_off: set[int] = set()  # by us; what is left of their messages nobody waits for
        self._name = name
        self._crowd = crowd
        self._lock = threading.Lock()  # of the crowd: the loop and the watch of memory ask too
        self._endpoint = ""  # known with the first connection
        self._told_at_s = -TELL_S
        self._told_of = 0  # by the log
        self._faults_told = Allowances(1 / TELL_S)
        self._monitor = listening.get_monitor_socket(HEARD)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._thread = threading.Thread(target=self._run, name=f"kvferry-gate-{name}", daemon=True)
        self._thread.start()

    @property
    def connections(self) -> dict[int, str]:
        """Descriptors of those that are in, and who opened each."""
        with self._lock:
            return self._crowd.inside

    def cut(self, descriptor: int, source: str) -> None:
        """End a connection, if it is still theirs; libzmq lets go of what it has of it."""
        with suppress(OSError), opened(descriptor) as connection:
            is_ours = self._endpoint.endswith(listening_at(connection))
            if is_ours and source_of(connection) == source:
                self.cut_off.add(descriptor)
                if not is_same(descriptor, connection):  # it ended, and was told of, just before
                    self.cut_off.discard(descriptor)
                connection.shutdown(socket.SHUT_RDWR)

    def throw_out(self, descriptor: int, source: str) -> None:
        """End the connection of somebody who cannot be honest, and let him wait before the next.

        It may have ended, and its descriptor be another one's by now.
        """
        with self._lock:
            self._crowd.bar(source, monotonic())
        self.cut(descriptor, source)

    def throw_out_sender(self, descriptor: int, address: str) -> None:
        """The same, by the ``Peer-Address`` of a message that he sent."""
        self.throw_out(descriptor, source_named(address))

    def close(self) -> None:
        """After the socket has closed, of which libzmq tells by itself.

        To end the monitor before is to wait for this thread with the GIL, which it needs: for ever,
        if so many connect just then that it has not heard of all.
        """
        self._thread.join(JOIN_S)

    def _run(self) -> None:
        with self._monitor:
            while True:
                facts, endpoint = self._monitor.recv_multipart()
                event, descriptor = EVENT.unpack(facts)
                if event == zmq.EVENT_MONITOR_STOPPED:
                    return
                try:
                    self._heard(event, descriptor, endpoint.decode())
                except Exception:  # a fault of ours: without this thread libzmq's stands still
                    if not self._faults_told.wait_s("", monotonic()):
                        log.exception("lost count of connections to the %s socket", self._name)

    def _heard(self, event: int, descriptor: int, endpoint: str) -> None:
        self.cut_off.discard(descriptor)  # it has ended, or its number is another one's by now
        if event == zmq.EVENT_ACCEPTED:
            self._endpoint = endpoint
            self._arrived(descriptor)
        else:
            with self._lock:
                self._crowd.left(descriptor)

    def _arrived(self, descriptor: int) -> None:
        with suppress(OSError), opened(descriptor) as connection:
            if not self._endpoint.endswith(listening_at(connection)):
                return  # it has ended by itself, and its number is another one's by now
            source = source_of(connection)
            with self._lock:
                why = self._crowd.arrived(descriptor, source, monotonic())
                is_barred = self._crowd.is_barred(source)
            if why:
                self.refused += 1
                self._tell(why)
                if is_barred:  # what was sent by then would come through; others come again
                    self.cut_off.add(descriptor)
                connection.shutdown(socket.SHUT_RDWR)

    def _tell(self, why: str) -> None:
        """Now and then only: strangers must not fill the log."""
        if monotonic() - self._told_at_s >= TELL_S:
            before = self.refused - self._told_of - 1
            others = f" (and {before} before it)" if before else ""
            log.warning("cut a connection to the %s socket: %s%s", self._name, why, others)
            self._told_at_s, self._told_of = monotonic(), self.refused


@contextmanager
def opened(descriptor: int) -> Iterator[socket.socket]:
    """A socket of libzmq's, for a moment; OSError if it is none any more."""
    if not S_ISSOCK(os.fstat(descriptor).st_mode):  # to close a copy of a file drops its locks
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    copy = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with connection:
        yield connection


def is_same(descriptor: int, connection: socket.socket) -> bool:
    """Whether a copy that was opened is still one of what has the descriptor now."""
    try:
        return os.path.sameopenfile(descriptor, connection.fileno())
    except OSError:
        return False


def listening_at(connection: socket.socket) -> str:
    """The end of the endpoint that took it in."""
    if connection.family == socket.AF_UNIX:
        return f"ipc://{connection.getsockname()}"
    return f":{connection.getsockname()[1]}"


def source_of(connection: socket.socket) -> str:
    """A process of this machine, or another host; OSError if it has ended."""
    if connection.family == socket.AF_UNIX:
        said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        pid, uid, _ = CREDENTIALS.unpack(said)
        return process(pid, uid)
    return host_of(str(connection.getpeername()[0]))


def source_named(address: str) -> str:
    """The same, of the connection that brought a message with this ``Peer-Address``."""
    found = LOCAL.fullmatch(address)
    return process(int(found[3]), int(found[1])) if found else host_of(address)


def process(pid: int, uid: int) -> str:
    """A source's name; 0 is the number of all that are in PID namespaces that are not ours."""
    return f"{ONE}{pid} of uid {uid}" if pid else f"{MANY}{uid}"


def is_process(source: str) -> bool:
    """Whether a source is one process of this machine: not a host, and not a user's many."""
    return source.startswith(ONE)
