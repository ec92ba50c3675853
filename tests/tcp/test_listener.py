"""Who may open a data connection, and that nobody can keep others from it."""

import contextlib
import errno
import queue
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp import listener as module
from kvferry_daemon.transports.tcp.listener import (
    HANDSHAKES_MAX,
    HANDSHAKES_OF_ONE,
    ConnectError,
    Listener,
    connect,
)
from kvferry_daemon.transports.tcp.sender import SendJob, StreamSender
from kvferry_proto.chunk import (
    ACCEPT_BYTES,
    GREETING_BYTES,
    HEADER_BYTES,
    pack_greeting,
    read_accept,
    read_header,
)
from tcp.door import HOST, OTHER, TICKET, WAIT_S, Door, Events, ended, greeters

SHORT_S = 0.4
HOSTS_OWN = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


@pytest.fixture
def door() -> Iterator[Door]:
    one = Door()
    yield one
    one.close()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greetings have little time."""
    monkeypatch.setattr(module, "HANDSHAKE_S", SHORT_S)


def reset(sock: socket.socket) -> None:
    """Close without a good-bye: whoever sends to it gets an error."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def congestion_control(sock: socket.socket) -> str:
    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode()


# --- the options of a connection ---


@pytest.mark.skipif(HOSTS_OWN == "reno", reason="the host's own choice cannot be told from ours")
@pytest.mark.parametrize("host", [HOST, "127.0.0.2"])
def test_only_within_one_address_the_hosts_congestion_control_is_not_used(host: str) -> None:
    door = Door(host=host)
    try:
        door.listener.admit(TICKET, "key", WAIT_S)
        ends = [door.connect(TICKET), door.opened().sock]
        assert ends[0].getsockname()[0] == HOST  # the kernel's choice
        wanted = "reno" if host == HOST else HOSTS_OWN
        assert [congestion_control(end) for end in ends] == [wanted, wanted]
    finally:
        door.close()


def test_the_kernel_looks_whether_the_other_host_is_still_there(door: Door) -> None:
    """Nothing else ends a connection on which nobody sends, with its thread and its buffers."""
    door.listener.admit(TICKET, "key", WAIT_S)
    for end in (door.connect(TICKET), door.opened().sock):
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        first_s, next_s, times = (end.getsockopt(socket.IPPROTO_TCP, one) for one in options)
        assert first_s + times * next_s <= 20


# --- tickets ---


def test_a_good_ticket_opens_a_connection_under_its_key(door: Door) -> None:
    door.listener.admit(TICKET, "mine", WAIT_S)
    door.listener.admit(OTHER, "other", WAIT_S)
    client = door.connect(TICKET)
    event = door.opened()
    assert event.key == "mine"
    payload = b"x" * 1000
    sender = StreamSender(event.sock, "mine", door.events.put, checksum=False)
    sender.put(SendJob("owner", 1, 0, 4, [memoryview(payload)]))
    client.settimeout(WAIT_S)
    got = b""
    while len(got) < HEADER_BYTES + len(payload):
        got += client.recv(1 << 16)
    assert read_header(got[:HEADER_BYTES]).payload_bytes == len(payload)
    assert got[HEADER_BYTES:] == payload  # nothing was left of the handshake in front of it
    assert door.events.get(timeout=WAIT_S) == te.Sent("mine", "owner", 0, len(payload))
    sender.close()
    assert isinstance(door.events.get(timeout=WAIT_S), te.StreamDown)


@pytest.mark.parametrize("ticket", [OTHER, bytes(32)])
def test_a_wrong_ticket_is_refused_and_does_not_use_up_the_right_one(
    door: Door, ticket: bytes
) -> None:
    door.listener.admit(TICKET, "key", WAIT_S)
    with pytest.raises(ConnectError, match="refused the ticket"):
        door.connect(ticket)
    assert door.events.empty()
    door.connect(TICKET)
    assert door.opened().key == "key"


def test_an_expired_ticket_is_refused_and_says_so_at_once(door: Door) -> None:
    door.listener.admit(TICKET, "key", 0.0)
    with pytest.raises(ConnectError, match="refused the ticket"):
        door.connect(TICKET)
    door.listener.admit(TICKET, "key", -1.0)
    door.listener.admit(OTHER, "other", WAIT_S)  # expired ones are forgotten, this one is not
    with pytest.raises(ConnectError, match="refused the ticket"):
        door.connect(TICKET)
    door.connect(OTHER)
    assert door.opened().key == "other"
    assert door.events.empty()


def test_a_ticket_admits_one_connection(door: Door) -> None:
    door.listener.admit(TICKET, "key", WAIT_S)
    first = door.connect(TICKET)
    with pytest.raises(ConnectError, match="refused the ticket"):
        door.connect(TICKET)
    event = door.opened()
    assert door.events.empty()
    event.sock.sendall(b"!")
    assert first.recv(1) == b"!"  # and the second one did not disturb it


def test_a_newer_ticket_of_a_stream_ends_the_earlier_one(door: Door) -> None:
    """Whatever connection they are for: else one could collect them, and show all at once."""
    door.listener.admit(TICKET, ("link", 0, 1), WAIT_S, ("link", 0))
    door.listener.admit(OTHER, ("link", 0, 2), WAIT_S, ("link", 0))
    door.listener.admit(bytes(32), ("link", 1, 1), WAIT_S, ("link", 1))
    with pytest.raises(ConnectError, match="refused the ticket"):
        door.connect(TICKET)
    door.connect(OTHER)
    assert door.opened().key == ("link", 0, 2)
    door.connect(bytes(32))
    assert door.opened().key == ("link", 1, 1)


def test_of_many_that_show_one_ticket_at_once_one_comes_in(door: Door) -> None:
    door.listener.admit(TICKET, "key", WAIT_S)
    clients = [door.dial() for _ in range(HANDSHAKES_OF_ONE)]
    for client in clients:
        client.sendall(pack_greeting(TICKET))
    answers = [client.recv(ACCEPT_BYTES, socket.MSG_WAITALL) for client in clients]
    assert sum(map(read_accept, answers)) == 1
    door.opened()
    assert door.events.empty()


def test_tickets_are_admitted_while_others_are_shown(door: Door) -> None:
    """Thousands of sinks reconnect at once; threads take turns as often as they can."""
    tickets = [bytes([high, low]) * 16 for high in range(8) for low in range(250)]
    for ticket in tickets:
        door.listener.admit(ticket, ticket, 60 * WAIT_S)  # however slow the machine

    def show() -> None:
        for ticket in tickets:
            connect(HOST, door.listener.port, ticket, WAIT_S).close()

    client = threading.Thread(target=show)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        client.start()
        while client.is_alive():
            door.listener.admit(OTHER, "other", WAIT_S)
    finally:
        sys.setswitchinterval(interval_s)
        client.join()


# --- greetings ---


@pytest.mark.usefixtures("short")
def test_a_silent_connection_is_cut(door: Door) -> None:
    began_s = time.monotonic()
    assert ended(door.dial(), WAIT_S)
    assert SHORT_S * 0.9 <= time.monotonic() - began_s < WAIT_S / 2


@pytest.mark.usefixtures("short")
def test_a_greeting_in_drops_is_cut_by_one_deadline_for_all_of_it(door: Door) -> None:
    """Every byte comes well within the deadline; all of them together would not."""
    door.listener.admit(TICKET, "key", WAIT_S)
    client = door.dial()
    began_s = time.monotonic()
    for byte in pack_greeting(TICKET):
        try:
            client.send(bytes([byte]))
        except ConnectionError:
            break
        if select.select([client], [], [], SHORT_S / 8)[0]:  # its end: it says nothing else
            break
    else:
        raise AssertionError("it was let through")
    assert time.monotonic() - began_s < WAIT_S / 2
    assert door.events.empty()


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\n".ljust(GREETING_BYTES, b"\n"),
        pack_greeting(TICKET)[:-1] + b"\x00",
        pack_greeting(TICKET)[: GREETING_BYTES // 2],
    ],
    ids=["http", "damaged", "cut"],
)
def test_what_is_no_greeting_is_closed_without_an_answer(door: Door, greeting: bytes) -> None:
    door.listener.admit(TICKET, "key", WAIT_S)
    client = door.dial()
    client.sendall(greeting)
    client.shutdown(socket.SHUT_WR)
    assert ended(client, WAIT_S)
    door.connect(TICKET)  # the ticket still stands
    assert door.opened().key == "key"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("how", ["they time out", "they hang up"])
def test_half_open_connections_do_not_stop_a_good_one_later(
    door: Door, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = [door.dial() for _ in range(HANDSHAKES_OF_ONE + 8)]
    assert all(ended(sock, WAIT_S) for sock in idle[:8])  # they had to make room
    if how == "they time out":
        assert all(ended(sock, WAIT_S) for sock in idle)
    for sock in idle:
        sock.close()
    wait_for_half_open(door, 0)
    monkeypatch.setattr(module, "HANDSHAKE_S", WAIT_S)
    door.listener.admit(TICKET, "key", WAIT_S)
    door.connect(TICKET)
    assert door.opened().key == "key"


def refuse_the_newest(listener: Listener) -> None:
    """What would be simpler: nobody has to make room."""
    plain = listener._begin

    def begin(sock: socket.socket, host: str) -> int:
        if len(listener._half_open) >= module.HANDSHAKES_MAX:
            raise OSError("full")
        return plain(sock, host)

    setattr(listener, "_begin", begin)  # noqa: B010  # mypy would not have it replaced


@pytest.mark.parametrize("hosts", [1, HANDSHAKES_MAX], ids=["one host", "many hosts"])
def test_silent_strangers_cannot_keep_anybody_out(
    hosts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They know no ticket, and may come from as many addresses as they like."""
    monkeypatch.setattr(module, "AGAIN_S", 0.001)
    for defence, comes_in in ((False, False), (True, True)):
        if not defence:
            monkeypatch.setattr(module, "HANDSHAKES_OF_ONE", HANDSHAKES_MAX)
        door = Door(host="0.0.0.0")
        if not defence:
            refuse_the_newest(door.listener)
        address = (HOST, door.listener.port)
        silent = [
            socket.create_connection(address, WAIT_S, (f"127.0.1.{1 + number % hosts}", 0))
            for number in range(HANDSHAKES_MAX + 4)
        ]
        assert ended(silent[0 if defence else -1], WAIT_S)  # by now there is no more room
        door.listener.admit(TICKET, "key", WAIT_S)
        with socket.create_connection(address, WAIT_S, ("127.0.0.2", 0)) as good:
            good.settimeout(WAIT_S)
            answer = b""
            with contextlib.suppress(ConnectionError):
                good.sendall(pack_greeting(TICKET))
                answer = good.recv(ACCEPT_BYTES, socket.MSG_WAITALL)
            assert bool(answer) is comes_in
        assert len(door.listener._half_open) <= HANDSHAKES_MAX
        assert door.listener.refused >= 4 or not defence
        for one in silent:
            one.close()
        door.close()
        monkeypatch.undo()


def test_a_handshake_that_made_room_does_not_end_who_came_in_its_place(door: Door) -> None:
    """Its thread tells of its end later, when its number may be another one's."""
    for _ in range(4):
        idle = [door.dial() for _ in range(2 * HANDSHAKES_OF_ONE)]
        assert all(ended(sock, WAIT_S) for sock in idle[:HANDSHAKES_OF_ONE])
        wait_for_half_open(door, HANDSHAKES_OF_ONE)


def wait_for_half_open(door: Door, handshakes: int) -> None:
    """Until that many are under way, each with its thread."""
    until_s = time.monotonic() + WAIT_S
    while not (len(door.listener._half_open) == len(greeters()) == handshakes):
        assert time.monotonic() < until_s, (door.listener._half_open, greeters())
        time.sleep(0.005)


# --- the end ---


def test_a_closed_listener_takes_nobody_in(door: Door) -> None:
    door.listener.close()
    door.listener.close()  # twice is once
    with pytest.raises(ConnectError, match="refused"):
        connect(HOST, door.listener.port, TICKET, WAIT_S)


def test_a_connection_that_was_handed_over_belongs_to_who_got_it() -> None:
    """The sink vanishes between its greeting and the answer; StreamDown must tell the node."""
    clients: list[socket.socket] = []
    handed: Events = queue.Queue()

    def post(event: te.StreamEvent) -> None:
        reset(clients[0])  # now, so that the answer to the greeting fails
        handed.put(event)

    door = Door(post)
    door.listener.admit(TICKET, "key", WAIT_S)
    clients.append(door.dial())
    clients[0].sendall(pack_greeting(TICKET))
    event = handed.get(timeout=WAIT_S)
    assert isinstance(event, te.StreamOpened)
    for thread in greeters():
        thread.join(WAIT_S)
    try:
        StreamSender(event.sock, "key", handed.put, checksum=True)
        assert isinstance(handed.get(timeout=WAIT_S), te.StreamDown)
    finally:
        door.close()


# --- errors of the machine ---


def test_an_error_of_accept_is_not_the_end(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """accept(2) passes the errors of a network on, and may be short of memory for a moment."""
    real = socket.socket.accept
    errors = [errno.ENOBUFS, errno.EHOSTUNREACH, errno.EMFILE]

    def accept(self: socket.socket) -> tuple[socket.socket, Any]:
        sock, where = real(self)
        if errors:
            sock.close()
            raise OSError(errors.pop(), "not now")
        return sock, where

    monkeypatch.setattr(socket.socket, "accept", accept)
    for _ in range(len(errors) + 1):  # the one that accept waits in already is the real one
        with contextlib.suppress(OSError):
            door.dial().recv(1)
    door.listener.admit(TICKET, "key", WAIT_S)
    door.connect(TICKET)
    assert door.opened().key == "key"
    assert errors == []


def test_no_thread_to_be_had_is_not_the_end(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start
    refused = [HANDSHAKES_MAX + 1]

    def start(self: threading.Thread) -> None:
        if refused[0]:
            refused[0] -= 1
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(module, "AGAIN_S", 0.001)
    monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(HANDSHAKES_MAX + 1):
        assert ended(door.dial(), WAIT_S)
    door.listener.admit(TICKET, "key", WAIT_S)
    door.connect(TICKET)
    assert door.opened().key == "key"
