"""BlockPool: random lives against sets of blocks, and every stale lease by name."""

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.test_allocator import FreeBlocks, blocks_of
from kvferry_daemon.core.allocator import CLEAN, Run
from kvferry_daemon.core.pool import BlockPool, Lease, PoolError
from kvferry_proto.states import Role

BLOCKS, QUOTA = 30, {Role.SOURCE: 12, Role.SINK: 22}  # together more than there are

ROLES = st.sampled_from(Role)
OWNERS = st.integers(1, 3)


class PoolLife(RuleBasedStateMachine):
    """Owners take, cut, hand over, quarantine and free; stale leases are tried all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, QUOTA[Role.SOURCE], QUOTA[Role.SINK])
        self.free = FreeBlocks(BLOCKS)
        self.live: dict[int, Lease] = {}
        self.quarantined: set[int] = set()
        self.stale: list[Lease] = []
        self.last_id = 0

    def used(self, role: Role) -> int:
        return sum(lease.run.blocks for lease in self.live.values() if lease.role is role)

    def granted(self, lease: Lease) -> None:
        assert lease.lease_id > self.last_id, "I1: a grant has a higher number"
        self.last_id = lease.lease_id
        self.live[lease.lease_id] = lease

    def cut(self, lease: Lease, blocks: int) -> Lease | None:
        """What the pool must answer when the front of a lease goes."""
        self.stale.append(self.live.pop(lease.lease_id))
        first, size = lease.run
        if blocks == size:
            self.quarantined.discard(lease.lease_id)
            return None
        rest = self.live[lease.lease_id] = lease._replace(run=Run(first + blocks, size - blocks))
        return rest

    def draw_lease(self, data: st.DataObject) -> Lease:
        return self.live[data.draw(st.sampled_from(sorted(self.live)))]

    @rule(owner=OWNERS, role=ROLES, blocks=st.integers(0, 8) | st.integers(0, BLOCKS + 5))
    def grant(self, owner: int, role: Role, blocks: int) -> None:
        most = min(blocks, QUOTA[role] - self.used(role), len(self.free.tags))
        tags = dict(self.free.tags)
        sizes = self.free.sizes_of(most)
        tags_joined = dict(self.free.tags)
        leases, dirty = self.pool.grant(owner, role, blocks)
        assert [lease.run.blocks for lease in leases] == sizes
        runs = [lease.run for lease in leases]
        assert all((lease.owner, lease.role) == (owner, role) for lease in leases)
        # Exact: what the joined runs say, and never less than what the single blocks say.
        assert dirty == tuple(r for r in runs if tags_joined[r.first_block] not in (CLEAN, owner))
        wiped = {block for run in dirty for block in blocks_of(run)}
        seen = {block for run in runs for block in blocks_of(run)} - wiped
        assert {tags[block] for block in seen} <= {CLEAN, owner}
        self.free.take([(run, tags_joined[run.first_block]) for run in runs])
        for lease in leases:
            self.granted(lease)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_all(self, data: st.DataObject) -> None:
        lease = self.draw_lease(data)
        self.pool.free(lease)
        self.cut(lease, lease.run.blocks)
        self.free.give(lease.run, lease.owner)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), of_front=st.booleans())
    def free_front(self, data: st.DataObject, of_front: bool) -> None:
        lease = self.draw_lease(data)
        blocks = data.draw(st.integers(1, lease.run.blocks))
        front = Run(lease.run.first_block, blocks)
        shown = lease._replace(run=front) if of_front else lease
        assert self.pool.free_front(shown, blocks) == self.cut(lease, blocks)
        self.free.give(front, lease.owner)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), owner=OWNERS, role=ROLES)
    def regrant(self, data: st.DataObject, owner: int, role: Role) -> None:
        lease = self.draw_lease(data)
        blocks = data.draw(st.integers(1, lease.run.blocks))
        over = role is not lease.role and self.used(role) + blocks > QUOTA[role]
        if over or lease.lease_id in self.quarantined:
            with pytest.raises(PoolError):
                self.pool.regrant(lease, blocks, owner, role)
            return
        handed = self.pool.regrant(lease, blocks, owner, role)
        assert handed[1:] == (owner, role, Run(lease.run.first_block, blocks))
        self.cut(lease, blocks)
        self.granted(handed)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        lease = self.draw_lease(data)
        self.pool.quarantine(lease)
        self.quarantined.add(lease.lease_id)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def use_a_stale_lease(self, data: st.DataObject) -> None:
        refused_all(self.pool, data.draw(st.sampled_from(self.stale)))

    @rule()
    def check(self) -> None:
        """A rule, no invariant: it joins what was freed last, which must also go unlooked at."""
        self.free.join()
        self.pool.check()
        assert self.pool.largest_run == max((run.blocks for run in self.free.runs()), default=0)

    @invariant()
    def one_owner_for_every_block(self) -> None:
        held = [block for lease in self.live.values() for block in blocks_of(lease.run)]
        assert sorted([*held, *self.free.tags]) == list(range(BLOCKS))

    @invariant()
    def the_counters_are_right(self) -> None:
        pool = self.pool
        quarantined = sum(self.live[lease_id].run.blocks for lease_id in self.quarantined)
        assert pool.quarantined_blocks == quarantined
        assert pool.free_blocks == len(self.free.tags)
        used = sum(self.used(role) for role in Role)
        assert pool.leased_blocks == used - quarantined
        assert pool.free_blocks + used == pool.blocks == BLOCKS
        for role in Role:
            left = QUOTA[role] - self.used(role)
            assert pool.room_left(role) == left
            assert pool.room(role) == min(left, len(self.free.tags))

    def teardown(self) -> None:
        for lease in self.live.values():
            self.pool.free(lease)
        self.pool.check()
        assert self.pool.free_blocks == BLOCKS


TestPoolLife = PoolLife.TestCase


def refused_all(pool: BlockPool, lease: Lease) -> None:
    """Whatever is done with a lease that is not live is refused."""
    calls: list[Callable[[], object]] = [
        lambda: pool.free(lease),
        lambda: pool.free_front(lease, 1),
        lambda: pool.free_front(lease, lease.run.blocks),
        lambda: pool.regrant(lease, 1, 3, lease.role),
        lambda: pool.quarantine(lease),
    ]
    for call in calls:
        with pytest.raises(PoolError):
            call()


def state_of(pool: BlockPool) -> tuple[object, ...]:
    """All that a refused call must leave alone, down to who had the free blocks last."""
    free = pool._free
    return (
        dict(pool._live),
        set(pool._quarantined),
        list(pool._left),
        pool._last_lease_id,
        pool.quarantined_blocks,
        pool.free_blocks,
        free.runs(),
        dict(free._tags),
    )


def pool_of_four() -> tuple[BlockPool, Lease]:
    """A sink's lease of four blocks out of eight; the source's quota is one block."""
    pool = BlockPool(8, 1, 8)
    return pool, pool.grant(1, Role.SINK, 4).leases[0]


NOT_LIVE: dict[str, Callable[[Lease], Lease]] = {
    "another number": lambda lease: lease._replace(lease_id=99),
    "another owner": lambda lease: lease._replace(owner=2),
    "another role": lambda lease: lease._replace(role=Role.SOURCE),
    "longer": lambda lease: lease._replace(run=Run(0, 5)),
    "moved": lambda lease: lease._replace(run=Run(1, 3)),
    "empty": lambda lease: lease._replace(run=Run(0, 0)),
}


@pytest.mark.parametrize("name", NOT_LIVE)
def test_a_lease_of_another_shape_is_refused_and_changes_nothing(name: str) -> None:
    pool, lease = pool_of_four()
    before = state_of(pool)
    refused_all(pool, NOT_LIVE[name](lease))
    assert state_of(pool) == before
    pool.free(lease)


@pytest.mark.parametrize("use", ["freed", "cut", "handed over"])
def test_a_lease_that_was_used_up_is_refused_and_changes_nothing(use: str) -> None:
    pool, lease = pool_of_four()
    if use == "freed":
        pool.free(lease)
        again = pool.grant(1, Role.SINK, 4).leases[0]
        assert again.run == lease.run, "the very same blocks: only the number tells"
    elif use == "cut":
        pool.free_front(lease, 1)
    else:
        pool.regrant(lease, 4, 2, Role.SINK)
    before = state_of(pool)
    refused_all(pool, lease)
    assert state_of(pool) == before


@pytest.mark.parametrize("blocks", [-1, 0, 3, 4, 5])
def test_a_front_frees_no_more_than_it_holds(blocks: int) -> None:
    pool, lease = pool_of_four()
    front = lease._replace(run=Run(0, 2))
    before = state_of(pool)
    for call in (pool.free_front, lambda x, n: pool.regrant(x, n, 2, Role.SINK)):
        with pytest.raises(PoolError):
            call(front, blocks)
    with pytest.raises(PoolError):
        pool.free(front)  # a whole lease, or it is a mistake
    assert state_of(pool) == before


def test_a_quarantined_lease_is_not_handed_over_until_it_is_freed() -> None:
    pool, lease = pool_of_four()
    pool.quarantine(lease)
    before = state_of(pool)
    with pytest.raises(PoolError, match="quarantined"):
        pool.regrant(lease, 1, 2, Role.SINK)
    assert state_of(pool) == before
    rest = pool.free_front(lease, 1)
    assert rest is not None
    assert pool.quarantined_blocks == 3
    pool.free(rest)
    assert (pool.quarantined_blocks, pool.free_blocks) == (0, 8)


def test_a_hand_over_needs_the_quota_of_its_role() -> None:
    pool, lease = pool_of_four()
    before = state_of(pool)
    with pytest.raises(PoolError, match="quota"):
        pool.regrant(lease, 2, 2, Role.SOURCE)
    assert state_of(pool) == before
    assert pool.regrant(lease, 1, 2, Role.SOURCE).run == Run(0, 1)


def test_handed_over_bytes_are_the_new_owners_to_see() -> None:
    pool, lease = pool_of_four()
    handed = pool.regrant(lease, 4, 2, Role.SINK)
    pool.free(handed)
    assert pool.grant(2, Role.SINK, 4).dirty == ()


BREAKS: dict[str, Callable[[BlockPool, Lease], None]] = {
    "lost": lambda pool, lease: pool._live.clear(),
    "doubled": lambda pool, lease: pool._free.give(lease.run, 1),
    "wrong number": lambda pool, lease: pool._live.update({1: lease._replace(lease_id=7)}),
    "number to come": lambda pool, lease: setattr(pool, "_last_lease_id", 0),
    "dead in quarantine": lambda pool, lease: pool._quarantined.add(99),
    "quarantine uncounted": lambda pool, lease: pool._quarantined.add(lease.lease_id),
    "other role's quota": lambda pool, lease: setattr(pool, "_left", [-3, 8]),
    "quota": lambda pool, lease: setattr(pool, "_left", [1, 5]),
    "free count": lambda pool, lease: setattr(pool._free, "free_blocks", 5),
}


@pytest.mark.parametrize("name", BREAKS)
def test_check_sees_broken_books(name: str) -> None:
    pool, lease = pool_of_four()
    pool.check()
    BREAKS[name](pool, lease)
    with pytest.raises(PoolError):
        pool.check()
