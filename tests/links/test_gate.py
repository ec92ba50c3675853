"""Connections over a bound are cut before their handshake; the others never notice."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from kvferry_daemon.core.crowd import MANY, Bounds, Crowd
from kvferry_daemon.links.gate import Gate, source_named

WAIT_S = 5.0


class House:
    """A ROUTER behind a gate."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        crowd: type[Crowd] = Crowd,
    ) -> None:
        self.crowd = crowd(Bounds(at_once=8, of_one=4, a_s=1000, of_one_a_s=1000))
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.gate = Gate(self.socket, "test", self.crowd)
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.where: str | tuple[str, int] = self.endpoint.partition("://")[2]
        self.family = socket.AF_UNIX
        if self.endpoint.startswith("tcp"):
            host, _, port = self.where.rpartition(":")
            self.where, self.family = (host, int(port)), socket.AF_INET

    def close(self) -> None:
        self.socket.close(linger=0)
        self.gate.close()
        assert not self.gate._thread.is_alive()


@pytest.fixture(params=["ipc", "tcp"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    endpoint = f"ipc://{tmp_path / 's'}" if request.param == "ipc" else "tcp://127.0.0.1:*"
    with zmq.Context() as context:
        one = House(context, endpoint)
        yield one
        one.close()


def plain(house: House) -> socket.socket:
    """A connection that says nothing."""
    one = socket.socket(house.family)
    one.connect(house.where)
    one.settimeout(WAIT_S)
    return one


def greeted(one: socket.socket) -> bool:
    """Whether the other side wants to go on with the handshake."""
    try:
        return bool(one.recv(1)) and bool(one.recv(1))  # it says its signature to everybody
    except ConnectionResetError:
        return False


def is_cut(one: socket.socket) -> bool:
    """Whether the connection ends; whatever it said before."""
    try:
        while one.recv(64):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def wait_until(house: House, open_now: int) -> None:
    until_s = time.monotonic() + WAIT_S
    while len(house.crowd) != open_now:
        assert time.monotonic() < until_s, len(house.crowd)
        time.sleep(0.005)


def test_who_is_over_the_bound_is_cut_and_may_come_when_another_has_gone(house: House) -> None:
    inside = [plain(house) for _ in range(4)]
    assert all(map(greeted, inside))
    wait_until(house, 4)
    over = plain(house)
    assert is_cut(over)
    assert house.gate.refused == 1
    inside.pop().close()
    wait_until(house, 3)
    last = plain(house)
    assert greeted(last)
    wait_until(house, 4)
    for one in (*inside, over, last):
        one.close()
    wait_until(house, 0)


class Noted(set[int]):
    """Remembers what was in it."""

    def __init__(self) -> None:
        super().__init__()
        self.ever: list[int] = []

    def add(self, one: int) -> None:
        self.ever.append(one)
        super().add(one)


def test_what_was_cut_is_known_until_it_has_ended(house: House) -> None:
    """But not who is only too many: what he says as he comes again would be lost now and then."""
    house.gate.cut_off = cut_off = Noted()
    inside = [plain(house) for _ in range(4)]
    wait_until(house, 4)
    over = plain(house)
    assert is_cut(over)
    assert cut_off.ever == []
    (first, source), (second, _), *_ = house.gate.connections.items()
    house.gate.cut(first, source)
    wait_until(house, 3)
    assert cut_off.ever == [first]
    house.gate.throw_out(second, source)
    wait_until(house, 2)
    with plain(house) as barred:
        assert is_cut(barred)
    assert len(cut_off.ever) == 3
    until_s = time.monotonic() + WAIT_S
    while cut_off:
        assert time.monotonic() < until_s
        time.sleep(0.005)
    for one in (*inside, over):
        one.close()


class Late(set[int]):
    """Just before it notes a connection, that one ends, and another one gets its number."""

    def __init__(self, house: House, first: socket.socket) -> None:
        super().__init__()
        self.house, self.first = house, first
        self.other = socket.socket(first.family)
        self.fillers = [os.dup(0)]
        while self.fillers[-1] < max(house.gate.connections):
            self.fillers.append(os.dup(0))

    def add(self, one: int) -> None:
        self.first.shutdown(socket.SHUT_RDWR)
        wait_until(self.house, 0)
        self.other.connect(self.house.where)
        wait_until(self.house, 1)
        assert list(self.house.gate.connections) == [one]
        super().add(one)


def test_a_connection_that_ends_as_it_is_cut_is_not_noted_for_who_has_its_number(
    house: House,
) -> None:
    first = plain(house)
    wait_until(house, 1)
    [(number, source)] = house.gate.connections.items()
    house.gate.cut_off = cut_off = Late(house, first)
    house.gate.cut(number, source)
    assert not cut_off
    assert list(house.gate.connections) == [number]
    for one in (first, cut_off.other):
        one.close()
    for filler in cut_off.fillers:
        os.close(filler)


FULL = """
import socket, sys, threading, time
import zmq
from kvferry_daemon.core.crowd import Bounds, Crowd
from kvferry_daemon.links.gate import Gate

class Late(Crowd):
    def arrived(self, *args):
        go_on.wait()
        return super().arrived(*args)

go_on = threading.Event()
with zmq.Context() as context, context.socket(zmq.ROUTER) as listening:
    gate = Gate(listening, "test", Late(Bounds(at_once=8, of_one=4, a_s=1000, of_one_a_s=1000)))
    listening.bind(f"ipc://{sys.argv[1]}")
    refused_s = 0.0
    while not refused_s or time.monotonic() - refused_s < 0.2:
        with socket.socket(socket.AF_UNIX) as one:
            one.setblocking(False)
            try:
                one.connect(sys.argv[1])
                refused_s = 0.0
            except BlockingIOError:  # libzmq's thread waits, since nobody hears what it tells
                refused_s = refused_s or time.monotonic()
    go_on.set()
    listening.close(linger=0)
    gate.close()
    print("ended" if not gate._thread.is_alive() else "left")
"""


def test_a_flood_does_not_keep_the_daemon_from_its_end(tmp_path: Path) -> None:
    """In a process of its own: who waits for the GIL in there, waits for ever."""
    program = [sys.executable, "-c", FULL, str(tmp_path / "s")]
    told = subprocess.run(program, capture_output=True, timeout=60, check=True, text=True)
    assert told.stdout == "ended\n", told.stderr


def test_a_flood_leaves_nothing_behind(house: House) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        many = [plain(house) for _ in range(20)]
        for one in many:
            one.close()
    wait_until(house, 0)
    until_s = time.monotonic() + WAIT_S
    while len(os.listdir("/proc/self/fd")) > before:
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_messages_go_through_beside_those_that_are_cut(house: House) -> None:
    many = [plain(house) for _ in range(3)]
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(house.endpoint)
        dealer.send(b"hello")
        assert house.socket.poll(int(WAIT_S * 1000))
        assert house.socket.recv_multipart()[1] == b"hello"
        dealer.close(linger=0)
    for one in many:
        one.close()


def test_who_is_thrown_out_is_who_sent_it_and_not_who_has_his_number_now(house: House) -> None:
    somebody_else = "localhost:1:1:1" if house.endpoint.startswith("ipc") else "127.0.0.9"
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        dealer.connect(house.endpoint)
        dealer.send(b"hello")
        frame = house.socket.recv_multipart(copy=False)[-1]
        number, address = int(frame.get("__fd")), str(frame.get("Peer-Address"))
        house.gate.throw_out_sender(number, somebody_else)
        with plain(house) as other:
            assert greeted(other)
            wait_until(house, 2)
        wait_until(house, 1)
        house.gate.throw_out_sender(number, address)
        wait_until(house, 0)
        with plain(house) as other:
            assert is_cut(other)
        dealer.close(linger=0)


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("localhost:1000:9:42", "pid 42 of uid 1000"),
        ("localhost:1000:9:0", f"{MANY}1000"),  # of a container: the kernel tells no more
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8::7", "2001:db8::/64"),
    ],
)
def test_who_a_message_is_from(address: str, source: str) -> None:
    assert source_named(address) == source


class Faulty(Crowd):
    """A fault of ours, at the first connection."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        self.failed = False

    def arrived(self, number: int, source: str, now_s: float) -> str:
        if not self.failed:
            self.failed = True
            raise ValueError("a fault of ours")
        return super().arrived(number, source, now_s)


def test_a_fault_in_the_gate_is_told_and_the_socket_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with zmq.Context() as context:
        house = House(context, f"ipc://{tmp_path / 's'}", Faulty)
        many = [plain(house) for _ in range(3)]
        wait_until(house, 2)
        for one in many:
            one.close()
        wait_until(house, 0)
        house.close()
    assert [str(one.exc_info[1]) for one in caplog.records if one.exc_info] == ["a fault of ours"]
