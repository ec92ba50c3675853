"""One attack each, until somebody ends it: `python -m bench.attackers NAME DIRECTORY PEER DATA HTTP`."""

import itertools
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.zmtp import GREETING, MORE, frame, joined
from kvferry_proto import control, worker

MIB = 1 << 20
AGAIN_S = 0.05  # after it was cut


class Target(NamedTuple):
    """Where a daemon listens."""

    directory: Path
    peer: str
    data_port: int
    http_port: int

    @property
    def worker(self) -> str:
        return f"ipc://{self.directory / 'worker.sock'}"

    @property
    def control(self) -> str:
        return f"ipc://{self.directory / 'control.sock'}"

    @property
    def peer_port(self) -> int:
        return int(self.peer.rpartition(":")[2])


def pour(address: str, data: bytes) -> None:
    """Send the same for ever, on a new connection when the one before was cut."""
    while True:
        try:
            with joined(address) as one:
                while True:
                    one.sendall(data)
        except OSError:
            time.sleep(AGAIN_S)


def plain(target: Target, port: int) -> socket.socket:
    """A connection that says nothing: to a port, or to the worker socket."""
    if port:
        return socket.create_connection(("127.0.0.1", port))
    one = socket.socket(socket.AF_UNIX)
    one.connect(str(target.directory / "worker.sock"))
    return one


def connect_and_keep(target: Target, port: int, *, drip: bytes = b"") -> None:
    """Connect for ever; keep what was not cut, and send a byte now and then."""
    kept: list[socket.socket] = []
    for number in itertools.count():
        try:
            kept.append(plain(target, port))
            kept[-1].setblocking(False)
        except OSError:  # no more to be had here
            for one in kept[: len(kept) // 2]:
                one.close()
            kept = kept[len(kept) // 2 :]
        if drip and number % 200 == 0:
            time.sleep(1)
            for one in kept:
                try:
                    one.send(drip[:1])
                except OSError:
                    one.close()


def messages(target: Target) -> None:
    """Calls without a pause, from four connections' worth of frames at once."""
    pour(target.worker, frame(worker.CALLS.encode(worker.Heartbeat()), 0) * 1000)


def endless_to_worker(target: Target) -> None:
    """One message that has no end."""
    pour(target.worker, frame(os.urandom(MIB), MORE))


def endless_to_peer(target: Target) -> None:
    """The same from the network, in clear."""
    pour(target.peer, frame(os.urandom(MIB), MORE))


def frames(target: Target) -> None:
    """Messages of 300,000 frames."""
    pour(target.worker, frame(b"x", MORE) * 300_000 + frame(b"x", 0))


def unread(target: Target) -> None:
    """Questions of an operator who never reads an answer."""
    pour(target.control, frame(control.REQUESTS.encode(control.GetTransfers()), 0) * 100)


def half_open_to_worker(target: Target) -> None:
    """Connections that never begin their handshake."""
    connect_and_keep(target, 0)


def half_open_to_peer(target: Target) -> None:
    """The same from the network."""
    connect_and_keep(target, target.peer_port)


def drops_to_peer(target: Target) -> None:
    """A greeting of one byte a second, on as many connections as there are to be had."""
    connect_and_keep(target, target.peer_port, drip=GREETING)


def half_open_to_data(target: Target) -> None:
    """Data connections that never show a ticket."""
    connect_and_keep(target, target.data_port)


def half_open_to_http(target: Target) -> None:
    """HTTP connections that never ask."""
    connect_and_keep(target, target.http_port)


def http_requests(target: Target) -> None:
    """Metrics, without a pause."""
    while True:
        try:
            with plain(target, target.http_port) as one:
                one.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
                one.recv(1 << 16)
        except OSError:
            time.sleep(AGAIN_S)


ATTACKS: dict[str, Callable[[Target], None]] = {
    one.__name__: one
    for one in (
        messages,
        endless_to_worker,
        endless_to_peer,
        frames,
        unread,
        half_open_to_worker,
        half_open_to_peer,
        drops_to_peer,
        half_open_to_data,
        half_open_to_http,
        http_requests,
    )
}

if __name__ == "__main__":
    name, directory, peer, data_port, http_port = sys.argv[1:]
    ATTACKS[name](Target(Path(directory), peer, int(data_port), int(http_port)))
