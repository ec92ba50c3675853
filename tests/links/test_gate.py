"""Connections over a bound are cut before their handshake; the others never notice."""

import os
import socket
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

    def close(self) -> None:
        self.gate.close()
        self.socket.close(linger=0)


@pytest.fixture(params=["ipc", "tcp"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    endpoint = f"ipc://{tmp_path / 's'}" if request.param == "ipc" else "tcp://127.0.0.1:*"
    with zmq.Context() as context:
        one = House(context, endpoint)
        yield one
        one.close()


def plain(house: House) -> socket.socket:
    """A connection that says nothing."""
    where = house.endpoint.partition("://")[2]
    if house.endpoint.startswith("ipc"):
        one = socket.socket(socket.AF_UNIX)
        one.connect(where)
    else:
        host, _, port = where.rpartition(":")
        one = socket.create_connection((host, int(port)))
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
