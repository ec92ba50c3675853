"""Many that wait for a small pool: windows do not shrink to a block each, and nobody stands still."""

import pytest

from kvferry_daemon.core.blocks import OVERTAKEN_MAX, SHARES, PoolBook
from kvferry_daemon.core.events import Key, WantBlocks
from kvferry_daemon.core.pool import BlockPool, Lease
from kvferry_proto import worker
from kvferry_proto.states import Mode, Role, StallReason, State
from world import BLOCK, World, layout

SHARE = 4
QUOTA = SHARE * SHARES


class Waiting:
    """A book whose blocks are all held by one that is nobody's business, and who waits for them."""

    def __init__(self) -> None:
        self.pool = BlockPool(2 * QUOTA, QUOTA, QUOTA)
        self.book = PoolBook("p", "/p", "cpu", layout(), self.pool, QUOTA, QUOTA)
        (self.held,) = self.pool.grant(99, Role.SINK, QUOTA).leases

    def want(
        self, name: str, blocks: int, *, whole: bool = False, urgent: bool = True, ranks: int = 1
    ) -> None:
        key = Key(Role.SINK, name, 0)
        self.book.want(key, WantBlocks(blocks * ranks, whole, urgent, ranks))

    def free(self, blocks: int) -> None:
        rest = self.pool.free_front(self.held, blocks)
        self.held = rest if rest is not None else Lease(0, 0, Role.SINK, self.held.run)

    def given(self, *, crumbs: bool = False) -> list[tuple[str, int]]:
        found = self.book.grants(crumbs=crumbs)
        return [(key[1], sum(one.run.blocks for one in grant.leases)) for key, grant in found]


def test_who_is_next_gets_a_share_or_all_it_wants() -> None:
    """Blocks come free one by one. With one for each, every block cost a round trip of its own."""
    waiting = Waiting()
    waiting.want("long", 64)
    waiting.want("short", SHARE - 1)
    waiting.want("other", 64)
    seen = []
    for _ in range(3 * SHARE - 1):
        waiting.free(1)
        seen.append(waiting.given())
    assert [(n + 1, given) for n, given in enumerate(seen) if given] == [
        (SHARE, [("long", SHARE)]),
        (2 * SHARE - 1, [("short", SHARE - 1)]),
        (3 * SHARE - 1, [("other", SHARE)]),
    ]


def test_one_that_begins_leaves_the_rest_to_those_that_stand_in_line() -> None:
    waiting = Waiting()
    waiting.want("goes on", 2 * SHARE, urgent=False)
    waiting.want("begins", 64)
    waiting.free(3 * SHARE)
    assert waiting.given() == [("begins", SHARE), ("goes on", 2 * SHARE)]


def test_less_than_a_share_is_given_where_nothing_else_comes_free() -> None:
    """The others may not move at all, and what they leave would lie about until their deadlines."""
    waiting = Waiting()
    waiting.want("long", 64)
    waiting.free(1)
    assert waiting.given() == []
    assert waiting.given(crumbs=True) == [("long", 1)]


def test_a_group_gets_as_much_for_each_rank() -> None:
    waiting = Waiting()
    waiting.want("group", 32, ranks=3)
    waiting.want("more", 64, urgent=False)
    for _ in range(SHARE - 1):
        waiting.free(1)
        assert waiting.given() == []
    waiting.free(1)
    assert waiting.given() == [("group", 3)], "what cannot be halved stays for others"


def test_many_take_turns_quickly_where_most_blocks_do_not_move() -> None:
    """Less than a share was left, and handed out once a second: with a hundred that wait, each waited
    for longer than a transfer may stand still."""
    world, end = World(blocks=2 * QUOTA, window_tokens=4 * BLOCK), 4 * BLOCK
    world.hello("a", b"source")
    world.hello("b", b"sink")
    held = (QUOTA - SHARE + 1) * BLOCK
    world.call("a", b"source", worker.Send(transfer_id="held"))
    world.call(
        "b", b"sink",
        worker.Receive(transfer_id="held", source="tcp://a:1", mode=Mode.WHOLE, max_tokens=held),
    )  # fmt: skip
    _ready(world, "held", BLOCK)
    names = [f"t{number}" for number in range(SHARES - 1)]
    for name in names:
        world.call("a", b"source", worker.Send(transfer_id=name, total_tokens=end))
        world.call("b", b"sink", worker.Receive(transfer_id=name, source="tcp://a:1"))
        _ready(world, name, end)
    began_s, waiting = world.now_s, set(names)
    while waiting:
        assert world.now_s < began_s + len(names) * 0.2, (waiting, world.now_s - began_s)
        world.wait(0.01)
        for name in sorted(waiting):
            seen = world.snapshot("b", b"sink", Role.SINK, name)
            if seen.state is State.SUCCESS:
                waiting.discard(name)
                world.call("b", b"sink", worker.Release(transfer_id=name, role=Role.SINK))
            elif seen.stall is StallReason.WAITING_FOR_BLOCKS and seen.sent_tokens:
                call = worker.Resume(transfer_id=name, sent_tokens=seen.sent_tokens)
                world.call("b", b"sink", call)


def _ready(world: World, name: str, tokens: int) -> None:
    world.fill("a", world.snapshot("a", b"source", Role.SOURCE, name), tokens)
    call = worker.Ready(transfer_id=name, ready_tokens=tokens)
    world.call("a", b"source", call)
    world.settle()


@pytest.mark.parametrize("how", ["gives up", "its worker dies"])
def test_who_comes_next_has_not_been_overtaken_because_the_one_before_him_was(how: str) -> None:
    """Else all that can go on with less stand still for one who has only just come."""
    waiting = Waiting()
    waiting.want("gives up", QUOTA, whole=True)
    waiting.want("comes next", QUOTA, whole=True)
    for number in range(OVERTAKEN_MAX):
        waiting.want(f"small {number}", 1)
        waiting.free(1)
        assert waiting.given() == [(f"small {number}", 1)]
    waiting.want("waits", 1)
    waiting.free(1)
    assert waiting.given() == []
    if how == "gives up":
        waiting.want("gives up", 0)
        assert waiting.given() == [("waits", 1)]
    else:
        lost = Key(Role.SINK, "gives up", 0)
        (found,) = waiting.book.grants(lambda key: key == lost)
        assert found[0].transfer_id == "waits"
