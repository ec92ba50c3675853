"""Who may connect: libzmq asks here before a connection brings its first message.

The protocol is ZAP 1.0 (ZeroMQ RFC 27). There is one handler in a context, and every socket of ours
that listens has a domain and enforces it: without a handler libzmq lets nobody in. The handler is a
link on the event loop like the others, so a fault in it costs one connection and not the handler.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

import zmq

from kvferry_daemon.access import Users
from kvferry_daemon.links.zmq_link import ZmqLink

ENDPOINT = "inproc://zeromq.zap.01"
VERSION = b"1.0"
LOCAL = re.compile(r"localhost:(\d+):(\d+):(-?\d+)")  # uid, gid, pid: as the kernel has them
WORKER, CONTROL, PEER = "worker", "control", "peer"  # sockets, and doors to them
TELL_S = 1.0
log = logging.getLogger(__name__)


class Refused(Exception):
    """Not let in; the words are for the log. ``for_good``: the other side does not try again."""

    def __init__(self, why: str, *, for_good: bool) -> None:
        super().__init__(why)
        self.for_good = for_good


class Request(NamedTuple):
    """A connection that asks to be let in."""

    address: str
    mechanism: bytes
    credentials: list[bytes]


Door = Callable[[Request], str]  # returns who it is, which every message then bears; or Refused


@dataclass(frozen=True, slots=True)
class LocalDoor:
    """Lets processes of this machine in, by what the kernel says of them."""

    users: Users

    def __call__(self, request: Request) -> str:
        """The client as ``uid:gid:pid``."""
        found = LOCAL.fullmatch(request.address)
        if found is None or request.mechanism != b"NULL":
            raise Refused(f"{request.address} is no process of this machine", for_good=True)
        uid, gid, pid = map(int, found.groups())
        if not self.users.include(uid, gid):
            raise Refused(f"uid {uid}, gid {gid} (pid {pid}) is not allowed here", for_good=True)
        return f"{uid}:{gid}:{pid}"


@dataclass(frozen=True, slots=True)
class PeerDoor:
    """Lets daemons in whose key is trusted. Others may try again: a key can come to be trusted."""

    name_of: Callable[[str], str | None]

    def __call__(self, request: Request) -> str:
        """The client's key, proven by the handshake; who that is may change later."""
        if request.mechanism != b"CURVE" or len(request.credentials) != 1:
            raise Refused(f"{request.address} shows no key", for_good=True)
        key = request.credentials[0].hex()
        if self.name_of(key) is None:
            raise Refused(f"the key {key} of {request.address} is not trusted", for_good=False)
        return key


class Doorkeeper:
    """The ZAP handler of a context. Make it before any socket of the context listens."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        doors: Mapping[str, Door],
        on_refused: Callable[[], None],
    ) -> None:
        """``doors`` by domain. Raises zmq.ZMQError if the context has a handler already."""
        self._doors = doors
        self._on_refused = on_refused
        self._refused = 0  # that the log has not been told of
        self._told_at_s = -TELL_S
        socket = context.socket(zmq.ROUTER)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(ENDPOINT)
        except zmq.ZMQError:
            socket.close()
            raise
        self._link = ZmqLink(socket, self._on_request)

    def close(self) -> None:
        """Nobody is let in any more."""
        self._link.close()

    def _on_request(self, frames: list[bytes]) -> None:
        route, _, _, request_id = frames[:4]
        user = ""
        try:
            user, status, words = self._admitted(frames[2:]), b"200", b"OK"
        except Refused as refusal:
            status = b"400" if refusal.for_good else b"300"
            words = b"refused"  # why is the log's: strangers need no help
            self._on_refused()
            self._tell(str(refusal))
        except Exception:  # a fault of ours lets nobody in, and must not end the handler
            status, words = b"500", b"internal"
            log.exception("could not decide who may connect")
        self._link.send(route, b"", VERSION, request_id, status, words, user.encode(), b"")

    def _tell(self, why: str) -> None:
        """Now and then only: strangers must not fill the log."""
        self._refused += 1
        if monotonic() - self._told_at_s >= TELL_S:
            others = f" (and {self._refused - 1} before it)" if self._refused > 1 else ""
            log.warning("refused a connection: %s%s", why, others)
            self._told_at_s, self._refused = monotonic(), 0

    def _admitted(self, frames: list[bytes]) -> str:
        version, _, domain, address, _, mechanism, *credentials = frames
        door = self._doors.get(domain.decode(errors="replace"))
        if version != VERSION or door is None:
            raise Refused(f"no door {domain!r} for ZAP {version!r}", for_good=True)
        return door(Request(address.decode(errors="replace"), mechanism, credentials))


def guard(socket: zmq.Socket[bytes], domain: str) -> None:
    """Let only those connect to this socket, bound after this, whom the domain's door lets in."""
    socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
