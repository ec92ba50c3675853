"""Names of peers: slow ones freeze nobody, and one with two addresses is reached by either."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import zmq

from kvferry_daemon.links.peer_link import PeerLink, reachable
from kvferry_daemon.probe import probe

Looks = Callable[..., Awaitable[list[Any]]]


def with_names(look: Looks, act: Callable[[], Awaitable[Any]]) -> Any:
    """Run with a resolver of our own; the rest of the loop is as it is."""

    class Loop(asyncio.SelectorEventLoop):
        async def getaddrinfo(self, *args: Any, **more: Any) -> list[Any]:
            return list(await look(*args, **more))

    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(act())  # type: ignore[arg-type]


def found(*ips: str, port: int) -> Looks:
    async def look(*_args: Any, **_more: Any) -> list[Any]:
        families = [socket.AF_INET6 if ":" in ip else socket.AF_INET for ip in ips]
        return [
            (f, socket.SOCK_STREAM, 6, "", (ip, port)) for f, ip in zip(families, ips, strict=True)
        ]

    return look


def test_a_name_with_two_addresses_is_reached_by_the_one_that_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for ips in (("::1", "127.0.0.1"), ("127.0.0.2", "127.0.0.1"), ("127.0.0.1", "::1")):
            where = with_names(found(*ips, port=port), lambda: reachable("two.test", port))
            assert where == f"tcp://127.0.0.1:{port}"


def test_a_name_that_nobody_answers_at_is_its_first_address() -> None:
    where = with_names(found("::1", "127.0.0.1", port=1), lambda: reachable("two.test", 1))
    assert where == "tcp://[::1]:1"


@pytest.mark.parametrize("error", [socket.gaierror("no such name"), UnicodeError("too long")])
def test_a_name_without_an_address_is_none(error: Exception) -> None:
    async def look(*_args: Any, **_more: Any) -> list[Any]:
        raise error

    assert with_names(look, lambda: reachable("nobody.test", 1)) is None


def test_a_slow_name_freezes_no_other_socket() -> None:
    """libzmq looked names up on its only I/O thread."""

    async def act() -> None:
        never = asyncio.Event()

        async def look(*_args: Any, **_more: Any) -> list[Any]:
            await never.wait()
            return []

        loop: Any = asyncio.get_running_loop()
        loop.getaddrinfo = look
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        link = PeerLink(context, "tcp://slow.test:1", lambda _frames: None)
        one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        port = one.bind_to_random_port("tcp://127.0.0.1")
        other.connect(f"tcp://127.0.0.1:{port}")
        await asyncio.sleep(0)
        link.send(b"lost")
        other.send(b"through")
        assert one.poll(5000)
        link.close()
        one.close()
        other.close()
        context.term()

    asyncio.run(act())


@pytest.mark.parametrize("address", ["tcp://a..b:1", f"tcp://{'a' * 80}:1"])
def test_a_host_that_cannot_be_a_name_is_found_out(address: str) -> None:
    assert "connecting failed" in asyncio.run(probe(address))


def test_a_number_is_connected_to_at_once() -> None:
    """The first hello was lost, and came again only a fifth of a second later."""

    async def act() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router = context.socket(zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        link = PeerLink(context, f"tcp://127.0.0.1:{port}", lambda _frames: None)
        link.send(b"hello")
        assert await asyncio.to_thread(router.poll, 5000)
        assert router.recv_multipart()[1] == b"hello"
        link.close()
        router.close(linger=0)
        context.term()

    asyncio.run(act())
