from typing import NamedTuple

from kvferry_proto.states import Role


class Run(NamedTuple):
    first_block: int
    blocks: int


class Lease(NamedTuple):
    lease_id: int
    owner: int
    role: Role
    run: Run


class Grant(NamedTuple):
    leases: tuple[Lease, ...]
    dirty: tuple[Run, ...]


class PoolError(AssertionError): ...


class BlockPool:
    def __init__(self, blocks, source_blocks, sink_blocks):
        self.blocks = blocks
        self.quota = {Role.SOURCE: source_blocks, Role.SINK: sink_blocks}
        self.used = {Role.SOURCE: 0, Role.SINK: 0}
        self.free_list = list(range(blocks))[::-1]
        self.tag = [0] * blocks
        self.live = {}
        self.quar = set()
        self.n = 0

    @property
    def free_blocks(self):
        return len(self.free_list)

    def leased_blocks(self, role):
        return sum(
            l.run.blocks
            for l in self.live.values()
            if l.role is role and l.lease_id not in self.quar
        )

    @property
    def quarantined_blocks(self):
        return sum(l.run.blocks for l in self.live.values() if l.lease_id in self.quar)

    @property
    def largest_run(self):
        return len(self.free_list)

    def room(self, role):
        return min(len(self.free_list), self.quota[role] - self.used[role])

    def grant(self, owner, role, blocks):
        n = min(blocks, self.room(role))
        leases = []
        dirty = []
        for _ in range(n):
            b = self.free_list.pop()
            self.n += 1
            l = Lease(self.n, owner, role, Run(b, 1))
            self.live[self.n] = l
            leases.append(l)
            if self.tag[b] not in (0, owner):
                dirty.append(Run(b, 1))
            self.tag[b] = owner
        self.used[role] += n
        return Grant(tuple(leases), tuple(dirty))

    def free_front(self, lease, blocks):
        have = self.live.get(lease.lease_id)
        if have is None or have.run.first_block != lease.run.first_block:
            raise PoolError(lease)
        for b in range(have.run.first_block, have.run.first_block + blocks):
            self.free_list.append(b)
        self.used[have.role] -= blocks
        return self._rest(have, blocks)

    def _rest(self, have, blocks):
        if blocks == have.run.blocks:
            del self.live[have.lease_id]
            self.quar.discard(have.lease_id)
            return None
        rest = have._replace(run=Run(have.run.first_block + blocks, have.run.blocks - blocks))
        self.live[have.lease_id] = rest
        return rest

    def free(self, lease):
        self.free_front(lease, lease.run.blocks)

    def quarantine(self, lease):
        if self.live.get(lease.lease_id) != lease:
            raise PoolError(lease)
        self.quar.add(lease.lease_id)

    def regrant(self, lease, blocks, owner, role):
        have = self.live.get(lease.lease_id)
        if have is None or have.run.first_block != lease.run.first_block:
            raise PoolError(lease)
        if self.used[role] + blocks > self.quota[role]:
            raise PoolError("quota")
        self.used[have.role] -= blocks
        self.used[role] += blocks
        self._rest(have, blocks)
        self.n += 1
        new = Lease(self.n, owner, role, Run(have.run.first_block, blocks))
        self.live[self.n] = new
        for b in range(new.run.first_block, new.run.first_block + blocks):
            self.tag[b] = owner
        return new

    def check(self):
        blocks = list(self.free_list) + [
            b for l in self.live.values() for b in range(l.run.first_block, sum(l.run))
        ]
        assert sorted(blocks) == list(range(self.blocks))
