"""What thousands of transfers hear at once: a dead worker's, a lost link's. And what comes between."""

from dataclasses import replace
from typing import Any

import pytest

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.blocks import PASSED_MAX
from kvferry_daemon.core.events import (
    Done,
    Fail,
    Key,
    NewsLost,
    PeerDown,
    PeerUp,
    Pulled,
    Slept,
)
from kvferry_daemon.core.node import EXPIRED_A_TURN, OWED_A_TURN, Node
from kvferry_daemon.core.owed import Owed
from kvferry_daemon.core.past import Past
from kvferry_daemon.core.peer_effects import Say
from kvferry_daemon.core.timers import A_TURN
from kvferry_daemon.core.unmet import KEPT_LEASES
from kvferry_proto import peer, worker
from kvferry_proto.errors import Code
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


def test_the_death_of_a_worker_with_many_transfers_takes_several_turns() -> None:
    world = Deaths(1000)
    world.die()
    assert world.left == 1000 - OWED_A_TURN
    assert world.session not in world.node.sessions
    left = world.left
    while world.node.owed:
        assert out.ForgetWorker(world.session) not in world.seen
        assert f"session:{world.session}" in world.ledger  # a later life finds it dead again
        world.turn()
        assert left - OWED_A_TURN <= world.left < left
        left = world.left
    world.check_end()
    assert {world.ended_of(n) for n in range(1000)} == {(State.FAILED, "worker_lost")}
    assert world.node.wake_at_s > world.now_s


def test_the_death_of_a_worker_with_few_takes_one() -> None:
    world = Deaths(OWED_A_TURN)
    world.die()
    world.check_end()


def test_of_a_worker_without_any_nothing_is_left_at_once() -> None:
    world = Deaths(0)
    world.die()
    world.die()
    assert not world.ledger.keys() & {f"session:{world.session}"}
    assert world.seen.count(out.ForgetWorker(world.session)) == 1


def test_no_block_is_wiped_for_one_that_is_about_to_hear() -> None:
    """What the first give back would else go from one of them to the next, in one turn."""
    world = Deaths()
    world.machines["a"].zeroed_blocks = 0
    world.hello("a", OTHER)
    world.call("a", OTHER, worker.Send(transfer_id="other", window_tokens=BLOCK))
    world.die()
    world.finish()
    assert world.snapshot("a", OTHER, Role.SOURCE, "other").runs  # it was the last in the queue
    assert world.machines["a"].zeroed_blocks == 1
    world.call("a", OTHER, worker.Abort(transfer_id="other", role=Role.SOURCE))
    world.call("a", OTHER, worker.Release(transfer_id="other", role=Role.SOURCE))
    world.check_end()


def test_nobody_waits_for_blocks_behind_those_that_are_about_to_hear() -> None:
    world = Deaths(1000)
    world.hello("a", OTHER)
    world.call("a", OTHER, worker.Send(transfer_id="other", window_tokens=BLOCK))
    world.die()
    turns = 1
    while not world.snapshot("a", OTHER, Role.SOURCE, "other").runs:
        world.turn()
        turns += 1
    assert turns <= -(-1000 // PASSED_MAX)
    assert world.left > 1000 - (turns + 1) * OWED_A_TURN
    world.finish()


def test_other_events_meanwhile_are_not_held_up() -> None:
    """Each of a hundred in one turn of the loop would else end some of them."""
    world = Deaths()
    world.hello("a", OTHER)
    world.die()
    left = world.left
    for _ in range(100):
        world.call("a", OTHER, worker.Heartbeat())
    assert world.left == left
    world.finish()
    world.check_end()


def test_nobody_comes_back_as_the_dead_one() -> None:
    world = dying()
    assert world.call("a", DYING, worker.Heartbeat()).error.code == "hello_first"
    lock = f"lock{DYING.hex()}"
    again = worker.Hello(lock=lock, layout=worker_layout(world), session=world.session)
    afresh = worker.Hello(lock=lock, layout=worker_layout(world))
    for hello, code in ((again, "unknown_session"), (afresh, "worker_not_locked")):
        world.feed("a", out.WorkerCalled(DYING, hello, lock_held=True))
        assert world.machines["a"].inbox[DYING].pop().error.code == code
    world.finish()
    world.check_end()
    assert world.hello("a", DYING).session != world.session


def worker_layout(world: World) -> Any:
    return next(iter(world.machines["a"].node.books.values())).layout


def test_a_new_worker_is_served_and_may_retry_what_has_not_heard_yet() -> None:
    world = dying()
    number = live(world)
    world.hello("a", NEW)
    retry = worker.Send(transfer_id=f"t{number}", attempt=1, window_tokens=BLOCK)
    assert world.call("a", NEW, retry).transfers[0].state is State.BOOTSTRAPPING
    assert world.ended_of(number) == (State.FAILED, "worker_lost")  # not superseded: it was first
    world.finish()
    assert list(world.node.transfers) == [Key(Role.SOURCE, f"t{number}", 1)]
    again = world.snapshot("a", NEW, Role.SOURCE, f"t{number}", 1)
    assert again.allocated_tokens == BLOCK
    world.call("a", NEW, worker.Abort(transfer_id=f"t{number}", attempt=1, role=Role.SOURCE))
    world.call("a", NEW, worker.Release(transfer_id=f"t{number}", attempt=1, role=Role.SOURCE))
    world.check_end()


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


def test_a_sink_that_asks_for_one_hears_how_it_ended() -> None:
    world = dying()
    number = live(world)
    hello = peer.PeerHello(boot_id="b" * 16, daemon_id="b" * 16, life=1)
    world.feed("a", out.SinkSaid(b"b", hello))
    world.seen.clear()
    world.feed("a", out.SinkSaid(b"b", pull_of(world, number)))
    said = [one.message for one in world.seen if isinstance(one, out.ToSink)]
    assert isinstance(said[-1], peer.Progresses)
    last = said[-1].progresses[0]
    assert last.error is not None
    assert (last.state, last.error.code) == (State.FAILED, "worker_lost")
    world.finish()
    world.check_end()


def test_a_sink_here_takes_nothing_over_from_one_whose_worker_is_dead() -> None:
    world = Deaths()
    ready = worker.Ready(transfer_id="t0", ready_tokens=BLOCK)
    assert isinstance(world.call("a", DYING, ready), worker.Snapshots)
    world.hello("a", OTHER)
    world.node.owed_a_turn = 1
    world.node.tell({key_of(1): None}, PeerUp())  # so that none of the dead is told at once
    world.die()
    assert not world.node.transfers[key_of(0)].ended
    sink = world.call("a", OTHER, worker.Receive(transfer_id="t0"))
    assert sink.transfers[0].state is State.FAILED
    assert world.ended_of(0) == (State.FAILED, "worker_lost")
    world.finish()
    world.call("a", OTHER, worker.Release(transfer_id="t0", role=Role.SINK))
    world.check_end()


def test_an_operator_aborts_one_that_has_not_heard_yet() -> None:
    world = dying()
    number = live(world)
    world.feed("a", out.TransfersAborted((key_of(number),), "why not"))
    assert world.ended_of(number) == (State.FAILED, "worker_lost")
    world.finish()
    world.check_end()


def test_a_second_death_meanwhile() -> None:
    world = Deaths()
    second = world.hello("a", OTHER).session
    for number in range(MANY, 2 * MANY):
        world.call("a", OTHER, worker.Send(transfer_id=f"t{number}", window_tokens=BLOCK))
    world.die()
    world.turn()
    world.die(second)
    world.die()  # the watch finds it dead until it is forgotten
    assert not world.node.sessions
    assert set(world.node.workers.dying) == {world.session, second}
    world.count = 2 * MANY
    assert world.finish() >= 2 * MANY // OWED_A_TURN - 10
    world.check_end()
    assert world.seen.count(out.ForgetWorker(second)) == 1
    assert not [row for row in world.ledger if row.startswith("session:")]


def test_a_restart_in_the_middle_finds_the_worker_dead_again() -> None:
    world = dying()
    ended = MANY - world.left
    past = Past()
    for row, body in sorted(world.ledger.items()):
        past.add(row, body)
    settings = replace(world.node.settings, boot_id="c" * 16, life=2)
    world.machines["a"] = Machine(Node(settings, world._secret, 1, world.now_s))
    world.seen.clear()
    world.feed("a", out.Restored(past))
    assert world.left == MANY - ended
    assert out.WatchWorker(world.session, f"lock{DYING.hex()}") in world.seen
    world.die()
    world.finish()
    world.check_end()


def test_a_silent_worker_that_comes_back_meanwhile_has_lost_them_all() -> None:
    """As if it had come when all had been told: nobody can be half lost."""
    world = Deaths()
    world.now_s = world.node.settings.timing.lost_s + 0.5
    world.node._sweep_at_s = world.now_s  # it did not sleep
    world.feed("a", out.TimePassed())
    assert world.left
    world.call("a", DYING, worker.Heartbeat())
    number = live(world)
    ready = worker.Ready(transfer_id=f"t{number}", ready_tokens=0)
    reply = world.call("a", DYING, ready)
    assert reply.transfers[0].error.code == "worker_lost"
    world.finish()
    assert not world.left
    for number in range(MANY):
        world.call("a", DYING, worker.Release(transfer_id=f"t{number}", role=Role.SOURCE))
    assert world.blocks_free("a")
    assert f"session:{world.session}" in world.ledger
    world.die()
    world.check_end()


def test_one_that_dies_while_its_silence_is_told() -> None:
    world = Deaths()
    world.now_s = world.node.settings.timing.lost_s + 0.5
    world.node._sweep_at_s = world.now_s
    world.feed("a", out.TimePassed())
    world.die()
    world.finish()
    world.check_end()


def test_a_rank_that_lives_hears_of_the_one_that_died() -> None:
    world = Deaths()
    world.hello("a", OTHER)
    for route, rank in ((DYING, 0), (OTHER, 1)):
        call = worker.Send(transfer_id="group", rank=rank, world_size=2, window_tokens=BLOCK)
        assert isinstance(world.call("a", route, call), worker.Snapshots)
    world.die()
    key = Key(Role.SOURCE, "group", 0)
    assert not world.node.transfers[key].ended
    ready = worker.Ready(transfer_id="group", ready_tokens=0, rank=1)
    error = world.call("a", OTHER, ready).transfers[0].error
    assert (error.code, error.message.partition(":")[0]) == ("worker_lost", "rank 0 of 2")
    world.call("a", OTHER, worker.Release(transfer_id="group", role=Role.SOURCE, rank=1))
    world.finish()
    world.check_end()


def open_sinks(world: Deaths) -> None:
    """Many of one source."""
    for number in range(MANY):
        call = worker.Receive(transfer_id=f"t{number}", source="tcp://b:1", window_tokens=BLOCK)
        world.call("a", DYING, call)


@pytest.mark.parametrize("turns", [0, 3])
def test_a_link_that_is_lost_and_comes_back_asks_in_slices(turns: int) -> None:
    """Many sinks of one source, and no turn in which all of them ask."""
    world = Deaths(0)
    node = world.node
    open_sinks(world)
    sinks = node.sinks._sinks_of["tcp://b:1"]
    node.tell(sinks, PeerUp())
    for _ in range(turns):
        world.turn()
    node.tell(sinks, PeerDown())
    world.finish()
    assert not any(getattr(one, "peer_up", True) for one in node.transfers.values())
    node.sinks.peers["tcp://b:1"].state = "up"
    node.sinks.peers["tcp://b:1"].boot_id = "b" * 16
    node.tell(sinks, PeerUp())
    asked = 0
    while node.owed:
        world.seen.clear()
        world.turn()
        said = [one.message for one in world.seen if isinstance(one, Say)]
        pulls = sum(len(one.pulls) for one in said if isinstance(one, peer.Pulls))
        assert pulls <= OWED_A_TURN + A_TURN
        asked += pulls
    assert asked >= MANY
    world.die()
    world.finish()
    assert not [one for one in node.transfers.values() if not one.ended]


def test_many_that_are_to_be_forgotten_at_one_moment_are_so_in_several_turns() -> None:
    """Tombstones of a death, and sinks that no source has come for."""
    world = Deaths(0)
    node, many, timing = world.node, 3 * EXPIRED_A_TURN - 1, world.node.settings.timing
    for number in range(many):
        node.tombstones.add_unknown(key_of(number), Done(State.FAILED, None), 0.0)
        pull = pull_of(world, many + number).pulls[0]
        node.sources.unmet.answer(key_of(many + number), Pulled("b" * 16, "b" * 16, pull))
    for kept_s, what in (
        (KEPT_LEASES * timing.lease_s, "unmet"),
        (timing.tombstone_s, "stones"),
    ):
        world.now_s = kept_s
        for left in (2 * EXPIRED_A_TURN - 1, EXPIRED_A_TURN - 1, 0):
            world.turn()
            assert left == len(node.sources.unmet if what == "unmet" else node.tombstones)
        assert node.wake_at_s > world.now_s


@pytest.mark.parametrize("told", [False, True])
def test_who_had_not_heard_all_before_we_slept_has_not_been_silent_either(told: bool) -> None:
    """What else is owed brings the time: it must not come before the news of the sleep."""
    world = Deaths(0)
    node = world.node
    open_sinks(world)
    node.tell(node.sinks._sinks_of["tcp://b:1"], PeerUp())
    world.turn()
    if told:
        world.finish()
    world.now_s += 2 * node.settings.timing.stall_s
    world.feed("a", out.TimePassed())
    world.finish()
    assert node.counters["slept"] == 1
    assert [one.state for one in node.transfers.values()] == [State.BOOTSTRAPPING] * MANY


def test_what_a_source_says_again_and_again_is_owed_once() -> None:
    owed, one = Owed(), key_of(1)
    slept, down = Slept(1.0), PeerDown()
    for event in (NewsLost(), down, NewsLost(), slept, slept, Fail(Code.ABORTED, "a")):
        owed.add({one: None}, event)
    owed.add({one: None}, Fail(Code.ABORTED, "b"))
    assert owed.take(one) == (slept, slept, NewsLost(), down, Fail(Code.ABORTED, "a"))


def test_what_is_owed_is_heard_in_the_order_of_coming() -> None:
    owed, one, other = Owed(), key_of(1), key_of(2)
    owed.add({one: None, other: None}, "first")
    owed.add({one: None}, "second")
    assert owed.first(1) == [one]
    assert owed.take(one) == ("first", "second")
    assert owed.take(one) == ()
    owed.add({one: None}, "third")
    assert owed.first(2) == [other, one]
    assert len(owed) == 2
