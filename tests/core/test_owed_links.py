"""What many transfers of one link hear at once, or forget at one moment: a few of them a turn."""

import pytest

from core.deaths import DYING, MANY, Deaths, key_of, pull_of
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import (
    Done,
    Fail,
    NewsLost,
    PeerDown,
    PeerUp,
    Pulled,
    Slept,
    StreamDown,
    StreamKey,
    StreamUp,
)
from kvferry_daemon.core.node import EXPIRED_A_TURN, OWED_A_TURN
from kvferry_daemon.core.owed import Owed
from kvferry_daemon.core.peer_effects import Say
from kvferry_daemon.core.timers import A_TURN
from kvferry_daemon.core.unmet import KEPT_LEASES
from kvferry_proto import peer, worker
from kvferry_proto.errors import Code
from kvferry_proto.states import State
from world import BLOCK


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


def test_a_connection_that_comes_and_goes_again_and_again_is_owed_as_gone_once() -> None:
    """A source can close its connections as often as it likes: a turn must not grow with that."""
    owed, one, other = Owed(), key_of(1), key_of(2)
    first = StreamKey("tcp://b:1", 0, 0)
    owed.add({one: None}, StreamDown(first))
    for number in range(1, 50):
        owed.add({one: None}, StreamUp(first._replace(connection=number)))
        owed.add({one: None}, StreamDown(first._replace(connection=number)))
    last = StreamUp(first._replace(connection=50))
    owed.add({one: None}, last)
    assert owed.take(one) == (StreamDown(first), last)
    owed.add({one: None, other: None}, last)
    owed.add({one: None, other: None}, StreamDown(last.key))
    assert len(owed) == 0  # nobody has a turn for nothing


def test_of_a_connection_that_never_came_nobody_is_told() -> None:
    """A source may hand out tickets for a port that refuses, and each try has a number of its own."""
    world = Deaths(0)
    open_sinks(world)
    world.finish()
    for number in range(20):
        world.feed("a", out.SinkStreamDown(StreamKey("tcp://b:1", 0, number), "refused"))
    assert not world.node.owed


def test_of_those_that_are_owed_much_a_turn_pays_fewer() -> None:
    owed, keys = Owed(), [key_of(number) for number in range(9)]
    for event in (PeerUp(), PeerDown(), PeerUp()):
        owed.add(dict.fromkeys(keys), event)
    assert owed.first(6) == keys[:2]
    assert owed.first(7) == keys[:3]
    assert owed.first(1) == keys[:1]
