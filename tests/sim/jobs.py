"""One request, as the router sees it: two sides, an attempt, and a new one when it failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvferry_proto.states import Role
from sim.memory import Broken, name_of
from sim.sides import Side, SinkSide, SourceSide

if TYPE_CHECKING:
    from sim.world import World

Group = tuple[int, str]  # attempt, and the daemon that knows of it
SIDES: dict[Role, type[SourceSide | SinkSide]] = {
    Role.SOURCE: SourceSide,
    Role.SINK: SinkSide,
}


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Everything about a request that is decided before it starts."""

    name: str
    source: str  # machine
    sink: str
    source_process: str
    sink_process: str
    tokens: int  # the total is so much above the sink's start
    start_source: int
    start_sink: int
    window_source: int
    window_sink: int
    whole: bool
    max_tokens: int
    late: bool  # the total is told with the last tokens or after
    early_aux: bool
    eager: bool  # take over whatever is there, not only what must be taken
    goodbye: bool  # the prefill worker does not wait for the end
    think_s: float
    ranks: int  # of a group; 1 is none
    ranks_sink: int  # another number than the source's only in a few
    source_at_s: float
    sink_at_s: float

    def ranks_of(self, role: Role) -> int:
        """How many workers a side has."""
        return self.ranks if role is Role.SOURCE else self.ranks_sink

    @property
    def is_alike(self) -> bool:
        """Whether whole blocks can travel, or change owner."""
        layouts = [is_wide(process) for process in (self.source_process, self.sink_process)]
        return self.ranks == self.ranks_sink and layouts[0] == layouts[1]


class Job:
    """The router's book of one request."""

    def __init__(self, world: World, number: int, plan: JobPlan) -> None:
        self.world = world
        self.number = number
        self.plan = plan
        self.total = plan.start_sink + plan.tokens
        self.aux: dict[str, int | float | str | bytes] | None = None
        if world.plan.aux:
            self.aux = {"first": number}
        self.source_address = f"tcp://{plan.source}:1"
        self.attempt = 0
        self.sides: dict[tuple[Role, int], Side] = {}
        self.taken: dict[tuple[Group, int], list[int]] = {}  # by rank: what it took up to
        self.shown: dict[tuple[Role, Group, int], tuple[object, ...]] = {}  # by snapshot number
        self._consumed: set[tuple[int, int]] = set()  # (attempt, rank)
        self.done = False  # consumed to the end
        self.cancelled = False
        self.lost = False  # its sink is gone, and nobody tells its source
        self.finished = False
        self.source_succeeded = False
        self.excuse: str | None = None  # why an attempt of it may fail
        self.story: list[str] = []
        self.members = [(role, rank) for role in Role for rank in range(plan.ranks_of(role))]
        for role, rank in self.members:
            at_s = self.begins_s(role) + rank * plan.think_s
            world.clock.at(at_s, self.begin, role, rank)

    def begins_s(self, role: Role) -> float:
        """When the workers of a side hear of the request."""
        return self.plan.source_at_s if role is Role.SOURCE else self.plan.sink_at_s

    def name(self, attempt: int, rank: int = 0) -> int:
        """What the memory model calls token 0 of an attempt.

        Ranks of unequal groups have all the same: planes without heads.
        """
        same = self.plan.ranks != self.plan.ranks_sink
        return name_of(self.number, attempt, 0 if same else rank)

    def process_name(self, role: Role, rank: int) -> str:
        """Which process of which machine does this side."""
        plan = self.plan
        return rank_process(plan.source_process if role is Role.SOURCE else plan.sink_process, rank)

    def begin(self, role: Role, rank: int) -> None:
        """A worker hears of the request, and of the attempt that is current by then."""
        self.switch(role, rank, self.attempt)

    def switch(self, role: Role, rank: int, attempt: int) -> None:
        """A worker is told of an attempt."""
        if attempt != self.attempt or self.cancelled or self.done:
            return
        old = self.sides.get((role, rank))
        if old is not None and old.key.attempt == attempt:
            return
        if old is not None:
            old.give_up(abort=self.world.dice.random() < 0.3)
        process = self.world.processes[self.process_name(role, rank)]
        if process.alive:  # else it hears of it when it is started again
            side = self.sides[role, rank] = SIDES[role](self, attempt, process, rank)
            side.start()

    def attempt_failed(self, attempt: int, why: str) -> None:
        """A side says that an attempt has failed."""
        if attempt != self.attempt or self.done or self.cancelled:
            return
        self.story.append(f"{self.world.clock.now_s:.3f} attempt {attempt}: {why}")
        self.world.say(self.plan.name, "FAILED", f"attempt {attempt}: {why}")
        if self.excuse is None:
            raise Broken(f"{self.plan.name} failed for no good reason: {self.story}")
        self.world.clock.after(0.3 * self.world.dice.random(), self.retry, attempt)

    def retry(self, attempt: int) -> None:
        """Both sides are told of the next attempt, each in its own time."""
        if attempt != self.attempt or self.done or self.cancelled:
            return
        self.attempt += 1
        for role, rank in self.members:
            wait_s = 0.4 * self.world.dice.random()
            self.world.clock.after(wait_s, self.switch, role, rank, self.attempt)

    def cancel(self, first: Role) -> None:
        """The user has gone away: one side aborts, the other hears of it, or is told."""
        if self.done or self.cancelled:
            return
        self.excuse = self.excuse or "cancelled"
        self.cancelled = True
        for role, rank in self.members:
            abort = (role, rank) == (first, self.plan.ranks_of(first) - 1)
            wait_s = 0.0 if abort else self.world.dice.random()
            side = self.sides.get((role, rank))
            if side is not None:
                self.world.clock.after(wait_s, self._give_up, side, abort)
        self.look()

    def lose(self) -> None:
        """Its sink's daemon is about to be gone for good, and the router with it."""
        if self.done or self.cancelled:
            return
        self.cancelled = self.lost = True
        for rank in range(self.plan.ranks):
            side = self.sides.pop((Role.SINK, rank), None)
            if side is not None:
                side.process.forget(side)
                side.process.sides.pop((side.key, rank), None)
        self.look()

    def _give_up(self, side: Side, abort: bool) -> None:
        if side.process.alive:
            side.process.later(0.0, lambda: side.give_up(abort=abort))

    def took(self, group: Group, rank: int, end: int) -> None:
        """I10: ranks take the same tokens over, each in its own time."""
        mine = self.taken.setdefault((group, rank), [])
        mine.append(end)
        for other in range(self.plan.ranks_sink):
            theirs = self.taken.get((group, other), [])
            both = min(len(mine), len(theirs))
            if mine[:both] != theirs[:both]:
                raise Broken(f"I10: rank {rank} took {mine}, rank {other} {theirs}")

    def was_shown(self, role: Role, group: Group, number: int, what: tuple[object, ...]) -> None:
        """I10: a snapshot number shows all ranks the same."""
        before = self.shown.setdefault((role, group, number), what)
        if before != what:
            raise Broken(f"I10: snapshot {number} of the {role} showed {before}, then {what}")

    def consumed(self, attempt: int, rank: int) -> None:
        """A decode worker has every token of an attempt."""
        self.world.say(self.plan.name, "CONSUMED", f"attempt {attempt}, rank {rank}")
        self._consumed.add((attempt, rank))
        if all((attempt, one) in self._consumed for one in range(self.plan.ranks_sink)):
            self.done |= attempt == self.attempt

    def look(self) -> None:
        """Has everything ended?"""
        if self.finished or not (self.done or self.cancelled):
            return
        if all(side.over for side in self.sides.values()):
            self.finished = True
            self.world.unfinished -= 1
            if self.excuse is None and not (self.source_succeeded or self.plan.goodbye):
                raise Broken(f"{self.plan.name} was consumed, but its source did not succeed")


def rank_process(process: str, rank: int) -> str:
    """Each rank of a group is a process of its own."""
    return f"{process}_r{rank}" if rank else process


def is_wide(process: str) -> bool:
    """Whether the blocks of a process are the larger ones: its name tells."""
    return "_wide" in process
