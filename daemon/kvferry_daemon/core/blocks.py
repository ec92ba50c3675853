"""One pool's books: its blocks, who waits for some, and what is being zeroed."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kvferry_daemon.core.events import Key, WantBlocks
from kvferry_daemon.core.pool import BlockPool, Grant, Lease
from kvferry_proto.layout import Layout
from kvferry_proto.states import Role
from kvferry_proto.worker import DeviceMemory

Kind = Literal["whole", "urgent", "more"]  # all or none; holds none yet; could go on with more
KINDS: tuple[Kind, ...] = ("whole", "urgent", "more")
OVERTAKEN_MAX = 32
PASSED_MAX = 64  # heads of a queue, whenever blocks are handed out
SHARES = 16  # of a role's blocks; one is worth a round trip, and nobody has to wait for more


def nobody(_key: Key) -> bool:
    """Of no transfer is anything known."""
    return False


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
    memory: DeviceMemory | None = None  # how workers open it, if it is no file
    lost: str = ""  # why nothing in it is to be relied on any more
    holds_back: bool = False  # blocks lie about, and somebody waits for a share of them
    _queues: dict[tuple[Role, Kind], OrderedDict[Key, WantBlocks]] = field(
        default_factory=lambda: {(role, kind): OrderedDict() for role in Role for kind in KINDS}
    )
    _arrived: dict[Key, int] = field(default_factory=dict)  # of those that wait, in order
    _arrivals: int = 0
    _overtaken: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))
    _reserved: dict[Key, int] = field(default_factory=dict)  # room that only its holder may use
    _reserved_blocks: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))
    _waiting_for_room: dict[Key, None] = field(default_factory=dict)
    _on_the_way: dict[Key, int] = field(default_factory=dict)
    _owners: dict[Key, int] = field(default_factory=dict)
    _next_owner: int = 0

    def empty(self) -> None:
        """Its memory is gone, of which nobody holds a block any more."""
        self.pool = BlockPool(0, 0, 0)
        self.source_blocks = self.sink_blocks = 0

    def quota(self, role: Role) -> int:
        """Blocks that transfers of a role may hold together."""
        return self.source_blocks if role is Role.SOURCE else self.sink_blocks

    def held(self, role: Role) -> int:
        """Of them those that transfers hold, or that are set aside for one."""
        left = self.pool.room_left(role) - self._reserved_blocks[role]
        return self.quota(role) - max(0, left)

    def owner(self, key: Key) -> int:
        """The number under which the pool knows a transfer; never reused."""
        if key not in self._owners:
            self._next_owner += 1
            self._owners[key] = self._next_owner
        return self._owners[key]

    def forget(self, key: Key) -> None:
        """The transfer is gone; it holds nothing here."""
        for kind in KINDS:
            self._served(key, kind)
        self._set_aside(key, 0)
        self._waiting_for_room.pop(key, None)
        self._owners.pop(key, None)

    def want(self, key: Key, level: WantBlocks) -> None:
        """Note how many blocks a transfer wants now."""
        kind = _kind(level)
        for other in KINDS:
            if other != kind:
                self._leave(key, other)
        blocks = level.blocks - self._on_the_way.get(key, 0)
        if blocks > 0:
            self._queues[key.role, kind][key] = (
                level
                if blocks == level.blocks
                else WantBlocks(blocks, level.whole, level.urgent, level.ranks)
            )
            if key not in self._arrived:
                self._arrivals += 1
                self._arrived[key] = self._arrivals
        else:
            self._served(key, kind)
        if level.blocks == 0:
            self._set_aside(key, 0)
            self._waiting_for_room.pop(key, None)

    def _want_more(self, key: Key, blocks: int, ranks: int) -> None:
        """It has some by now: for others it stands in line."""
        self._queues[key.role, "more"][key] = WantBlocks(blocks, ranks=ranks)
        self._arrivals += 1
        self._arrived[key] = self._arrivals

    def grants(
        self, is_lost: Callable[[Key], bool] = nobody, *, crumbs: bool = False
    ) -> Iterator[tuple[Key, Grant]]:
        """Hand out what can be handed out now, first come, first served.

        Where many wait, a block for each as soon as one is free would keep all windows at a block,
        and every block costs a round trip then. So who is next waits for a share of the pool, or
        for all it wants, and ``holds_back`` says so. ``crumbs``: for less, too.

        One that needs all of its blocks at once may be overtaken by those that can go on with
        fewer, but only OVERTAKEN_MAX times; then everybody waits until there is room for it.

        ``is_lost``: who is next may be about to hear of its worker's death. It gets none, which would
        be wiped for nobody, goes behind the others, and leaves the queue when it hears.
        """
        self.holds_back = False
        if not self._arrived:
            return  # nobody waits, as mostly
        for role in Role:
            while self.pool.room(role) and (found := self._next(role, crumbs, is_lost)):
                key, level = found
                blocks = min(self._room(key), level.blocks) // level.ranks
                if level.urgent and not level.whole and self._queues[role, "more"]:
                    enough = self._share(role, level) // level.ranks
                    blocks = min(blocks, enough)  # to go on with; for the rest it stands in line
                grant = self._grant(key, blocks, level.ranks)
                left = level.blocks - sum(lease.run.blocks for lease in grant.leases)
                assert not (level.whole and left), (key, level, left)
                self._served(key, _kind(level))
                if left:
                    self._want_more(key, left, level.ranks)
                yield key, grant

    def _grant(self, key: Key, blocks: int, ranks: int) -> Grant:
        """So many blocks for each rank, in one go."""
        owner = self.owner(key)
        if ranks == 1:
            return self.pool.grant(owner, key.role, blocks)
        grants = [self.pool.grant(owner, key.role, blocks) for _ in range(ranks)]
        return Grant(
            tuple([lease for grant in grants for lease in grant.leases]),
            tuple([run for grant in grants for run in grant.dirty]),
        )

    def _share(self, role: Role, level: WantBlocks) -> int:
        """Blocks that are worth a round trip: no more than it wants, and one a rank at least."""
        return max(level.ranks, min(level.blocks, self.quota(role) // SHARES))

    def _next(
        self, role: Role, crumbs: bool, is_lost: Callable[[Key], bool]
    ) -> tuple[Key, WantBlocks] | None:
        """Who is served next. Looks at heads of queues only: waiting costs nothing."""
        for kind in KINDS:
            self._pass_over_lost(role, kind, is_lost)
        whole = _head(self._queues[role, "whole"])
        some = _head(self._queues[role, "urgent"]) or _head(self._queues[role, "more"])
        if any(head is not None and is_lost(head[0]) for head in (whole, some)):
            return None
        fits = whole is not None and self._room(whole[0]) >= whole[1].blocks
        if some is not None:
            least = some[1].ranks if crumbs else self._share(role, some[1])
            if self._room(some[0]) < least:
                self.holds_back |= self._room(some[0]) >= some[1].ranks
                if whole is None or self._arrived[some[0]] < self._arrived[whole[0]]:
                    return None  # it came first
                some = None
        if whole is None or some is None:
            return whole if fits else some
        if self._arrived[some[0]] < self._arrived[whole[0]]:
            return some
        if fits:
            return whole
        if self._overtaken[role] >= OVERTAKEN_MAX:
            return None
        self._overtaken[role] += 1
        return some

    def _pass_over_lost(self, role: Role, kind: Kind, is_lost: Callable[[Key], bool]) -> None:
        queue = self._queues[role, kind]
        for _ in range(min(PASSED_MAX, len(queue))):
            key = next(iter(queue))
            if not is_lost(key):
                return
            if kind == "whole":
                self._overtaken[role] = 0  # who is next now has not been
            queue.move_to_end(key)
            self._arrivals += 1
            self._arrived[key] = self._arrivals

    def _served(self, key: Key, kind: Kind) -> None:
        self._leave(key, kind)
        self._arrived.pop(key, None)

    def _leave(self, key: Key, kind: Kind) -> None:
        queue = self._queues[key.role, kind]
        if kind == "whole" and queue and next(iter(queue)) == key:
            self._overtaken[key.role] = 0  # the same
        queue.pop(key, None)

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
            self._set_aside(key, min(reserve_blocks, self._reserved.get(key, reserve_blocks)))
        room = min(self._room(key), blocks)
        if room < blocks:
            self._waiting_for_room[key] = None
        return room

    def took_over(self, key: Key, blocks: int) -> None:
        """Blocks were taken out of what was set aside."""
        if key in self._reserved:
            self._set_aside(key, max(0, self._reserved[key] - blocks))

    def ready_to_try(self, is_lost: Callable[[Key], bool] = nobody) -> list[Key]:
        """Transfers that waited for room to take over, once there is some."""
        keys = [key for key in self._waiting_for_room if self._room(key) and not is_lost(key)]
        for key in keys:
            del self._waiting_for_room[key]
        return keys

    def _set_aside(self, key: Key, blocks: int) -> None:
        self._reserved_blocks[key.role] += blocks - self._reserved.pop(key, 0)
        if blocks:
            self._reserved[key] = blocks

    def _room(self, key: Key) -> int:
        others = self._reserved_blocks[key.role] - self._reserved.get(key, 0)
        return max(0, self.pool.room(key.role) - others)


def _kind(level: WantBlocks) -> Kind:
    return "whole" if level.whole else "urgent" if level.urgent else "more"


def _head(queue: OrderedDict[Key, WantBlocks]) -> tuple[Key, WantBlocks] | None:
    return next(iter(queue.items()), None)
