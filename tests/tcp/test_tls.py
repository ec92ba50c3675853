"""Data connections under TLS: who is let in, what is seen of them, and what ends them."""

import itertools
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp import listener as module
from kvferry_daemon.transports.tcp import tls
from kvferry_daemon.transports.tcp.listener import (
    HANDSHAKES_MAX,
    HANDSHAKES_OF_ONE,
    ConnectError,
    connect,
)
from kvferry_daemon.transports.tcp.receiver import StreamReceiver
from kvferry_daemon.transports.tcp.sender import SendJob, StreamSender
from kvferry_daemon.transports.tcp.tls import Certificate, TlsSocket, connect_tls
from kvferry_proto.chunk import pack_greeting
from tcp.door import HOST, TICKET, WAIT_S, Door, Events, client_hello, ended, greeters

SHORT_S = 0.4
SECRET = b"what nobody else may read" * 4


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return Certificate()


@pytest.fixture
def door(certificate: Certificate) -> Iterator[Door]:
    one = Door(certificate=certificate)
    yield one
    one.close()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handshakes have little time."""
    monkeypatch.setattr(module, "HANDSHAKE_S", SHORT_S)


@pytest.fixture
def ends(certificate: Certificate) -> Iterator[tuple[TlsSocket, TlsSocket, socket.socket]]:
    """Both ends of a connection, and what lies on the wire to the second one, before it has it."""
    with socket.create_server((HOST, 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    made: queue.Queue[TlsSocket] = queue.Queue()
    until_s = time.monotonic() + WAIT_S
    thread = threading.Thread(target=lambda: made.put(certificate.accept(near, until_s)))
    thread.start()
    sink = connect_tls(far, certificate.sha256, until_s)
    thread.join()
    source = made.get(timeout=WAIT_S)
    for end in (source, sink):
        end.settimeout(WAIT_S)
    yield source, sink, socket.socket(fileno=socket.dup(sink.fileno()))
    source.close()
    sink.close()


def no_greeters() -> bool:
    for thread in greeters():
        thread.join(WAIT_S)
    return not greeters()


def read_raw(wire: socket.socket) -> bytes:
    """Every byte on the wire up to the end of the connection."""
    wire.settimeout(WAIT_S)
    data = b""
    with suppress(ConnectionResetError):
        while part := wire.recv(1 << 16):
            data += part
    return data


# --- who is let in ---


def test_a_ticket_opens_an_encrypted_connection(door: Door) -> None:
    door.listener.admit(TICKET, "key", WAIT_S)
    client = door.connect(TICKET)
    event = door.opened()
    assert event.key == "key"
    for end in (client, event.sock):
        assert isinstance(end, TlsSocket)
        assert end.version() == "TLSv1.3"
    event.sock.sendall(b"!")
    assert client.recv(1) == b"!"


def test_whoever_has_another_certificate_is_told_no_ticket(door: Door) -> None:
    """He would have taken the connection over, between the two daemons."""
    door.listener.admit(TICKET, "key", WAIT_S)
    with pytest.raises(ConnectError, match="certificate is not the one"):
        connect(HOST, door.listener.port, TICKET, WAIT_S, Certificate().sha256)
    assert no_greeters()
    assert door.events.empty()
    door.connect(TICKET)  # it was not used up, since it was not shown
    assert door.opened().key == "key"


def test_a_connection_in_clear_is_turned_away(door: Door) -> None:
    door.listener.admit(TICKET, "key", WAIT_S)
    client = door.dial()
    client.sendall(pack_greeting(TICKET))
    client.settimeout(WAIT_S)
    assert len(read_raw(client)) < 16  # TLS's alert at most, and no accept
    assert no_greeters()
    assert door.events.empty()
    door.connect(TICKET)  # the ticket still stands
    assert door.opened().key == "key"


def test_a_source_in_clear_is_not_told_the_ticket(certificate: Certificate) -> None:
    door = Door()
    try:
        door.listener.admit(TICKET, "key", WAIT_S)
        with pytest.raises(ConnectError, match="is no kvferry data port"):
            connect(HOST, door.listener.port, TICKET, WAIT_S, certificate.sha256)
        door.connect(TICKET)
    finally:
        door.close()


def test_an_older_tls_is_turned_away(door: Door) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol version"):
        context.wrap_socket(door.dial())
    assert no_greeters()


# --- handshakes that do not end ---


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("said", [0, 20, None], ids=["nothing", "half", "all"])
def test_a_handshake_that_stands_still_is_cut(door: Door, said: int | None) -> None:
    hello = client_hello()[:said]
    began_s = time.monotonic()
    client = door.dial()
    client.sendall(hello)
    client.settimeout(WAIT_S)
    read_raw(client)
    assert SHORT_S * 0.5 <= time.monotonic() - began_s < WAIT_S / 2
    assert no_greeters()


@pytest.mark.usefixtures("short")
def test_a_handshake_in_drops_is_cut_by_one_deadline_for_all_of_it(door: Door) -> None:
    """Every byte comes well within the deadline; all of them together would not."""
    client = door.dial()
    began_s = time.monotonic()
    for byte in client_hello():
        try:
            client.send(bytes([byte]))
        except ConnectionError:
            break
        if ended(client, SHORT_S / 8):
            break
    else:
        raise AssertionError("it was let through")
    assert time.monotonic() - began_s < WAIT_S / 2
    assert no_greeters()


@pytest.mark.usefixtures("short")
def test_half_open_handshakes_do_not_stop_a_good_one_later(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = [door.dial() for _ in range(HANDSHAKES_MAX + 8)]
    assert all(ended(sock, WAIT_S) for sock in idle)
    assert no_greeters()
    monkeypatch.setattr(module, "HANDSHAKE_S", WAIT_S)
    door.listener.admit(TICKET, "key", WAIT_S)
    door.connect(TICKET)
    assert door.opened().key == "key"


def test_a_handshake_under_tls_makes_room_too(door: Door) -> None:
    """Its thread waits in OpenSSL, on a socket that is another object by then."""
    idle = [door.dial() for _ in range(HANDSHAKES_OF_ONE)]
    for one in idle:
        one.sendall(client_hello()[:100])
    late = [door.dial() for _ in range(4)]
    assert all(ended(sock, WAIT_S / 4) for sock in idle[:4])
    assert not ended(late[-1], SHORT_S / 4)


@pytest.mark.usefixtures("short")
def test_a_source_that_never_shakes_hands_is_given_up(certificate: Certificate) -> None:
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ConnectError, match="timed out"):
            connect(HOST, port, TICKET, WAIT_S, certificate.sha256)


# --- chunks ---


@pytest.mark.parametrize("checksum", [True, False])
def test_scattered_pieces_arrive_in_their_places(door: Door, checksum: bool) -> None:
    """Of every size: some share a record, some are many."""
    sent, received = Events(), Events()
    door.listener.admit(TICKET, "key", WAIT_S)
    sink_sock = door.connect(TICKET)
    source = bytearray(range(256)) * 40_000
    target = bytearray(len(source))
    sender = StreamSender(door.opened().sock, "key", sent.put, checksum)
    receiver = StreamReceiver(sink_sock, "key", received.put)
    half = len(source) // 2
    for number, cuts in enumerate([(0, 7, 20_000, half), (half, half + 1, half + 9, len(source))]):
        views = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        receiver.claim(1, number, 4, [memoryview(target)[view] for view in views])
        sender.put(SendJob("owner", 1, number, 4, [memoryview(source)[view] for view in views]))
    for number in (0, 1):
        assert sent.get(timeout=WAIT_S) == te.Sent("key", "owner", number, half)
        assert received.get(timeout=WAIT_S) == te.Received("key", 1, number, half)
    assert target == source
    sender.close()
    assert isinstance(sent.get(timeout=WAIT_S), te.StreamDown)
    down = received.get(timeout=WAIT_S)
    assert down == te.StreamDown("key", "closed by the other side")


def test_a_blocked_sender_ends_when_it_is_closed(door: Door) -> None:
    door.listener.admit(TICKET, "key", WAIT_S)
    door.connect(TICKET)  # it never reads
    events = Events()
    sender = StreamSender(door.opened().sock, "key", events.put, checksum=False)
    payload = memoryview(bytearray(64 << 20))  # more than the kernel keeps for it
    sender.put(SendJob("owner", 1, 0, 4, [payload]))
    sender.close()
    assert isinstance(events.get(timeout=WAIT_S), te.StreamDown)


def test_a_key_that_has_encrypted_enough_ends_its_connection(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "RECORDS_MAX", 8)
    door.listener.admit(TICKET, "key", WAIT_S)
    client = door.connect(TICKET)
    sent, received = Events(), Events()
    sender = StreamSender(door.opened().sock, "key", sent.put, checksum=False)
    receiver = StreamReceiver(client, "key", received.put)
    data, target = memoryview(bytearray(3 * tls.RECORD_BYTES)), bytearray(3 * tls.RECORD_BYTES)
    for number in range(2):  # a record for its header, three for the rest
        receiver.claim(1, number, 4, [memoryview(target)])
        sender.put(SendJob("owner", 1, number, 4, [data]))
        if number == 0:
            assert isinstance(received.get(timeout=WAIT_S), te.Received)
    assert isinstance(sent.get(timeout=WAIT_S), te.Sent)
    down = sent.get(timeout=WAIT_S)
    assert isinstance(down, te.StreamDown)
    assert "encrypted enough" in down.reason
    assert isinstance(received.get(timeout=WAIT_S), te.StreamDown)


# --- what is seen on the wire ---


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
def test_a_connection_that_is_ended_sends_nothing_in_clear(
    ends: tuple[TlsSocket, TlsSocket, socket.socket], how: int
) -> None:
    """The loop ends a connection while its thread sends. ssl's own shutdown lets that go on."""
    source, _, wire = ends
    source.shutdown(how)
    try:
        source.sendall(SECRET)
    except OSError:
        assert how == socket.SHUT_RDWR
    source.close()
    seen = read_raw(wire)
    assert bool(seen) == (how == socket.SHUT_RD)  # a record, if anything
    assert SECRET[:16] not in seen
    wire.close()


def test_a_closed_connection_sends_nothing_in_clear(
    ends: tuple[TlsSocket, TlsSocket, socket.socket],
) -> None:
    source, _, wire = ends
    source.close()
    with pytest.raises(OSError, match=r".+"):
        source.sendmsg([SECRET])
    assert read_raw(wire) == b""
    wire.close()


def test_two_threads_may_send_at_once(
    ends: tuple[TlsSocket, TlsSocket, socket.socket],
) -> None:
    """Who accepted a connection may still be at it when the sender begins."""
    source, sink, wire = ends
    wire.close()
    rounds = 2_000

    def send(word: bytes) -> None:
        for _ in range(rounds):
            source.sendall(word)

    threads = [threading.Thread(target=send, args=(one * 100,)) for one in (b"a", b"b")]
    for thread in threads:
        thread.start()
    buffer = bytearray(2 * rounds * 100)
    assert sink.recvmsg_into([memoryview(buffer)])[0] == len(buffer)
    for thread in threads:
        thread.join()
    words = [bytes(buffer[at : at + 100]) for at in range(0, len(buffer), 100)]
    assert sorted(words) == [b"a" * 100] * rounds + [b"b" * 100] * rounds
