"""One pool's books: its blocks, who waits for some, and what is being zeroed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from kvferry_daemon.core.events import Key, WantBlocks
from kvferry_daemon.core.pool import BlockPool, Grant, Lease
from kvferry_proto.layout import Layout
from kvferry_proto.states import Role


class Zeroing(NamedTuple):
    """Blocks on their way to a transfer, while what another owner left in them is wiped."""

    key: Key
    leases: tuple[Lease, ...]


@dataclass(slots=True)
class PoolBook:
    """Grants in the order of asking; one who holds nothing goes before one who holds some."""

    pool_id: str
    path: str
    device: str
    layout: Layout
    pool: BlockPool
    source_blocks: int
    sink_blocks: int
    _queues: dict[tuple[Role, bool], dict[Key, WantBlocks]] = field(
        default_factory=lambda: {(role, urgent): {} for role in Role for urgent in (True, False)}
    )
    _reserved: dict[Key, int] = field(default_factory=dict)  # room that only its holder may use
    _waiting_for_room: dict[Key, None] = field(default_factory=dict)
    _on_the_way: dict[Key, int] = field(default_factory=dict)
    _owners: dict[Key, int] = field(default_factory=dict)
    _next_owner: int = 0

    def quota(self, role: Role) -> int:
        """Blocks that transfers of a role may hold together."""
        return self.source_blocks if role is Role.SOURCE else self.sink_blocks

    def owner(self, key: Key) -> int:
        """The number under which the pool knows a transfer; never reused."""
        if key not in self._owners:
            self._next_owner += 1
            self._owners[key] = self._next_owner
        return self._owners[key]

    def forget(self, key: Key) -> None:
        """The transfer is gone; it holds nothing here."""
        for queue in self._queues.values():
            queue.pop(key, None)
        self._reserved.pop(key, None)
        self._waiting_for_room.pop(key, None)
        self._owners.pop(key, None)

    def want(self, key: Key, level: WantBlocks) -> None:
        """Note how many blocks a transfer wants now."""
        queue = self._queues[key.role, level.urgent]
        self._queues[key.role, not level.urgent].pop(key, None)
        blocks = level.blocks - self._on_the_way.get(key, 0)
        if blocks > 0:
            queue[key] = WantBlocks(blocks, level.whole, level.urgent)
        else:
            queue.pop(key, None)
        if level.blocks == 0:
            self._reserved.pop(key, None)
            self._waiting_for_room.pop(key, None)

    def grants(self) -> Iterator[tuple[Key, Grant]]:
        """Hand out what can be handed out now."""
        for role in Role:
            for urgent in (True, False):
                yield from self._grants_of(role, self._queues[role, urgent])

    def _grants_of(self, role: Role, queue: dict[Key, WantBlocks]) -> Iterator[tuple[Key, Grant]]:
        while queue:
            key, level = next(iter(queue.items()))
            room = self._room(key)
            if room == 0 or (level.whole and room < level.blocks):
                return  # nobody overtakes the first in the queue
            grant = self.pool.grant(self.owner(key), role, min(room, level.blocks))
            left = level.blocks - sum(lease.run.blocks for lease in grant.leases)
            if left:
                queue[key] = WantBlocks(left, level.whole, level.urgent)
            else:
                del queue[key]
            yield key, grant
            if left:
                return

    def on_the_way(self, key: Key, blocks: int) -> None:
        """Blocks are granted, maybe being zeroed, but not in the window yet (negative: they are)."""
        left = self._on_the_way.get(key, 0) + blocks
        if left:
            self._on_the_way[key] = left
        else:
            self._on_the_way.pop(key, None)

    def expects(self, key: Key) -> bool:
        """Whether blocks are on their way to a transfer, which must not be forgotten then."""
        return key in self._on_the_way

    def room_to_take_over(self, key: Key, blocks: int, reserve_blocks: int) -> int:
        """Sink quota left for a hand-over of ``blocks``; 0 puts the transfer in the queue.

        ``reserve_blocks`` above 0 sets so much aside at the first call, or answers 0.
        """
        if reserve_blocks and key not in self._reserved and self._room(key) < reserve_blocks:
            self._waiting_for_room[key] = None
            return 0
        if reserve_blocks:  # it shrinks as the total becomes known
            self._reserved[key] = min(reserve_blocks, self._reserved.get(key, reserve_blocks))
        room = min(self._room(key), blocks)
        if room < blocks:
            self._waiting_for_room[key] = None
        return room

    def took_over(self, key: Key, blocks: int) -> None:
        """Blocks were taken out of what was set aside."""
        if key in self._reserved:
            self._reserved[key] = max(0, self._reserved[key] - blocks)

    def ready_to_try(self) -> list[Key]:
        """Transfers that waited for room to take over, once there is some."""
        keys = [key for key in self._waiting_for_room if self._room(key)]
        for key in keys:
            del self._waiting_for_room[key]
        return keys

    def _room(self, key: Key) -> int:
        others = sum(
            blocks
            for other, blocks in self._reserved.items()
            if other != key and other.role is key.role
        )
        return max(0, self.pool.room(key.role) - others)
