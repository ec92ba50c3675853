"""The daemons that pull from us: which life of which daemon a message comes from."""

from collections import OrderedDict
from dataclasses import dataclass

from kvferry_proto.errors import Code, FerryError
from kvferry_proto.peer import PeerHello

SINKS_MAX = 4096


@dataclass(slots=True)
class SinkDaemon:
    """The newest life of a daemon that has said hello."""

    daemon_id: str
    boot_id: str
    life: int
    route: bytes


class SinkDaemons:
    """Bounded: who has said nothing for the longest time is forgotten, and must say hello again."""

    def __init__(self) -> None:
        self._by_boot: OrderedDict[str, SinkDaemon] = OrderedDict()
        self._boots: dict[str, str] = {}  # daemon's id -> its newest boot id

    def __contains__(self, boot_id: str) -> bool:
        return boot_id in self._by_boot

    def hello(self, route: bytes, hello: PeerHello) -> list[str]:
        """Note a daemon's life; return the boot ids that are over by that.

        Raises FerryError(daemon_restarted) for a hello of an earlier life that came late.
        """
        over = []
        before = self._boots.get(hello.daemon_id)
        if before is not None and before != hello.boot_id:
            if hello.life <= self._by_boot[before].life:
                raise FerryError(Code.DAEMON_RESTARTED, "a later life of yours has said hello")
            over.append(before)
            del self._by_boot[before]
        self._boots[hello.daemon_id] = hello.boot_id
        daemon = SinkDaemon(hello.daemon_id, hello.boot_id, hello.life, route)
        self._by_boot[hello.boot_id] = daemon
        self._by_boot.move_to_end(hello.boot_id)
        if len(self._by_boot) > SINKS_MAX:
            boot_id, gone = self._by_boot.popitem(last=False)
            if self._boots.get(gone.daemon_id) == boot_id:
                del self._boots[gone.daemon_id]
            over.append(boot_id)
        return over

    def seen(self, boot_id: str, route: bytes) -> SinkDaemon:
        """A message has come from this life; FerryError(hello_first) if we do not know it."""
        daemon = self._by_boot.get(boot_id)
        if daemon is None:
            raise FerryError(Code.HELLO_FIRST, "this life of a daemon has not said hello")
        daemon.route = route
        self._by_boot.move_to_end(boot_id)
        return daemon

    def route_of(self, boot_id: str) -> bytes | None:
        """Where to answer."""
        daemon = self._by_boot.get(boot_id)
        return None if daemon is None else daemon.route
