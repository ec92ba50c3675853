"""A daemon with many transfers, all of which are to hear something at once."""

from dataclasses import replace
from typing import Any

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Key
from kvferry_daemon.core.node import OWED_A_TURN, Node
from kvferry_proto import peer, worker
from kvferry_proto.states import Role, State
from world import BLOCK, Machine, World

MANY = 200
DYING, OTHER, NEW = b"the worker that dies", b"another worker", b"a new worker"


class Deaths(World):
    """One daemon with a worker of many sources, each of a block as long as there are any."""

    def __init__(self, count: int = MANY) -> None:
        super().__init__(blocks=64)
        self.count = count
        self.ledger: dict[str, bytes] = {}
        self.seen: list[out.NodeEffect] = []
        settings = replace(self.node.settings, transfers_max=2000)
        self.machines = {"a": Machine(Node(settings, self._secret, 1, 0.0))}
        self.session = self.hello("a", DYING).session
        for number in range(count):
            self.call("a", DYING, worker.Send(transfer_id=f"t{number}", window_tokens=BLOCK))
        self.seen.clear()

    @property
    def node(self) -> Node:
        return self.machines["a"].node

    @property
    def left(self) -> int:
        """Of the dead worker's transfers those that are live."""
        return sum(not one.ended for one in self.node.transfers.values())

    def die(self, session: str | None = None) -> None:
        self.feed("a", out.LockDropped(session or self.session))

    def turn(self) -> None:
        assert self.node.wake_at_s <= self.now_s
        self.feed("a", out.TimePassed())

    def finish(self) -> int:
        """Let it come to its end, in no time; return how many turns that took."""
        turns = 0
        while self.node.owed:
            self.turn()
            turns += 1
        return turns

    def _perform(self, name: str, me: Machine, effect: out.NodeEffect) -> list[out.NodeEvent]:
        self.seen.append(effect)
        if isinstance(effect, out.Write):
            for row, body in effect.rows:
                if body is None:
                    self.ledger.pop(row, None)
                else:
                    self.ledger[row] = body
        return super()._perform(name, me, effect)

    def ended_of(self, number: int) -> tuple[State, str]:
        """How one is remembered."""
        stone = self.node.tombstones.get(key_of(number))
        assert stone is not None, number
        error = stone.snapshot.error
        return stone.snapshot.state, error.code if error else ""

    def check_end(self) -> None:
        """Nothing is left of the dead."""
        assert not self.node.owed
        assert not self.node.workers.dying
        assert self.blocks_free("a")
        assert {self.ended_of(n)[0] for n in range(self.count)} == {State.FAILED}
        assert f"session:{self.session}" not in self.ledger
        assert self.seen.count(out.ForgetWorker(self.session)) == 1


def key_of(number: int) -> Key:
    return Key(Role.SOURCE, f"t{number}", 0)


def live(world: Deaths) -> int:
    """The number of one that has not heard yet."""
    number = next(n for n in reversed(range(MANY)) if key_of(n) in world.node.transfers)
    assert not world.node.transfers[key_of(number)].ended
    return number


def dying() -> Deaths:
    """Some have heard and most have not."""
    world = Deaths()
    world.die()
    for _ in range(10):
        world.turn()
    assert world.left == MANY - 11 * OWED_A_TURN
    return world


def worker_layout(world: World) -> Any:
    return next(iter(world.machines["a"].node.books.values())).layout


def pull_of(world: World, number: int) -> peer.Pulls:
    pull = peer.Pull(
        transfer_id=f"t{number}",
        attempt=0,
        number=1,
        handle=0,
        layout_digest=worker_layout(world).digest,
        start_tokens=0,
        acked_tokens=0,
        want=[],
    )
    return peer.Pulls(source_boot_id="a" * 16, sink_boot_id="b" * 16, pulls=[pull])
