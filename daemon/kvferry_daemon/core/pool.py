"""The blocks of one pool: who has which, under which lease, within which quota.

A lease is a fencing token: its number only grows, and nothing can be done with one that was freed
or handed on. Whatever raises PoolError has changed nothing.
"""

from collections.abc import Iterable
from typing import NamedTuple

from kvferry_daemon.core.allocator import CLEAN, Run, RunAllocator
from kvferry_proto.states import Role

_tuple = tuple.__new__  # a third of the cost of calling a NamedTuple's class
_SINK = Role.SINK  # an enum member is no cheap dict key: quotas are a list, sinks' at [1]


LEASES_OF_A_LIFE = 1 << 40  # a later life's leases are all above an earlier one's


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

    __slots__ = (
        "_free",
        "_last_lease_id",
        "_left",
        "_live",
        "_quarantined",
        "_quota",
        "blocks",
        "quarantined_blocks",
    )

    def __init__(
        self, blocks: int, source_blocks: int, sink_blocks: int, last_lease_id: int = 0
    ) -> None:
        """``last_lease_id``: above all that was ever granted on these blocks."""
        self.blocks = blocks
        self.quarantined_blocks = 0
        self._free = RunAllocator(blocks)
        self._quota = (source_blocks, sink_blocks)
        self._left = [source_blocks, sink_blocks]
        self._live: dict[int, Lease] = {}
        self._quarantined: set[int] = set()
        self._last_lease_id = last_lease_id

    def take_up(self, leases: list[Lease]) -> None:
        """Begin with what an earlier life had granted; ValueError if that cannot be.

        What is free may hold anybody's bytes.
        """
        self._free = RunAllocator.around(self.blocks, [lease.run for lease in leases])
        for lease in leases:
            if lease.lease_id in self._live or not 0 < lease.lease_id <= self._last_lease_id:
                raise ValueError(f"{lease} cannot be live")
            self._live[lease.lease_id] = lease
            self._left[lease.role is _SINK] -= lease.run.blocks
        if min(self._left) < 0:
            raise ValueError("more blocks are leased than the quotas allow")

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody has."""
        return self._free.free_blocks

    @property
    def largest_run(self) -> int:
        """Blocks of the longest free run. Walks all runs: for operators."""
        return max((run.blocks for run in self._free.runs()), default=0)

    @property
    def leased_blocks(self) -> int:
        """Blocks that somebody has and that are not quarantined (I8)."""
        return self.blocks - self._free.free_blocks - self.quarantined_blocks

    def room(self, role: Role) -> int:
        """Blocks that could be granted to a role now."""
        free, left = self._free.free_blocks, self._left[role is _SINK]
        return min(left, free)

    def room_left(self, role: Role) -> int:
        """Blocks that a role's quota still allows, free or not."""
        return self._left[role is _SINK]

    def grant(self, owner: int, role: Role, blocks: int) -> Grant:
        """Grant up to ``blocks``; fewer when space or quota is short, in runs of neighbours."""
        left, sink = self._left, role is _SINK
        most = left[sink]
        if blocks > most:  # noqa: PLR1730  min() is a call, a tenth of the whole
            blocks = most
        taken = self._free.take(blocks)
        if len(taken) == 1:  # nearly always: worth a way of its own, without a call
            [(run, tag)] = taken
            self._last_lease_id = lease_id = self._last_lease_id + 1
            lease = self._live[lease_id] = _tuple(Lease, (lease_id, owner, role, run))
            left[sink] = most - run[1]
            return _tuple(Grant, ((lease,), (run,) if tag != owner and tag != CLEAN else ()))
        return Grant(
            tuple([self._new(owner, role, run) for run, _ in taken]),
            tuple([run for run, tag in taken if tag != owner and tag != CLEAN]),
        )

    def free(self, lease: Lease) -> None:
        """Free a whole lease; PoolError if it is not exactly the live one."""
        lease_id, owner, role, run = lease
        live = self._live.get(lease_id)
        if live is not lease and live != lease:
            raise _not_live(lease, live)
        del self._live[lease_id]
        self._left[role is _SINK] += run[1]
        if self._quarantined and lease_id in self._quarantined:
            self._quarantined.remove(lease_id)
            self.quarantined_blocks -= run[1]
        self._free.give(run, owner)

    def free_front(self, lease: Lease, blocks: int) -> Lease | None:
        """Free the first blocks of a lease and return what is left of it.

        ``lease`` may be the live one or a front of it (a window cuts its own copy): it must begin
        where the live one does and hold no more. ``blocks`` are counted within it.
        """
        rest = self._cut(lease, blocks)
        self._free.give(Run(lease.run.first_block, blocks), lease.owner)
        return rest

    def free_tail(self, lease: Lease) -> None:
        """Free the last blocks of a lease: ``lease`` ends where the live one does."""
        lease_id, owner, role, (first, blocks) = lease
        live = self._live.get(lease_id)
        if (
            live is None
            or live[:3] != lease[:3]
            or sum(live.run) != first + blocks
            or not 0 < blocks <= live.run.blocks
            or lease_id in self._quarantined
        ):
            raise _not_live(lease, live)
        left = live.run.blocks - blocks
        if left:
            self._live[lease_id] = live._replace(run=Run(live.run.first_block, left))
        else:
            del self._live[lease_id]
        self._left[role is _SINK] += blocks
        self._free.give(lease.run, owner)

    def regrant(self, lease: Lease, blocks: int, owner: int, role: Role) -> Lease:
        """Hand the first blocks of a lease to another owner, bytes and all, as a new lease.

        ``lease`` as for ``free_front``, but not quarantined: somebody may still touch those.
        """
        if role is not lease.role and self.room_left(role) < blocks:
            raise PoolError(f"{blocks} blocks are over the {role} quota")
        if lease.lease_id in self._quarantined:
            raise PoolError(f"{lease} is quarantined")
        self._cut(lease, blocks)
        return self._new(owner, role, Run(lease.run.first_block, blocks))

    def quarantine(self, lease: Lease) -> None:
        """Note that somebody may still touch a lease's blocks; freeing it ends that."""
        live = self._live.get(lease.lease_id)
        if live != lease:
            raise _not_live(lease, live)
        if lease.lease_id not in self._quarantined:
            self._quarantined.add(lease.lease_id)
            self.quarantined_blocks += lease.run.blocks

    def check(self) -> None:
        """Raise PoolError unless every block is free or in one lease (I1, I8). Walks them all."""
        free, live = self._free.runs(), self._live
        expected = 0
        for run in sorted(free + [lease.run for lease in live.values()]):
            if run.first_block != expected or run.blocks <= 0:
                raise PoolError(f"blocks from {expected} on are lost or doubled: {run}")
            expected += run.blocks
        if any(
            not lease_id == lease.lease_id <= self._last_lease_id
            for lease_id, lease in live.items()
        ):
            raise PoolError(f"leases are out of order: {live}")
        if not self._quarantined <= live.keys():
            raise PoolError(f"quarantined but not live: {self._quarantined - live.keys()}")
        held = {role: _blocks(x for x in live.values() if x.role is role) for role in Role}
        counted = (
            self.free_blocks,
            self.quarantined_blocks,
            *(quota - left for quota, left in zip(self._quota, self._left, strict=True)),
        )
        walked = (
            sum(run.blocks for run in free),
            _blocks(live[lease_id] for lease_id in self._quarantined),
            held[Role.SOURCE],
            held[Role.SINK],
        )
        if expected != self.blocks or counted != walked or min(self._left) < 0:
            raise PoolError(f"{expected} of {self.blocks} blocks, {walked} counted as {counted}")

    def _new(self, owner: int, role: Role, run: Run) -> Lease:
        self._last_lease_id = lease_id = self._last_lease_id + 1
        lease = self._live[lease_id] = _tuple(Lease, (lease_id, owner, role, run))
        self._left[role is _SINK] -= run[1]
        return lease

    def _cut(self, lease: Lease, blocks: int) -> Lease | None:
        """Take the first blocks of ``lease``, the live one or a front of it, out of the books."""
        lease_id, owner, role, (first, most) = lease
        live = self._live.get(lease_id)
        if (
            live is None
            or live[:3] != (lease_id, owner, role)
            or live.run.first_block != first
            or not 0 < blocks <= most <= live.run.blocks
        ):
            raise _not_live(lease, live, blocks)
        self._left[role is _SINK] += blocks
        if lease_id in self._quarantined:
            self.quarantined_blocks -= blocks
        size = live.run.blocks
        if blocks == size:
            del self._live[lease_id]
            self._quarantined.discard(lease_id)
            return None
        rest = self._live[lease_id] = live._replace(run=Run(first + blocks, size - blocks))
        return rest


def _blocks(leases: Iterable[Lease]) -> int:
    return sum(lease.run.blocks for lease in leases)


def _not_live(lease: Lease, live: Lease | None, blocks: int | None = None) -> PoolError:
    some = "" if blocks is None else f"{blocks} blocks of "
    return PoolError(f"{some}{lease} are not live; that number is {live}")
