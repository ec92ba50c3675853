"""Bugs that were found, each as the shortest story that showed it."""

from kvferry_proto import worker
from kvferry_proto.states import Role, State
from world import World

SOURCE, SINK = b"source worker", b"sink worker"


def test_a_done_of_an_unknown_attempt_does_not_hide_an_older_live_one() -> None:
    """The older attempt was never superseded, and kept its blocks until its deadline."""
    world = World()
    world.hello("a", SOURCE)
    world.hello("b", SINK)
    world.call("a", SOURCE, worker.Send(transfer_id="t"))
    world.call("b", SINK, worker.Receive(transfer_id="t", attempt=1, source="tcp://a:1"))
    world.settle()
    world.call("b", SINK, worker.Abort(transfer_id="t", attempt=1, role=Role.SINK))
    world.settle()
    world.call("a", SOURCE, worker.Send(transfer_id="t", attempt=2))
    assert world.snapshot("a", SOURCE, Role.SOURCE, attempt=0).state is State.FAILED
