"""What a source's daemon promises to sinks that come early, and what becomes of it."""

from dataclasses import replace

import pytest

from core.stories import SINK, SOURCE
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Key
from kvferry_daemon.core.source import SourceTransfer
from kvferry_proto import worker
from kvferry_proto.peer import PeerHello
from kvferry_proto.states import Role, State
from world import World


def beat(world: World, seconds: int) -> None:
    """Let time pass with all workers alive."""
    for _ in range(seconds):
        world.wait(1)
        world.beat()


def waiting(here: bool) -> tuple[World, str]:
    """A sink that has asked for attempt 0, and where its source would be."""
    world, where = World(), "b" if here else "a"
    world.hello(where, SOURCE)
    world.hello("b", SINK)
    source = None if here else "tcp://a:1"
    world.call("b", SINK, worker.Receive(transfer_id="t", source=source, stall_s=600))
    world.wait(1)
    assert len(world.machines[where].node.sources.unmet) == 1
    return world, where


@pytest.mark.parametrize("here", [False, True])
def test_who_waits_for_an_attempt_that_is_over_is_told_by_the_next_one(here: bool) -> None:
    """Its source never comes; who rests on the promise would ask once a lease."""
    world, where = waiting(here)
    world.call(where, SOURCE, worker.Send(transfer_id="t", attempt=2, total_tokens=4))
    world.settle()
    seen = world.snapshot("b", SINK, Role.SINK)
    assert seen.state is State.FAILED
    assert seen.error is not None
    assert seen.error.code == "stale_attempt"
    assert len(world.machines[where].node.sources.unmet) == 0


@pytest.mark.parametrize("here", [False, True])
def test_a_promise_that_is_kept_no_longer_is_taken_back(here: bool) -> None:
    """The leases of the two daemons need not be the same."""
    world, where = waiting(here)
    sink = world.machines["b"].node.transfers[Key(Role.SINK, "t", 0)]
    sink.timing = replace(sink.timing, lease_s=500.0)
    beat(world, 100)  # it asks once more after the lease that it had, and not again for long
    assert len(world.machines[where].node.sources.unmet) == 1
    world.call(where, SOURCE, worker.Send(transfer_id="t", total_tokens=4))
    world.settle()
    assert world.snapshot("b", SINK, Role.SINK).total_tokens == 4


def test_a_source_is_not_bound_to_a_sink_that_is_forgotten() -> None:
    """Its daemon was started anew; another one's sink would be refused with sink_taken."""
    world, _ = waiting(here=False)
    life = PeerHello(boot_id="c" * 16, daemon_id="b" * 16, life=2)
    world.machines["a"].node.sources.on_message(out.SinkSaid(b"b", life))
    world.call("a", SOURCE, worker.Send(transfer_id="t", total_tokens=4))
    source = world.machines["a"].node.transfers[Key(Role.SOURCE, "t", 0)]
    assert isinstance(source, SourceTransfer)
    assert source.sink_daemon is None


def test_two_sinks_for_one_source_learn_soon_which_of_them_has_it() -> None:
    """One promise is kept for a source; the other sink must not rest on it."""
    world, _ = waiting(here=False)
    world.hello("a", b"another sink")
    world.call("a", b"another sink", worker.Receive(transfer_id="t"))
    beat(world, 1)
    world.call("a", SOURCE, worker.Send(transfer_id="t", total_tokens=4))
    beat(world, 3)
    both = [
        world.snapshot("b", SINK, Role.SINK),
        world.snapshot("a", b"another sink", Role.SINK),
    ]
    assert [seen.total_tokens for seen in both].count(4) == 1
    (refused,) = [seen.error.code for seen in both if seen.error is not None]
    assert refused == "sink_taken"
