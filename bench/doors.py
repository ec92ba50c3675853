"""How attackers come to a daemon's doors: they pour, ask, knock, or stand in them."""

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count, cycle
from pathlib import Path
from typing import NamedTuple

import zmq

from bench.zmtp import joined

MIB = 1 << 20
AGAIN_S = 0.05  # after it was cut
KNOCK_S = 0.01  # where its queue is full, the kernel would wait for a second
PATIENCE_S = 0.2  # for an answer: who asks too much is not told each time


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


Attack = Callable[[Target], None]


def pour(
    address: str,
    parts: Iterable[bytes],
    first: bytes = b"",
    *,
    reads: bool = False,
    again_s: float = AGAIN_S,
) -> None:
    """Send one part after the other, on a new connection when the one before was cut.

    ``first``: what every connection says before. ``reads``: take what is answered, too.
    """
    left = iter(parts)
    while True:
        try:
            with joined(address) as one:
                if reads:
                    threading.Thread(target=take, args=(one,), daemon=True).start()
                one.sendall(first)
                for part in left:
                    one.sendall(part)
        except OSError:
            time.sleep(again_s)


def together(jobs: Iterable[Callable[[], None]]) -> None:
    """Each in a thread of its own, until one of them ends."""
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for one in threads:
        one.start()
    while all(one.is_alive() for one in threads):
        time.sleep(AGAIN_S)


def take(one: socket.socket) -> None:
    """Read what comes, and forget it, until the connection ends."""
    with suppress(OSError):
        while one.recv(MIB):
            pass


def ask(
    address: str,
    questions: Iterable[bytes],
    hello: bytes = b"",
    *,
    connections: int = 1,
    at_once: int = 8,
    patience_s: float = PATIENCE_S,
) -> None:
    """Ask without a pause and take every answer: so many questions of each connection at once.

    ``hello``: what is said on every connection before.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = [asking_socket(context, address, patience_s) for _ in range(connections)]
    asked = dict.fromkeys(sockets, 0)
    for one in sockets:
        _greet(one, hello)
    for one, question in zip(cycle(sockets), questions, strict=False):
        try:
            one.send(question)
            asked[one] += 1
            if asked[one] >= at_once:
                one.recv()
                asked[one] -= 1
        except zmq.Again:  # cut, it may be: libzmq connects again by itself, but as somebody new
            _greet(one, hello)
            asked[one] = 0


def _greet(one: "zmq.Socket[bytes]", hello: bytes) -> None:
    if hello:
        with suppress(zmq.Again):
            one.send(hello)


def asking_socket(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, patience_s: float = PATIENCE_S
) -> "zmq.Socket[bytes]":
    """A socket that waits for nothing for long."""
    one = context.socket(zmq.DEALER)
    for option in (zmq.SNDTIMEO, zmq.RCVTIMEO):
        one.setsockopt(option, int(patience_s * 1000))
    one.setsockopt(zmq.LINGER, 0)
    one.connect(address)
    return one


def plain(target: Target, port: int, wait_s: float | None = None) -> socket.socket:
    """A connection that says nothing: to a port, or to the worker socket."""
    if port:
        return socket.create_connection(("127.0.0.1", port), wait_s)
    one = socket.socket(socket.AF_UNIX)
    try:
        one.settimeout(wait_s)
        one.connect(str(target.directory / "worker.sock"))
    except OSError:
        one.close()
        raise
    return one


def knock(target: Target, port: int) -> None:
    """Connect and close without a pause."""
    while True:
        with suppress(OSError):
            plain(target, port, KNOCK_S).close()


def connect_and_keep(target: Target, port: int, *, first: bytes = b"", drip: bytes = b"") -> None:
    """Connect for ever, say ``first``; keep what was not cut, and send a byte now and then."""
    kept: list[socket.socket] = []
    for number in count():
        try:
            kept.append(plain(target, port, KNOCK_S))
            kept[-1].setblocking(False)
            kept[-1].send(first)
        except OSError as error:
            if error.errno == errno.EMFILE:  # else its queue is full: what is kept holds it
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
