"""Attacks at the data port, and for tickets to it."""

import itertools
import socket
import ssl
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import zmq

from bench.attackers_peer import Link, framed
from bench.doors import (
    KNOCK_S,
    Attack,
    Target,
    asking_socket,
    connect_and_keep,
    plain,
    pour,
    together,
)
from bench.zmtp import WAIT_S
from kvferry_proto import peer
from kvferry_proto.chunk import ACCEPT_BYTES, pack_greeting

KEPT = 64  # data connections
SHAKERS = 32  # threads; a host may have 16 handshakes under way


def tickets(target: Target) -> None:
    """Tickets without an end, which nobody shows."""
    link = Link(target)

    def parts() -> Iterator[bytes]:
        for number in itertools.count():
            yield framed(link.wish(number))

    pour(target.peer, parts(), link.hello, reads=True)


def streams(target: Target) -> None:
    """Data connections with tickets without an end; the last ones stay open."""
    link = Link(target)
    kept: deque[socket.socket] = deque()
    asking = asking_socket(zmq.Context(), target.peer)
    asking.send(peer.MESSAGES.encode(link.said))
    asking.recv()
    for number in itertools.count():
        with suppress(OSError, zmq.Again):  # it is over a bound
            asking.send(peer.MESSAGES.encode(link.wish(number)))
            ticket = peer.MESSAGES.decode(asking.recv())
            if isinstance(ticket, peer.Ticket):
                kept.append(socket.create_connection(("127.0.0.1", ticket.port), WAIT_S))
                kept[-1].sendall(pack_greeting(ticket.ticket))
                kept[-1].recv(ACCEPT_BYTES)
        if len(kept) > KEPT:
            kept.popleft().close()


def tls_half_open(target: Target) -> None:
    """Handshakes that are begun and go no further."""
    connect_and_keep(target, target.data_port, first=client_hello())


def tls_handshakes(target: Target) -> None:
    """Whole handshakes, and then nothing, over and over."""
    together([partial(shake_for_ever, target)] * SHAKERS)


def shake_for_ever(target: Target) -> None:
    """One handshake after the other."""
    context = tls_context()
    while True:
        with suppress(OSError), plain(target, target.data_port, KNOCK_S) as one:
            one.settimeout(WAIT_S)
            context.wrap_socket(one).close()


def client_hello() -> bytes:
    """The first bytes that a sink sends under TLS."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        tls_context().wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def tls_context() -> ssl.SSLContext:
    """Any certificate will do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


ATTACKS: tuple[Attack, ...] = (tickets, streams, tls_half_open, tls_handshakes)
TLS = ("tls_half_open", "tls_handshakes")  # at a daemon that encrypts
