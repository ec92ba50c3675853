"""Data connections come in here: each shows a single-use ticket, or is turned away."""

import contextlib
import errno
import itertools
import socket
import threading
import time
from collections.abc import Hashable
from typing import NamedTuple

from kvferry_daemon.core.hosts import host_of
from kvferry_daemon.transports.tcp.events import Post, StreamOpened
from kvferry_daemon.transports.tcp.tls import Certificate, connect_tls
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
HANDSHAKES_MAX = 64
HANDSHAKES_OF_ONE = 16  # host: as many as a daemon has streams to another
REFUSED_S = 0.001  # before the next one: who floods us waits in the kernel's queue, and is slow
AGAIN_S = 0.1
SOCKET_BUFFER_BYTES = 4 << 20
KEEPALIVE_S = 5
KEEPALIVES = 3  # without an answer: its host is gone; a stopped process has a kernel that answers


class ConnectError(Exception):
    """No data connection came about; the message says what the other end did."""


def connect(
    host: str, port: int, ticket: bytes, timeout_s: float, certificate_sha256: bytes | None = None
) -> socket.socket:
    """Open a data connection to a source's daemon; raise ConnectError.

    It is encrypted where the certificate is known that whoever answers has to show.
    """
    where = f"{host}:{port}"
    try:
        sock = socket.create_connection((host, port), timeout_s)
    except OSError as error:
        raise ConnectError(f"{where}: {error.strerror or error}") from error
    until_s = time.monotonic() + HANDSHAKE_S
    try:
        tune(sock)
        if certificate_sha256 is not None:
            sock = connect_tls(sock, certificate_sha256, until_s)
        sock.sendall(pack_greeting(ticket))
        answer = _receive(sock, ACCEPT_BYTES, until_s)
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


class _Ticket(NamedTuple):
    key: Hashable
    stream: Hashable
    until_s: float


class _HalfOpen(NamedTuple):
    host: str
    handle: socket.socket  # another one for the same connection: TLS takes the first one over


class Listener:
    """Accepts on a thread of its own; a bounded number of handshakes at a time.

    One more ends the oldest of them: a good one is over at once, so that one is somebody's who only
    wants to be in the way.

    A key names one connection: there is no ticket for it any more once one was shown. Else the end
    of one connection would pass for the end of another. A newer ticket ends the earlier one of the
    same key, or of the same stream, which has one connection at a time.
    """

    def __init__(
        self, host: str, port: int, post: Post, certificate: Certificate | None = None
    ) -> None:
        """With a certificate, connections in clear are turned away."""
        self._post = post
        self._certificate = certificate
        self._lock = threading.Lock()  # held for a few dict look-ups at a time
        self._tickets: dict[bytes, _Ticket] = {}  # the first to expire comes first
        self._ticket_of: dict[Hashable, bytes] = {}  # by stream
        self._shown: set[Hashable] = set()  # their connections are on their way to the loop
        self._closed = False
        self._numbers = itertools.count()
        self._half_open: dict[int, _HalfOpen] = {}  # handshakes under way; the oldest comes first
        self.refused = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.create_server((host.strip("[]"), port), family=family, backlog=128)
        self.port = int(self._sock.getsockname()[1])
        threading.Thread(target=self._run, name="kvferry-accept", daemon=True).start()

    def admit(
        self, ticket: bytes, key: Hashable, expires_in_s: float, stream: Hashable = None
    ) -> None:
        """Let one connection in that shows this ticket within the time.

        ``stream``: whose connection it is; None: the key's own.
        """
        now_s = time.monotonic()
        stream = key if stream is None else stream
        with self._lock:
            self._drop_expired(now_s)
            if key in self._shown:
                return
            self._tickets.pop(self._ticket_of.get(stream, b""), None)
            self._tickets[ticket] = _Ticket(key, stream, now_s + expires_in_s)
            self._ticket_of[stream] = ticket

    def opened(self, key: Hashable) -> None:
        """The loop has got this connection: whoever admits keys knows of it from now on."""
        with self._lock:
            self._shown.discard(key)

    def _drop_expired(self, now_s: float) -> None:
        while self._tickets:
            ticket, found = next(iter(self._tickets.items()))
            if now_s < found.until_s:
                return
            del self._tickets[ticket], self._ticket_of[found.stream]

    def close(self) -> None:
        """Stop listening."""
        self._closed = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise
        self._sock.close()

    def _run(self) -> None:
        while True:
            try:
                sock, address = self._sock.accept()
            except OSError as error:
                if self._closed:
                    return
                if error.errno != errno.ECONNABORTED:  # it may also be the last error of a network
                    time.sleep(AGAIN_S)  # or we are out of something: others will give some back
                continue
            try:
                number = self._begin(sock, host_of(address[0]))
            except OSError:  # no descriptor to be had
                sock.close()
                time.sleep(AGAIN_S)
                continue
            try:
                threading.Thread(target=self._greet, args=(sock, number), daemon=True).start()
            except RuntimeError:  # no thread to be had
                self._has_ended(number)
                sock.close()
                time.sleep(AGAIN_S)

    def _begin(self, sock: socket.socket, host: str) -> int:
        """Note one more handshake, and end the one that has to make room for it; OSError."""
        handle = sock.dup()
        number = next(self._numbers)
        with self._lock:
            over = self._over(host)
            self._half_open[number] = _HalfOpen(host, handle)
        if over is not None:
            self.refused += 1
            with contextlib.suppress(OSError):  # it has just ended by itself
                over.handle.shutdown(socket.SHUT_RDWR)  # its thread notices
            over.handle.close()
            time.sleep(REFUSED_S)
        return number

    def _over(self, host: str) -> _HalfOpen | None:
        """Take the oldest one out, of this host or of all, if there are too many."""
        same = [number for number, one in self._half_open.items() if one.host == host]
        if len(same) >= HANDSHAKES_OF_ONE:
            return self._half_open.pop(same[0])
        if len(self._half_open) >= HANDSHAKES_MAX:
            return self._half_open.pop(next(iter(self._half_open)))
        return None

    def _has_ended(self, number: int) -> None:
        with self._lock:
            found = self._half_open.pop(number, None)
        if found is not None:
            found.handle.close()

    def _greet(self, sock: socket.socket, number: int) -> None:
        until_s = time.monotonic() + HANDSHAKE_S
        try:
            tune(sock)
            if self._certificate is not None:
                sock = self._certificate.accept(sock, until_s)
            key = self._check(read_greeting(_receive(sock, GREETING_BYTES, until_s)))
            if key is None:
                sock.sendall(pack_accept(False))
        except (OSError, BadChunk):
            key = None
        finally:
            self._has_ended(number)
        if key is None:
            sock.close()
            return
        self._post(StreamOpened(key, sock))  # before the accept: pulls may follow at once
        with contextlib.suppress(OSError):  # it is the sender's now, which notices the end itself
            sock.sendall(pack_accept(True))

    def _check(self, ticket: bytes) -> Hashable | None:
        """The key of a ticket that is good; from here on StreamOpened follows."""
        with self._lock:
            found = self._tickets.pop(ticket, None)
            if found is None:
                return None
            del self._ticket_of[found.stream]
            if time.monotonic() >= found.until_s:
                return None
            self._shown.add(found.key)
            return found.key


def tune(sock: socket.socket) -> None:
    """Set the options of a data connection, which must be there already."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVES)
    if sock.getsockname()[0] == sock.getpeername()[0]:
        # Nothing lies between that could be congested, and pacing as bbr's halves the rate there.
        with contextlib.suppress(PermissionError):  # the host's operator allows it to nobody
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _receive(sock: socket.socket, size: int, until_s: float) -> bytes:
    """Read exactly ``size`` bytes until then."""
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
