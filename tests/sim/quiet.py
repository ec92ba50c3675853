"""What links say for all their transfers: looked at while nothing goes wrong any more.

The core has nets behind each of these, a pull a lease and the stall deadline, so that what is lost
for good here only costs time, and no other invariant would see it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core.events import Key
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.source import SourceTransfer
from kvferry_proto.states import Role
from sim.memory import Broken

if TYPE_CHECKING:
    from sim.world import World

LOOK_S = 0.5
NEWS_S = 6.0  # a silent link is found out and made anew well within it
LEASE_SPARE_S = 3.0


class Quiet:
    """Begins with the calm."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._begun_s = world.clock.now_s
        self._behind: dict[tuple[int, Key], tuple[object, float]] = {}
        self._look()

    def _look(self) -> None:
        world, behind = self._world, self._behind
        self._behind = {}
        for machine in world.machines.values():
            assert machine.life is not None
            node = machine.life.node
            for key, sink in node.transfers.items():
                if isinstance(sink, SinkTransfer) and not sink.ended and sink.opening.source:
                    self._look_at(node, sink, behind.get((id(node), key)))
        if world.clock.now_s >= self._begun_s + world.timing.lease_s + LEASE_SPARE_S:
            self._check_leases()
        world.clock.after(LOOK_S, self._look)

    def _look_at(self, node: Node, sink: SinkTransfer, before: tuple[object, float] | None) -> None:
        """What a source has to tell its sink hears soon, whatever was lost before."""
        machine = self._world.machine_at(sink.opening.source or "")
        assert machine.life is not None
        source = machine.life.node.transfers.get(sink.key._replace(role=Role.SOURCE))
        if sink.known_at is None or not is_behind(sink, source):
            return
        heard = (sink.available_tokens, sink.total_tokens, sink.aux is None)
        now_s = self._world.clock.now_s
        since_s = before[1] if before is not None and before[0] == heard else now_s
        if now_s - since_s > NEWS_S:
            raise Broken(f"I9: {sink.key} has not heard what its source has to tell: {heard}")
        self._behind[id(node), sink.key] = (heard, since_s)

    def _check_leases(self) -> None:
        """A source lives no longer than a lease for a sink that is no more."""
        for job in self._world.jobs:
            life = self._world.machines[job.plan.source].life
            assert life is not None
            key = Key(Role.SOURCE, job.plan.name, job.attempt)
            source = life.node.transfers.get(key)
            if not (job.lost and isinstance(source, SourceTransfer)) or source.ended:
                continue
            if source.sink_daemon is not None:
                raise Broken(f"I9: {key} is kept by a sink that is no more")


def is_behind(sink: SinkTransfer, source: object) -> bool:
    """Whether the source has something to tell that the sink does not know."""
    if not isinstance(source, SourceTransfer) or source.ended:
        return True
    return (
        source.servable_tokens > sink.available_tokens
        or (source.total_tokens is not None and sink.total_tokens is None)
        or (source.aux is not None and sink.aux is None)
    )
