"""The daemons that pull from us: which life of which daemon a message comes from."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice, takewhile

from kvferry_proto.errors import Code, FerryError
from kvferry_proto.peer import PeerHello

SINKS_MAX = 4096
LINKS_OF_ONE = 64  # a daemon has one; those of a node may share a key


def known_as(daemon_id: str, peer: str) -> str:
    """The id under which we keep a daemon: another peer that says it is this one has another id."""
    return hashlib.sha256(f"{peer} {daemon_id}".encode()).hexdigest()[:32] if peer else daemon_id


@dataclass(slots=True)
class SinkDaemon:
    """One link of the newest life of a daemon that has said hello."""

    daemon_id: str
    boot_id: str
    life: int
    route: bytes
    heard_s: float
    peer: str = ""  # the name under which its key is trusted
    news: int = 0  # that it was told
    address: str = ""  # of its own peer socket, by its own word
    key: str = ""  # that its newest message came with

    @property
    def whose(self) -> str:
        """Who answers for it: the peer that its key is, or in clear what it says that it is."""
        return self.peer or self.daemon_id


class SinkDaemons:
    """Bounded: who has said nothing for the longest time is forgotten, and must say hello again."""

    def __init__(self) -> None:
        self._by_boot: OrderedDict[str, SinkDaemon] = OrderedDict()
        self._links: dict[str, set[str]] = {}  # daemon's id -> boot ids of its newest life

    def __contains__(self, boot_id: str) -> bool:
        return boot_id in self._by_boot

    def hello(self, route: bytes, peer: str, hello: PeerHello, now_s: float) -> list[str]:
        """Note a daemon's life; return the boot ids that are over by that.

        Raises FerryError: daemon_restarted for a hello of an earlier life that came late,
        peer_protocol for one with the boot id of another daemon.
        """
        daemon_id = known_as(hello.daemon_id, peer)
        known = self._by_boot.get(hello.boot_id)
        if known is not None and known.daemon_id != daemon_id:
            raise FerryError(Code.PEER_PROTOCOL, "this boot id is another daemon's")
        links = self._links.get(daemon_id, set())
        life = self._by_boot[next(iter(links))].life if links else 0
        if hello.life < life:
            raise FerryError(Code.DAEMON_RESTARTED, "a later life of yours has said hello")
        over = sorted(links) if hello.life > life else []
        # Said again, the count goes on: who does not hear the answer would take news for old ones.
        news = 0 if known is None else known.news
        self._by_boot[hello.boot_id] = SinkDaemon(
            daemon_id, hello.boot_id, hello.life, route, now_s, peer, news, hello.address
        )
        self._by_boot.move_to_end(hello.boot_id)
        self._links.setdefault(daemon_id, set()).add(hello.boot_id)
        if len(self._by_boot) - len(over) > SINKS_MAX:
            over.append(next(iter(self._by_boot)))
        over += self._of_one(peer, daemon_id, over)
        for boot_id in over:
            self._forget(boot_id)
        return over

    def _of_one(self, peer: str, daemon_id: str, over: list[str]) -> list[str]:
        """The links that one peer has too many: those that have said nothing for longest."""
        mine = [
            boot_id
            for boot_id, one in self._by_boot.items()
            if one.whose == (peer or daemon_id) and boot_id not in over
        ]
        return mine[: max(0, len(mine) - LINKS_OF_ONE)]

    def distrust(self, trusted: frozenset[str]) -> list[str]:
        """Forget the links whose keys are not among these; return their boot ids."""
        over = [
            boot_id for boot_id, one in self._by_boot.items() if one.key and one.key not in trusted
        ]
        for boot_id in over:
            self._forget(boot_id)
        return over

    def _forget(self, boot_id: str) -> None:
        daemon_id = self._by_boot.pop(boot_id).daemon_id
        links = self._links[daemon_id]
        links.discard(boot_id)
        if not links:
            del self._links[daemon_id]

    def seen(self, boot_id: str, route: bytes, peer: str, now_s: float) -> SinkDaemon:
        """A message has come from this life; FerryError(hello_first) if we do not know it."""
        daemon = self._by_boot.get(boot_id)
        if daemon is None or daemon.peer != peer:
            raise FerryError(Code.HELLO_FIRST, "this life of a daemon has not said hello")
        daemon.route = route
        daemon.heard_s = now_s
        self._by_boot.move_to_end(boot_id)
        return daemon

    def last_heard(self, then_s: float, most: int) -> list[SinkDaemon]:
        """Those that said something since then, the last one last; no more than so many."""
        newest = takewhile(lambda one: one.heard_s >= then_s, reversed(self._by_boot.values()))
        return list(islice(newest, most))[::-1]

    def get(self, boot_id: str | None) -> SinkDaemon | None:
        """The daemon of this life, if it is known."""
        return self._by_boot.get(boot_id) if boot_id is not None else None
