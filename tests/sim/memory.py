"""One pool's memory in the model: a slot a token, and who may touch which block right now.

A slot holds the name of the token that was written there, and keeps it when its block is freed: so
what a consumer sees can be checked exactly, and what is left over from another owner shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from kvferry_daemon.core.pool import BlockPool, Grant, Lease
from kvferry_daemon.core.window import Place
from kvferry_proto.states import Role

if TYPE_CHECKING:
    from sim.life import Life

BLOCK = 4
WIDE = 2 * BLOCK  # tokens of a block of the other layout
EMPTY = 0
GARBAGE = 1 << 60  # bytes that were damaged on their way


class Broken(AssertionError):
    """An invariant does not hold."""


def name_of(transfer: int, attempt: int, rank: int) -> int:
    """The name of a rank's token 0; the others follow, so that an extent is a range."""
    return (transfer + 1) << 40 | attempt << 24 | rank << 16


def owner_part(name: int) -> int:
    """What two tokens of one attempt have in common, whatever their ranks."""
    return (name & ~GARBAGE) >> 24


class Piece(NamedTuple):
    """Tokens that lie in one block."""

    block: int
    slot: int
    tokens: int
    first_token: int


def pieces(place: Place, first_token: int, tokens: int, size: int) -> Iterator[Piece]:
    """Where an extent lies, block by block of ``size`` tokens."""
    end = first_token + tokens
    at = place.base_tokens
    for first_block, blocks in place.runs:
        for block in range(first_block, first_block + blocks):
            low, high = max(at, first_token), min(at + size, end)
            if low < high:
                yield Piece(block, block * size + low - at, high - low, low)
            at += size


class Memory:
    """The slots and their writers, and for each block its owner in the books, and how many read it."""

    __slots__ = ("blocks", "owner", "pool_id", "readers", "size", "slots", "writer")

    def __init__(self, pool_id: str, blocks: int, size: int) -> None:
        self.pool_id = pool_id
        self.blocks = blocks
        self.size = size  # tokens of a block
        self.slots = [EMPTY] * (blocks * size)
        self.owner = [0] * blocks
        self.readers = [0] * blocks
        self.writer: dict[int, object] = {}

    def pieces(self, place: Place, first_token: int, tokens: int) -> Iterator[Piece]:
        """Where an extent lies here."""
        return pieces(place, first_token, tokens, self.size)

    def read(self, place: Place, first_token: int, tokens: int) -> list[int]:
        """The names in an extent."""
        slots = self.slots
        names: list[int] = []
        for _, slot, count, _ in self.pieces(place, first_token, tokens):
            names += slots[slot : slot + count]
        return names

    def write(self, place: Place, first_token: int, names: list[int]) -> None:
        """Put names into an extent."""
        slots = self.slots
        for _, slot, count, first in self.pieces(place, first_token, len(names)):
            at = first - first_token
            slots[slot : slot + count] = names[at : at + count]

    def wipe(self, block: int) -> None:
        """Leave nothing in a block."""
        size = self.size
        self.slots[block * size : (block + 1) * size] = [EMPTY] * size

    def block(self, block: int) -> list[int]:
        """The names in a block."""
        return self.slots[block * self.size : (block + 1) * self.size]

    def process_died(self) -> None:
        """The daemon's threads are gone; the bytes stay."""
        self.writer.clear()
        self.readers = [0] * self.blocks


class WatchedPool(BlockPool):
    """The real pool, with somebody looking on: I1, I7 and I8 at every grant and every freeing."""

    __slots__ = ("_last_seen", "_life", "_memory", "_owned")

    def __init__(
        self, life: Life, memory: Memory, blocks: int, source_blocks: int, sink_blocks: int
    ) -> None:
        super().__init__(blocks, source_blocks, sink_blocks)
        self._life = life
        self._memory = memory
        self._last_seen = 0
        self._owned = 0

    @classmethod
    def adopt(cls, life: Life, memory: Memory, pool: BlockPool) -> WatchedPool:
        """Look on from here on at a pool that was made otherwise: out of a ledger."""
        watched = cls(life, memory, pool.blocks, *pool._quota)
        for name in BlockPool.__slots__:
            setattr(watched, name, getattr(pool, name))
        watched._last_seen = pool._last_lease_id
        memory.owner = [0] * memory.blocks
        for lease in pool._live.values():
            first, blocks = lease.run
            memory.owner[first : first + blocks] = [lease.owner] * blocks
            watched._owned += blocks
        return watched

    def grant(self, owner: int, role: Role, blocks: int) -> Grant:
        grant = super().grant(owner, role, blocks)
        for lease in grant.leases:
            self._begin(lease)
        self._count()
        return grant

    def free(self, lease: Lease) -> None:
        super().free(lease)
        self._end(lease, lease.run.blocks, freed=True)
        self._count()

    def free_front(self, lease: Lease, blocks: int) -> Lease | None:
        rest = super().free_front(lease, blocks)
        self._end(lease, blocks, freed=True)
        self._count()
        return rest

    def free_tail(self, lease: Lease) -> None:
        super().free_tail(lease)
        self._end(lease, lease.run.blocks, freed=True)
        self._count()

    def regrant(self, lease: Lease, blocks: int, owner: int, role: Role) -> Lease:
        new = super().regrant(lease, blocks, owner, role)
        self._end(lease, blocks, freed=False)
        self._begin(new)
        self._count()
        return new

    def _begin(self, lease: Lease) -> None:
        if lease.lease_id <= self._last_seen:
            raise Broken(f"I1: lease {lease.lease_id} after {self._last_seen}")
        self._last_seen = lease.lease_id
        owner = self._memory.owner
        first, blocks = lease.run
        for block in range(first, first + blocks):
            if owner[block]:
                raise Broken(f"I1: block {block} is granted twice")
            owner[block] = lease.owner
            self._life.check_nobody_else_touches(self._memory, lease.owner, block)
        self._owned += blocks

    def _end(self, lease: Lease, blocks: int, *, freed: bool) -> None:
        memory = self._memory
        first = lease.run.first_block
        for block in range(first, first + blocks):
            if memory.owner[block] != lease.owner:
                raise Broken(f"I7: block {block} is freed by {lease.owner}, who does not own it")
            if memory.readers[block]:
                raise Broken(f"I7: block {block} goes while a connection reads it")
            for slot in range(block * memory.size, (block + 1) * memory.size):
                if slot in memory.writer:
                    raise Broken(f"I7: block {block} goes while {memory.writer[slot]} writes it")
            self._life.check_no_worker_touches(memory, lease.owner, block, freed=freed)
            memory.owner[block] = 0
        self._owned -= blocks

    def _count(self) -> None:
        if self.free_blocks + self._owned != self.blocks:
            raise Broken(f"I8: {self.free_blocks} free and {self._owned} owned of {self.blocks}")
        if not 0 <= self.quarantined_blocks <= self._owned:
            raise Broken(f"I8: {self.quarantined_blocks} quarantined of {self._owned} owned")
