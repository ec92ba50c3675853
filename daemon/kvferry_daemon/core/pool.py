"""The blocks of one pool: who has which, under which lease, within which quota.

A lease is a fencing token: its number only grows, and nothing can be done with one that was freed
or handed on.
"""

from typing import NamedTuple

from kvferry_daemon.core.allocator import CLEAN, Run, RunAllocator
from kvferry_proto.states import Role

_SINK = Role.SINK  # an enum member is no cheap dict key: quotas are a list, sinks' at [1]


class Lease(NamedTuple):
    """One run of blocks granted to one owner."""

    lease_id: int
    owner: int
    role: Role
    run: Run


class Grant(NamedTuple):
    """Blocks for an owner. ``dirty`` ones hold another's bytes and must be wiped first."""

    leases: tuple[Lease, ...]
    dirty: tuple[Run, ...]


class PoolError(Exception):
    """A lease that is not live, or a quota that is too small: a mistake of ours."""


class BlockPool:
    """Free + leased + quarantined blocks = ``blocks``, always."""

    def __init__(self, blocks: int, source_blocks: int, sink_blocks: int) -> None:
        self.blocks = blocks
        self.quarantined_blocks = 0
        self._free = RunAllocator(blocks)
        self._left = [source_blocks, sink_blocks]
        self._quota_blocks = source_blocks + sink_blocks
        self._live: dict[int, Lease] = {}
        self._quarantined: set[int] = set()
        self._last_lease_id = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody has."""
        return self._free.free_blocks

    @property
    def largest_run(self) -> int:
        """Blocks of the longest free run. Walks all runs: for operators."""
        return max((run.blocks for run in self._free.runs()), default=0)

    def leased_blocks(self, role: Role) -> int:
        """Blocks of a role that are not quarantined. Walks all leases: for operators."""
        return sum(
            lease.run.blocks
            for lease in self._live.values()
            if lease.role is role and lease.lease_id not in self._quarantined
        )

    def room(self, role: Role) -> int:
        """Blocks that could be granted to a role now."""
        free, left = self._free.free_blocks, self._left[role is _SINK]
        return min(left, free)

    def room_left(self, role: Role) -> int:
        """Blocks that a role's quota still allows, free or not."""
        return self._left[role is _SINK]

    def grant(self, owner: int, role: Role, blocks: int) -> Grant:
        """Grant up to ``blocks``; fewer when space or quota is short, in runs of neighbours."""
        left = self._left[role is _SINK]
        blocks = min(blocks, left)
        leases, dirty = [], []
        for run, tag in self._free.take(blocks):
            leases.append(self._new(owner, role, run))
            if tag != owner and tag != CLEAN:
                dirty.append(run)
        return Grant(tuple(leases), tuple(dirty))

    def free(self, lease: Lease) -> None:
        """Free a whole lease; PoolError if it is not exactly the live one."""
        self.free_front(lease, lease.run.blocks)

    def free_front(self, lease: Lease, blocks: int) -> Lease | None:
        """Free the first blocks of a lease and return what is left of it.

        ``lease`` may itself be a front of the live one: what matters is where it starts.
        """
        rest = self._cut(lease, blocks)
        run = lease.run if rest is None else Run(lease.run.first_block, blocks)
        self._free.give(run, lease.owner)
        return rest

    def regrant(self, lease: Lease, blocks: int, owner: int, role: Role) -> Lease:
        """Hand the first blocks of a lease to another owner, bytes and all, as a new lease."""
        if role is not lease.role and self.room_left(role) < blocks:
            raise PoolError(f"{blocks} blocks are over the {role} quota")
        self._cut(lease, blocks)
        return self._new(owner, role, Run(lease.run.first_block, blocks))

    def quarantine(self, lease: Lease) -> None:
        """Note that somebody may still touch a lease's blocks; freeing it ends that."""
        live = self._live.get(lease.lease_id)
        if live != lease:
            raise PoolError(f"{lease} is not live; that number is {live}")
        if lease.lease_id not in self._quarantined:
            self._quarantined.add(lease.lease_id)
            self.quarantined_blocks += lease.run.blocks

    def check(self) -> None:
        """Raise PoolError unless every block is free or in one lease (I1, I8). Walks them all."""
        runs = self._free.runs() + [lease.run for lease in self._live.values()]
        expected = 0
        for run in sorted(runs):
            if run.first_block != expected:
                raise PoolError(f"blocks from {expected} on are lost or doubled: {run}")
            expected += run.blocks
        held = self._quota_blocks - sum(self._left)
        leased = sum(self.leased_blocks(role) for role in Role)
        total = self.free_blocks + leased + self.quarantined_blocks
        if not expected == self.blocks == total or held != leased + self.quarantined_blocks:
            raise PoolError(f"{expected} of {self.blocks} blocks, counters say {total}, {held}")

    def _new(self, owner: int, role: Role, run: Run) -> Lease:
        self._last_lease_id = lease_id = self._last_lease_id + 1
        lease = self._live[lease_id] = Lease(lease_id, owner, role, run)
        self._left[role is _SINK] -= run[1]
        return lease

    def _cut(self, lease: Lease, blocks: int) -> Lease | None:
        """Take the first blocks out of a live lease."""
        live = self._live.get(lease.lease_id)
        if (
            live is None
            or live.run.first_block != lease.run.first_block
            or not 0 < blocks <= live.run.blocks
        ):
            raise PoolError(f"{blocks} blocks of {lease} are not live; that number is {live}")
        self._left[live.role is _SINK] += blocks
        if lease.lease_id in self._quarantined:
            self.quarantined_blocks -= blocks
        if blocks == live.run.blocks:
            del self._live[lease.lease_id]
            self._quarantined.discard(lease.lease_id)
            return None
        first, size = live.run
        rest = live._replace(run=Run(first + blocks, size - blocks))
        self._live[lease.lease_id] = rest
        return rest
