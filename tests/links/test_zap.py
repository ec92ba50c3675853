"""The doorkeeper: nothing that a door does ends it, and without it nobody comes in."""

import asyncio
import contextlib
import socket as sockets
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import zmq

from kvferry_daemon.access import Users
from kvferry_daemon.links.zap import Doorkeeper, LocalDoor, Refused, Request, guard
from kvferry_daemon.links.zmq_link import ZmqLink, make_socket

Context = zmq.Context[zmq.Socket[bytes]]
WAIT_S, SILENT_S = 10.0, 0.5


@pytest.fixture
def context() -> Iterator[Context]:
    one: Context = zmq.Context()
    yield one
    one.destroy(linger=0)


class House:
    """A guarded socket at a path, and all that it has heard, with who said it."""

    def __init__(self, context: Context, path: Path) -> None:
        self.path = path
        self.heard: list[tuple[str, bytes]] = []
        self._more = asyncio.Event()
        socket = make_socket(context, zmq.ROUTER)
        guard(socket, "house")
        socket.bind(f"ipc://{path}")
        self.link = ZmqLink(socket, self._on_message, names_users=True)

    def _on_message(self, frames: list[bytes]) -> None:
        self.heard.append((self.link.user, frames[1]))
        self._more.set()

    async def hears(self, context: Context, said: bytes, wait_s: float = WAIT_S) -> bool:
        """Whether a new client gets this through."""
        self._more.clear()
        client = make_socket(context, zmq.DEALER)
        client.connect(f"ipc://{self.path}")
        client.send(said)
        try:
            async with asyncio.timeout(wait_s):
                await self._more.wait()
        except TimeoutError:
            return False
        finally:
            client.close()
        return True


def ignore() -> None:
    """Whoever is refused."""


def run(act: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(act())  # type: ignore[arg-type]


def test_an_exception_in_a_door_ends_one_handshake_only(
    context: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults: list[Exception] = [ZeroDivisionError(), Refused("not you", for_good=True)]
    refused: list[bool] = []

    def door(_request: Request) -> str:
        if faults:
            raise faults.pop()
        return "somebody"

    async def act() -> None:
        keeper = Doorkeeper(context, {"house": door}, lambda: refused.append(True))
        house = House(context, tmp_path / "s")
        assert not await house.hears(context, b"1", SILENT_S)
        assert not await house.hears(context, b"2", SILENT_S)
        assert await house.hears(context, b"3")
        assert house.heard == [("somebody", b"3")]
        house.link.close()
        keeper.close()

    run(act)
    assert refused == [True]
    assert "not you" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_who_is_refused_again_and_again_does_not_fill_the_log(
    context: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[bool] = []
    knocks = 30

    async def act() -> None:
        enough = asyncio.Event()

        def on_refused() -> None:
            refused.append(True)
            if len(refused) == knocks:
                enough.set()

        keeper = Doorkeeper(context, {}, on_refused)
        house = House(context, tmp_path / "s")
        clients = [make_socket(context, zmq.DEALER) for _ in range(knocks)]
        for client in clients:
            client.connect(f"ipc://{tmp_path / 's'}")
        async with asyncio.timeout(10):
            await enough.wait()
        for client in clients:
            client.close()
        house.link.close()
        keeper.close()

    run(act)
    assert 1 <= caplog.text.count("refused a connection") < knocks / 3


def test_without_a_doorkeeper_nobody_comes_in(context: Context, tmp_path: Path) -> None:
    async def act() -> None:
        house = House(context, tmp_path / "s")
        assert not await house.hears(context, b"1", SILENT_S)
        house.link.close()

    run(act)


def test_a_context_has_one_doorkeeper_or_no_daemon(context: Context) -> None:
    async def act() -> None:
        keeper = Doorkeeper(context, {}, ignore)
        with pytest.raises(zmq.ZMQError, match="in use"):
            Doorkeeper(context, {}, ignore)
        keeper.close()

    run(act)


def test_a_client_of_an_old_protocol_that_cannot_say_who_it_is_is_cut_off(
    context: Context, tmp_path: Path
) -> None:
    """ZMTP 1 and 2 know no mechanisms: whoever speaks them would pass by every door."""

    async def act() -> None:
        keeper = Doorkeeper(context, {"house": LocalDoor(Users(frozenset()))}, ignore)
        house = House(context, tmp_path / "s")
        signature = b"\xff" + bytes(8) + b"\x7f"
        for greeting in (
            b"\x01\x00" + b"\x00\x02hi",
            signature + b"\x01\x05\x00\x00" + b"\x00\x02hi",
        ):
            with sockets.socket(sockets.AF_UNIX) as raw:
                raw.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(raw, str(tmp_path / "s"))
                await loop.sock_sendall(raw, greeting)
                async with asyncio.timeout(5):
                    with contextlib.suppress(ConnectionResetError):  # as good as an end
                        while await loop.sock_recv(raw, 64):
                            pass
        assert house.heard == []
        house.link.close()
        keeper.close()

    run(act)


def test_a_local_door_reads_only_what_the_kernel_says() -> None:
    door = LocalDoor(Users(frozenset((1000,)), frozenset((50,))))
    assert door(Request("localhost:1000:7:42", b"NULL", [])) == "1000:7:42"
    assert door(Request("localhost:7:50:42", b"NULL", [])) == "7:50:42"
    assert door(Request("localhost:0:0:42", b"NULL", [])) == "0:0:42"
    for address in ("localhost:7:7:42", "127.0.0.1", "", "localhost:1000", "localhost:1000:0:1:x"):
        with pytest.raises(Refused):
            door(Request(address, b"NULL", []))
    with pytest.raises(Refused):
        door(Request("localhost:1000:7:42", b"PLAIN", [b"name", b"word"]))
