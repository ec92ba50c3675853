"""Source and sink in one daemon whose blocks cannot change owner: they are copied."""

from __future__ import annotations

import pytest

from core.stories import SINK, SOURCE, Story
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Key
from kvferry_daemon.core.report import transfers
from kvferry_proto import control, worker
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Mode, Role, State
from world import BLOCK, Chunk, Letter, World, layout

WINDOW = 8


@pytest.mark.parametrize("total", [0, 1, BLOCK, 2 * BLOCK - 1, WINDOW, WINDOW + 1, 37])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("wide", list(Role))
def test_every_length(total: int, late: bool, wide: Role) -> None:
    story = Story(total, late=late, copy=wide)
    story.open()
    story.check(story.run())
    counters = story.world.machines["b"].node.counters
    assert counters["bytes_copied"] == total  # of the model: one a token
    assert counters["blocks_handed_over"] == counters["bytes_received"] == 0
    assert counters["bytes_sent"] == counters["pulls_received"] == 0


@pytest.mark.parametrize("first", ["source", "sink"])
def test_either_side_may_come_first(first: str) -> None:
    """What they are to each other is found out when they meet, not before."""
    story = Story(3 * WINDOW + 1, copy=Role.SINK)
    (story.open_source if first == "source" else story.open_sink)()
    story.world.wait(1)
    story.world.beat()
    if first == "sink":
        assert story.sink().state is State.BOOTSTRAPPING
    (story.open_sink if first == "source" else story.open_source)()
    assert story.sink().state is State.WAITING_FOR_INPUT
    story.check(story.run())


def test_a_prefix_that_the_sink_has_is_not_copied() -> None:
    story = Story(5 * WINDOW, copy=Role.SINK, start=2 * WINDOW)
    story.open()
    story.check(story.run())
    assert story.world.machines["b"].node.counters["bytes_copied"] == 3 * WINDOW


def test_whole_mode_has_it_all() -> None:
    story = Story(20, World(blocks=32, window_tokens=WINDOW), copy=Role.SINK)
    story.open(mode=Mode.WHOLE, max_tokens=24)
    end = story.run()
    assert (end.base_tokens, story.resumes) == (0, [])
    story.check(end)


def test_an_operator_sees_how_bytes_travel() -> None:
    for story, how in ((Story(4, copy=Role.SINK), "copy"), (Story(4, handoff=True), "handoff")):
        story.open()
        story.world.wait(0.1)
        node = story.world.machines["b"].node
        shown = transfers(node, control.GetTransfers(), 1.0).transfers
        assert [row.transport for row in shown] == [how, how]


def in_flight(total: int = WINDOW) -> tuple[Story, Chunk]:
    """A whole window is served, and one of its copies is under way."""
    story = Story(total, copy=Role.SINK)
    story.open()
    story.world.wait(0.1)
    story.produce()
    chunk = story.world.wire[0]
    assert isinstance(chunk, Chunk)
    assert chunk.key.is_here
    return story, chunk


@pytest.mark.parametrize("who", list(Role))
def test_blocks_that_a_thread_may_touch_are_kept_until_it_says_that_it_has_ended(who: Role) -> None:
    """However late: no timer, and no closing of anything, is a proof."""
    story, _ = in_flight()
    world, node = story.world, story.world.machines["b"].node
    copies, world.wire = world.wire, []
    world.machines["b"].claims.clear()  # a thread has taken them all
    call = worker.Abort(transfer_id="t", role=who)
    world.call("b", SOURCE if who is Role.SOURCE else SINK, call)
    for _ in range(10):
        world.wait(1)
        world.beat()
    story.release()
    held = [transfer.window.blocks for transfer in node.transfers.values()]
    assert held == [2, 1]  # of the source, of the sink
    for chunk in copies:
        assert isinstance(chunk, Chunk)
        world.feed("b", out.ChunkSent(chunk.key, chunk.owner, 0, chunk.first_token, 4))
        event = out.ChunkReceived(chunk.key, chunk.handle, chunk.first_token, chunk.tokens)
        world.feed("b", event)
    assert world.blocks_free("b")
    assert not node.transfers


def test_a_copy_that_was_not_begun_is_taken_back_with_the_sinks_end() -> None:
    story, _ = in_flight()
    world = story.world
    world.call("b", SINK, worker.Abort(transfer_id="t", role=Role.SINK))
    assert not world.machines["b"].claims
    world.call("b", SINK, worker.Release(transfer_id="t", role=Role.SINK))
    node = world.machines["b"].node
    assert Key(Role.SINK, "t", 0) not in node.transfers
    assert node.transfers[Key(Role.SOURCE, "t", 0)].window.blocks  # its thread has not looked yet
    world.call("b", SOURCE, worker.Release(transfer_id="t", role=Role.SOURCE))
    world.settle()
    assert world.blocks_free("b")


UNFIT = {
    "no multiple": (layout(block=12), layout(block=8), "neither is a multiple of the other"),
    "another plane": (
        layout(),
        Layout(planes=(Plane(name="ids", dtype=Dtype.INT64),), block_size_tokens=BLOCK),
        "planes[0] (kv) name: kv at the source, ids at the sink",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("first", [SOURCE, SINK])
def test_what_does_not_fit_is_refused_when_the_two_meet(name: str, first: bytes) -> None:
    source, sink, why = UNFIT[name]
    world = World(blocks=24)
    calls: dict[bytes, tuple[Layout, worker.Send | worker.Receive]] = {
        SOURCE: (source, worker.Send(transfer_id="t", window_tokens=1)),
        SINK: (sink, worker.Receive(transfer_id="t", window_tokens=1)),
    }
    for route in (first, SINK if first == SOURCE else SOURCE):
        kind, call = calls[route]
        world.hello("b", route, kind)
        assert isinstance(world.call("b", route, call), worker.Snapshots)
    error = world.snapshot("b", SINK, Role.SINK).error
    assert error is not None
    assert error.code == "layout_mismatch"
    assert why in error.message
    error = world.snapshot("b", SOURCE, Role.SOURCE).error
    assert error is not None
    assert error.code == "sink_failed"


def test_no_message_goes_out() -> None:
    story, _ = in_flight(3 * WINDOW)
    assert not [thing for thing in story.world.wire if isinstance(thing, Letter)]
    story.check(story.run())
