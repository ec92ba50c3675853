"""Cuts off who makes the daemon's memory grow by what it never takes or never finishes.

libzmq keeps what it has of a message until all of it is there, and what it has for somebody until he
reads it, both without a bound in bytes. While memory grows that is no pool's, who goes on with a
message that has no end, or goes on asking and takes no answer, is thrown out. Who takes too little or
sends too much is cut, and if neither is seen, whoever brings no whole message: honest ones connect
again, and their calls are repeated.
"""

import asyncio
import ctypes
import logging
import os
import socket
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from termios import FIONREAD
from termios import TIOCOUTQ as SIOCOUTQ
from time import monotonic

from kvferry_daemon.links.gate import Gate, is_process, opened
from kvferry_daemon.links.peer_link import PeerLink
from kvferry_daemon.links.zmq_link import Heard, ZmqLink

GROWTH_BYTES = 64 << 20
LOOK_S = 0.05
WATCH_S, LOOKS = 0.1, 4
LOOP_S = 2.0
RELIEF_S, RELIEF_LOOKS = 0.3, 12  # until libzmq has let go of it, mostly
LATER_S = (1.0, 4.0)  # and of what we had to read before
AGAIN_BYTES = 16 << 20  # it grew again by so much: there is somebody else
FULL_BYTES = 1 << 15  # of what a connection has not taken yet
HOARD_BYTES = 4 << 20  # asked for within WATCH_S by who takes none: who stands still asks no more
TELL_S = 60.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
STATM = Path("/proc/self/statm")
log = logging.getLogger(__name__)


class Pressure:
    """A thread that looks at the process's memory twenty times a second. Make it on the loop."""

    def __init__(
        self,
        doors: Iterable[tuple[Gate, ZmqLink]],
        sources: Callable[[], list[PeerLink]],
        shun: Callable[[str], None],
    ) -> None:
        """``sources``: the links that we made ourselves; it is called in a thread.

        ``shun``: drops those to an endpoint for a while; it is called on the loop.
        """
        self._loop = asyncio.get_running_loop()
        self._doors = list(doors)
        self._sources = sources
        self._shun = shun
        self.cuts = 0
        self._base_bytes = own_bytes()
        self._spared = False  # idle connections, since memory was as it should be
        self._give_back_at_s: list[float] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvferry-pressure", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Before the gates close."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        told_at_s = -TELL_S
        while not self._stopping.wait(LOOK_S):
            try:
                self._look()
            except Exception:  # no descriptor left, or a fault of ours: that must not end the watch
                if monotonic() - told_at_s >= TELL_S:
                    told_at_s = monotonic()
                    log.exception("could not watch memory")

    def _look(self) -> None:
        if self._give_back_at_s and monotonic() >= self._give_back_at_s[0]:
            del self._give_back_at_s[0]
            give_back()
        now_bytes = own_bytes()
        self._base_bytes = min(self._base_bytes, now_bytes)
        if now_bytes - self._base_bytes < GROWTH_BYTES:
            self._spared = False
            return
        if not self._relieve(now_bytes - self._base_bytes):
            self._base_bytes = own_bytes()  # what is left, something of ours needs

    def _relieve(self, grown_bytes: int) -> bool:
        """Cut who may be the cause; return whether it is evident that somebody was.

        Idle ones are spared then; of one who takes nothing once only: he may be there to hide another.
        """
        seen = self._watch()
        hoards = hoarding(seen)
        evident = [one for one in seen if one.is_pouring or one in hoards]
        takes_none = any(one.takes_none for one in seen)
        spares = bool(evident) or (takes_none and not self._spared)
        others = [one for one in seen if one.may_be_it or not (spares or one.has_spoken)]
        others = [one for one in others if one not in evident]
        for one in evident:
            one.throw_out(one.descriptor, one.source)
        for one in others:
            one.cut(one.descriptor, one.source)
        self.cuts += len(evident) + len(others)
        log.warning(
            "memory grew by %d MiB: cut %d connections that brought no end of a message or took no "
            "answers, and %d that may have been the cause",
            grown_bytes >> 20,
            len(evident),
            len(others),
        )
        self._rest()
        self._give_back_at_s = [monotonic() + later_s for later_s in LATER_S]
        self._spared = spares and not evident
        return spares

    def _rest(self) -> None:
        """Until libzmq has let go of it; who has many addresses goes on meanwhile, at the next one.

        What he fills there shows only if what was freed here is given back at each look.
        """
        least_bytes = own_bytes()
        for _ in range(RELIEF_LOOKS):
            if self._stopping.wait(RELIEF_S / RELIEF_LOOKS):
                return
            give_back()
            now_bytes = own_bytes()
            least_bytes = min(least_bytes, now_bytes)
            if now_bytes - least_bytes >= AGAIN_BYTES:
                return

    def _shun_source(self, descriptor: int, endpoint: str) -> None:
        """Cut a link that we made, and let it be for a while: libzmq would connect at once."""
        cut_from(descriptor, endpoint)
        self._loop.call_soon_threadsafe(self._shun, endpoint)

    def _watch(self) -> list["Seen"]:
        """What connections do for a while."""
        sources = self._sources()
        links = [link for _, link in self._doors] + [one.link for one in sources]
        try:
            for link in links:
                link.heard = Heard()
            seen = self._seen(sources)
            for _ in range(LOOKS):
                self._stopping.wait(WATCH_S / LOOKS)
                for one in seen:
                    one.look()
            has_read = self._wait_for_loop()
        finally:  # or they would go on noting all that is sent
            told = told_by(links)
        for one in seen:
            one.has_spoken = one.descriptor in told or not has_read
            one.told_bytes = told.get(one.descriptor, 0)
        return seen

    def _seen(self, sources: list[PeerLink]) -> list["Seen"]:
        """Connections that others opened to us, and those that we opened."""
        there = [
            Seen(one, source, gate.cut, gate.throw_out)
            for gate, _ in self._doors
            for one, source in gate.connections.items()
        ]
        ours = [Seen(one, at, cut_from, self._shun_source) for one, at in connections_to(sources)]
        return there + ours

    def _wait_for_loop(self) -> bool:
        """Until it has read of every link what there was: who was only not heard is no attacker."""
        turned = threading.Event()
        self._loop.call_soon_threadsafe(self._loop.call_soon, turned.set)
        return turned.wait(LOOP_S)


@dataclass(slots=True, eq=False)
class Seen:
    """A connection, for as long as it is watched."""

    descriptor: int
    source: str  # who opened it, or the endpoint that we opened it to
    cut: Callable[[int, str], None]
    throw_out: Callable[[int, str], None]
    has_spoken: bool = False  # it brought a whole message
    sending: int = 0  # looks at which there was more of it to read
    unread: int = 0  # looks at which it had much to take
    told_bytes: int = 0  # what was sent to it, since it asked

    def look(self) -> None:
        """Ask the kernel what has not been read, at either end."""
        self.sending += queued_bytes(self.descriptor, FIONREAD) > 0
        self.unread += queued_bytes(self.descriptor, SIOCOUTQ) >= FULL_BYTES

    @property
    def is_pouring(self) -> bool:
        """Whether it goes on with a message that has no end; nobody honest does."""
        return not self.has_spoken and self.sending * 2 >= LOOKS

    @property
    def takes_none(self) -> bool:
        """Whether it takes what it is sent far too slowly."""
        return self.unread == LOOKS

    @property
    def may_be_it(self) -> bool:
        """Whether it does, or lets us take what it sends far too slowly."""
        return self.takes_none or self.sending == LOOKS


def told_by(links: list[ZmqLink]) -> dict[int, int]:
    """Bytes that were sent to connections which spoke meanwhile; nobody wants to know any more."""
    told: dict[int, int] = {}
    for link in links:
        heard, link.heard = link.heard, None
        if heard is not None:
            told |= heard.told_to()
    return told


def hoarding(seen: list[Seen]) -> list[Seen]:
    """Connections of processes that go on asking for much and take none of it.

    By TCP much is under way all the time to who is far away, and no sign of anything.
    """
    taking_none = [one for one in seen if one.takes_none and is_process(one.source)]
    told: Counter[str] = Counter()
    for one in taking_none:
        told[one.source] += one.told_bytes
    return [one for one in taking_none if told[one.source] >= HOARD_BYTES]


def connections_to(sources: list[PeerLink]) -> list[tuple[int, str]]:
    """Descriptors of links that we made, and the endpoint of each."""
    endpoints = {one.endpoint for one in sources}
    found: list[tuple[int, str]] = []
    for name in os.listdir("/proc/self/fd") if sources else ():
        with suppress(OSError), opened(int(name)) as connection:
            if (at := connected_to(connection)) in endpoints:
                found.append((int(name), at))
    return found


def cut_from(descriptor: int, endpoint: str) -> None:
    """Cut a link that we made; libzmq then connects anew."""
    with suppress(OSError), opened(descriptor) as connection:
        if connected_to(connection) == endpoint:
            connection.shutdown(socket.SHUT_RDWR)


def connected_to(connection: socket.socket) -> str:
    """As an endpoint; empty if it is no connection to another machine, or this one's address."""
    if connection.family == socket.AF_UNIX:
        return ""
    host, port = connection.getpeername()[:2]
    host = host.removeprefix("::ffff:")  # libzmq's sockets are IPv6's, for either
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def queued_bytes(descriptor: int, which: int) -> int:
    """What the kernel has of a connection, for us or for the other side."""
    count = array("i", [0])
    with suppress(OSError):  # it has ended
        ioctl(descriptor, which, count)
    return count[0]


def give_back() -> None:
    """To the kernel, what was freed; the C library would keep it."""
    ctypes.CDLL(None).malloc_trim(0)


def own_bytes() -> int:
    """Resident memory without pools and other shared mappings."""
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * PAGE_BYTES
