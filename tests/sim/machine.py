"""A daemon's place: it outlives its lives, and keeps what is left of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.past import Past
from kvferry_daemon.core.settings import Settings
from sim.life import Life
from sim.memory import Memory

if TYPE_CHECKING:
    from sim.world import World

ZERO_S = 0.002


class Machine:
    """A daemon's place: it outlives its lives. Its clock is its own."""

    def __init__(self, world: World, name: str, settings: Settings, offset_s: float) -> None:
        self.world = world
        self.name = name
        self.settings = settings
        self.offset_s = offset_s
        self.paused_until_s = 0.0
        self.pools_refused = 0  # so many of the next pools cannot be made
        self.zero_s = ZERO_S
        self.lives = self.lives_of_daemon = self.daemons = 0
        self.life: Life | None = None
        self.writes_left = 0  # until it dies; 0: it does not
        self.away_s = 0.0
        self.keeps = False  # when it is started again
        self.ledger: dict[str, bytes] = {}
        self.memories: dict[str, Memory] = {}
        self.restart(with_ledger=False)

    @property
    def local_s(self) -> float:
        """The time as this machine has it."""
        return self.world.clock.now_s + self.offset_s

    def crash(self) -> None:
        """The daemon's process is gone at once."""
        if self.life is not None:
            self.world.say(self.name, "CRASH", "")
            self.life.end()
            self.life = None

    def restart(self, *, with_ledger: bool) -> None:
        """A new life, with a new boot id: of the same daemon, if it has its ledger and pools."""
        if self.life is not None:
            return
        past = None
        if with_ledger:
            past = Past()
            for name, body in self.ledger.items():
                past.add(name, body)
            known = {pool.pool_id for pool in past.pools}
            self.memories = {one: m for one, m in self.memories.items() if one in known}
            for memory in self.memories.values():
                memory.process_died()
        else:
            self.ledger, self.memories = {}, {}
            self.daemons += 1
            self.lives_of_daemon = 0
        self.lives += 1
        self.lives_of_daemon += 1
        self.life = Life(self, self.lives)
        self.world.say(self.name, "START", self.life.node.settings.boot_id)
        if past is not None:
            self.life.feed(out.Restored(past))

    def die_at_write(self, writes: int, for_s: float) -> None:
        """Be gone at the so many-th write from now on, and start again after ``for_s``."""
        self.writes_left, self.away_s = writes, for_s

    def dies_now(self) -> bool:
        """Whether this write is the one to be gone at."""
        if self.writes_left == 0 or self.world.is_calm:
            return False
        self.writes_left -= 1
        return self.writes_left == 0

    def hear(self, life: int | None, event: out.NodeEvent) -> None:
        """A message has come; ``life``: it is for that one only."""
        now = self.life
        if now is not None and life in (None, now.number):
            now.deliver(event)

    def skip_time(self, by_s: float) -> None:
        """The clock jumps, as when a virtual machine was suspended."""
        self.offset_s += by_s
        if self.life is not None:
            self.life.arm(again=True)
