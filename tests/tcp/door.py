"""A listener to knock at, and what the tests ask of a connection."""

import queue
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp.listener import Listener, connect
from kvferry_daemon.transports.tcp.tls import Certificate

WAIT_S = 10.0
HOST = "127.0.0.1"
TICKET, OTHER = b"t" * 32, b"o" * 32
Events = queue.Queue[te.StreamEvent]


class Door:
    """A listener, and the connections that came through it."""

    def __init__(
        self,
        post: Callable[[te.StreamEvent], None] | None = None,
        host: str = HOST,
        certificate: Certificate | None = None,
    ) -> None:
        self.events: Events = queue.Queue()
        self.host = host
        self.certificate = certificate
        self.listener = Listener(host, 0, post or self.events.put, certificate)
        self.clients: list[socket.socket] = []

    def dial(self) -> socket.socket:
        """A connection that has said nothing yet."""
        client = socket.create_connection((self.host, self.listener.port), WAIT_S)
        self.clients.append(client)
        return client

    def connect(self, ticket: bytes) -> socket.socket:
        """What a sink's daemon does."""
        certificate = self.certificate.sha256 if self.certificate is not None else None
        client = connect(self.host, self.listener.port, ticket, WAIT_S, certificate)
        self.clients.append(client)
        return client

    def opened(self) -> te.StreamOpened:
        """The next connection that was let in."""
        event = self.events.get(timeout=WAIT_S)
        assert isinstance(event, te.StreamOpened)
        self.clients.append(event.sock)
        return event

    def close(self) -> None:
        self.listener.close()
        while not self.events.empty():
            self.opened()
        for client in self.clients:
            client.close()


def ended(sock: socket.socket, within_s: float) -> bool:
    """Whether the other side closes within the time."""
    sock.settimeout(within_s)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def greeters() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_greet" in thread.name]


def client_hello() -> bytes:
    """The first bytes that a sink sends under TLS."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()
