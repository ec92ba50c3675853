"""The order in which operators see transfers."""

from core.stories import SINK, Story
from kvferry_daemon.core.report import transfers
from kvferry_proto import control, worker


def test_of_two_that_came_in_one_turn_the_later_one_is_the_younger() -> None:
    """The clock stands still within a turn of the loop."""
    world = Story(1).world
    for name in ("one", "two", "three"):
        world.call("b", SINK, worker.Receive(transfer_id=name))
    orders: tuple[control.Sort, ...] = ("age", "idle", "opened")
    shown = {
        sort: [
            row.snapshot.transfer_id
            for row in transfers(
                world.machines["b"].node, control.GetTransfers(sort=sort), world.now_s
            ).transfers
        ]
        for sort in orders
    }
    assert shown["opened"] == ["one", "two", "three"]
    assert shown["age"] == shown["idle"] == ["three", "two", "one"]
