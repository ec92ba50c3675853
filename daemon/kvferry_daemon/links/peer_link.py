"""The ZeroMQ link to one source daemon: its name is looked up here, never by libzmq.

libzmq would ask the resolver on its one I/O thread: a slow name server would freeze every socket of
the daemon, and of a name's addresses it would try only one.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable

import zmq

from kvferry_daemon.links.curve import prove_peer
from kvferry_daemon.links.zmq_link import ZmqLink, make_socket
from kvferry_daemon.probe import endpoint_of, key_of, split_address

LOOK_UP_S = 10.0  # of one look-up, and between two while a name has none
LOOK_AGAIN_S = 30.0  # a name may move to another host
TRY_S = 1.0
SENT_MAX = 1000
log = logging.getLogger(__name__)


class PeerLink:
    """Connects as soon as the name is known; until then what is sent is lost, and sent again."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        on_message: Callable[[list[bytes]], None],
        secret: bytes = b"",
    ) -> None:
        """``secret``: our own key, for an address that bears one.

        Raises zmq.ZMQError if there is no socket to be had.
        """
        self._socket = make_socket(context, zmq.DEALER)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.SNDHWM, SENT_MAX)
        if key := key_of(address):
            prove_peer(self._socket, key, secret)
        self.link = ZmqLink(self._socket, on_message)
        self._host, self._port = split_address(address)
        self._endpoint: str | None = None
        self._task: asyncio.Task[None] | None = None
        if _is_number(self._host):
            self._connect(endpoint_of(address))  # at once: the first hello need not be lost
        else:
            self._task = asyncio.get_running_loop().create_task(self._follow())

    @property
    def endpoint(self) -> str | None:
        """Where it connects to, with a number for a host; None: that is not known yet."""
        return self._endpoint

    def send(self, frame: bytes) -> None:
        """Send one message if it can be sent now."""
        if self._endpoint is not None:
            self.link.send(frame)

    def close(self) -> None:
        """Drop the link."""
        if self._task is not None:
            self._task.cancel()
        self.link.close()

    def _connect(self, endpoint: str) -> None:
        if self._endpoint is not None:
            self._socket.disconnect(self._endpoint)
        self._socket.connect(endpoint)
        self._endpoint = endpoint

    async def _follow(self) -> None:
        while True:
            found = await reachable(self._host, self._port)
            if found is not None and found != self._endpoint:
                self._connect(found)
            await asyncio.sleep(LOOK_UP_S if found is None else LOOK_AGAIN_S)


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def reachable(host: str, port: int) -> str | None:
    """The endpoint of a host's first address that takes a connection, else of its first one."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(LOOK_UP_S):
            found = await loop.getaddrinfo(host, port, proto=6)
    except (OSError, UnicodeError, TimeoutError) as error:
        log.warning("%s: no address: %s", host, error or "the look-up takes too long")
        return None
    endpoints = [(family, where[0]) for family, _, _, _, where in found]
    if len(endpoints) > 1:
        for family, ip in endpoints:
            if await _answers(str(ip), port):
                return _endpoint(family, str(ip), port)
    family, ip = endpoints[0]
    return _endpoint(family, str(ip), port)


async def _answers(ip: str, port: int) -> bool:
    try:
        async with asyncio.timeout(TRY_S):
            _, writer = await asyncio.open_connection(ip, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def _endpoint(family: int, ip: str, port: int) -> str:
    return f"tcp://[{ip}]:{port}" if family == socket.AF_INET6 else f"tcp://{ip}:{port}"
