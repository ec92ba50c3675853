"""Data connections come in here: each shows a single-use ticket, or is turned away."""

import errno
import socket
import threading
import time
from collections.abc import Hashable

from kvferry_daemon.transports.tcp.events import Post, StreamOpened
from kvferry_proto.chunk import (
    ACCEPT_BYTES,
    GREETING_BYTES,
    BadChunk,
    pack_accept,
    pack_greeting,
    read_accept,
    read_greeting,
)

HANDSHAKE_S = 5.0
HANDSHAKES_MAX = 32
SOCKET_BUFFER_BYTES = 4 << 20


class ConnectError(Exception):
    """No data connection came about; the message says what the other end did."""


def connect(host: str, port: int, ticket: bytes, timeout_s: float) -> socket.socket:
    """Open a data connection to a source's daemon; raise ConnectError."""
    where = f"{host}:{port}"
    try:
        sock = socket.create_connection((host, port), timeout_s)
    except OSError as error:
        raise ConnectError(f"{where}: {error.strerror or error}") from error
    try:
        _tune(sock)
        sock.sendall(pack_greeting(ticket))
        answer = _receive(sock, ACCEPT_BYTES)
        if not read_accept(answer):
            raise ConnectError(f"{where} refused the ticket")
    except (OSError, BadChunk) as error:
        sock.close()
        raise ConnectError(f"{where} is no kvferry data port: {error}") from error
    except ConnectError:
        sock.close()
        raise
    sock.settimeout(None)
    return sock


class Listener:
    """Accepts on a thread of its own; a bounded number of handshakes at a time."""

    def __init__(self, host: str, port: int, post: Post) -> None:
        self._post = post
        self._tickets: dict[bytes, tuple[Hashable, float]] = {}
        self._handshakes = threading.Semaphore(HANDSHAKES_MAX)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.create_server((host.strip("[]"), port), family=family, backlog=128)
        self.port = int(self._sock.getsockname()[1])
        threading.Thread(target=self._run, name="kvferry-accept", daemon=True).start()

    def admit(self, ticket: bytes, key: Hashable, expires_in_s: float) -> None:
        """Let one connection in that shows this ticket within the time."""
        now_s = time.monotonic()
        for old in [t for t, (_, until_s) in self._tickets.items() if until_s < now_s]:
            self._tickets.pop(old, None)
        self._tickets[ticket] = (key, now_s + expires_in_s)

    def close(self) -> None:
        """Stop listening."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise
        self._sock.close()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                    time.sleep(0.1)  # out of descriptors: others will close some
                    continue
                return  # closed
            if not self._handshakes.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(HANDSHAKE_S)
            key = self._check(read_greeting(_receive(sock, GREETING_BYTES)))
            if key is None:
                sock.sendall(pack_accept(False))
                sock.close()
                return
            _tune(sock)
            self._post(StreamOpened(key, sock))  # before the accept: pulls may follow at once
            sock.sendall(pack_accept(True))
        except (OSError, BadChunk):
            sock.close()
        finally:
            self._handshakes.release()

    def _check(self, ticket: bytes) -> Hashable | None:
        key, until_s = self._tickets.pop(ticket, (None, 0.0))
        return key if time.monotonic() < until_s else None


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def _receive(sock: socket.socket, size: int) -> bytes:
    """Read exactly ``size`` bytes within HANDSHAKE_S in all."""
    until_s = time.monotonic() + HANDSHAKE_S
    data = b""
    while len(data) < size:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the other side is too slow")
        sock.settimeout(left_s)
        part = sock.recv(size - len(data))
        if not part:
            raise BadChunk("the connection ended in its handshake")
        data += part
    return data
