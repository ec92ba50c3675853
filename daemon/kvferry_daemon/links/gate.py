"""Bounds the connections of ZeroMQ sockets: libzmq itself takes in whoever connects.

It tells of each connection that it has accepted, with its descriptor (a socket monitor). One over a
bound is shut down at once, before its handshake has begun. A thread listens: libzmq's own one waits
for who is told, so a loop that stands still would hold all sockets up.
"""

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic

import zmq

from kvferry_daemon.core.crowd import ANYBODY, Crowd

HEARD = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
EVENT = struct.Struct("=Hi")  # which, and the descriptor
CREDENTIALS = struct.Struct("3i")
JOIN_S = 5.0
TELL_S = 1.0
log = logging.getLogger(__name__)


class Gate:
    """One a listening socket. Make it before the socket binds."""

    def __init__(
        self, listening: zmq.Socket[bytes], name: str, crowd: Crowd, on_refused: Callable[[], None]
    ) -> None:
        """``on_refused`` is called in a thread of ours."""
        self._listening = listening
        self._name = name
        self._crowd = crowd
        self._on_refused = on_refused
        self._told_at_s = -TELL_S
        self._refused = 0  # that the log has not been told of
        self._monitor = listening.get_monitor_socket(HEARD)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._thread = threading.Thread(target=self._run, name=f"kvferry-gate-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Before the socket closes."""
        self._listening.disable_monitor()
        self._thread.join(JOIN_S)

    def _run(self) -> None:
        with self._monitor:
            while True:
                facts, endpoint = self._monitor.recv_multipart()
                event, descriptor = EVENT.unpack(facts)
                if event == zmq.EVENT_ACCEPTED:
                    self._arrived(descriptor, endpoint.decode())
                elif event == zmq.EVENT_DISCONNECTED:
                    self._crowd.left(descriptor)
                else:
                    return

    def _arrived(self, descriptor: int, endpoint: str) -> None:
        why = ""
        with suppress(OSError), opened(descriptor) as connection:
            if not endpoint.endswith(listening_at(connection)):
                return  # it has ended by itself, and its number is another one's by now
            why = self._crowd.arrived(descriptor, source_of(connection), monotonic())
            if why:
                connection.shutdown(socket.SHUT_RDWR)
        if why:
            self._on_refused()
            self._tell(why)

    def _tell(self, why: str) -> None:
        self._refused += 1
        if monotonic() - self._told_at_s >= TELL_S:
            others = f" (and {self._refused - 1} before it)" if self._refused > 1 else ""
            log.warning("cut a connection to the %s socket: %s%s", self._name, why, others)
            self._told_at_s, self._refused = monotonic(), 0


@contextmanager
def opened(descriptor: int) -> Iterator[socket.socket]:
    """A socket of libzmq's, for a moment; OSError if it is none any more."""
    copy = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with connection:
        yield connection


def listening_at(connection: socket.socket) -> str:
    """The end of the endpoint that took it in."""
    if connection.family == socket.AF_UNIX:
        return f"ipc://{connection.getsockname()}"
    return f":{connection.getsockname()[1]}"


def source_of(connection: socket.socket) -> str:
    """A process of this machine, or the address of another one; OSError if it has ended."""
    if connection.family == socket.AF_UNIX:
        said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        pid, uid, _ = CREDENTIALS.unpack(said)
        return f"pid {pid} of uid {uid}" if pid else ANYBODY  # 0: in a namespace that is not ours
    return str(connection.getpeername()[0])
