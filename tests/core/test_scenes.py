"""The scenes that must hold, by the names that the design gives them."""

import pytest

from core.stories import SINK, SOURCE, Story
from kvferry_daemon.core.events import Free, Heard, Key, Pulled
from kvferry_daemon.core.pool import Lease
from kvferry_daemon.core.source import SourceTransfer
from kvferry_proto import worker
from kvferry_proto.peer import Progress, Pull
from kvferry_proto.states import Mode, Role, StallReason, State
from world import BLOCK, Chunk, World

WINDOW = 8


def test_allocator_hands_out_the_same_blocks() -> None:
    """The sink's quota is one window: each has the very blocks of the one before."""
    story = Story(5 * WINDOW, World(blocks=2 * WINDOW // BLOCK, window_tokens=WINDOW))
    story.open()
    story.check(story.run())
    assert story.resumes == [8, 16, 24, 32, 40][: len(story.resumes)]
    used = [{b for first, n in runs for b in range(first, first + n)} for runs in story.windows]
    assert len(used) >= 5
    assert all(blocks == used[0] for blocks in used)


def test_allocator_hands_out_other_blocks() -> None:
    """Another transfer takes the freed blocks first, so that each window has others."""
    story = Story(3 * WINDOW, World(blocks=32, window_tokens=WINDOW))
    story.open()
    book = next(iter(story.world.machines["b"].node.books.values()))
    held: list[Lease] = []
    for _ in range(2):
        story.produce()
        story.world.wait(0.05)
        seen = story.sink()
        story.take(seen)
        story.resume(seen.sent_tokens)
        held += book.pool.grant(99, Role.SINK, 2).leases  # the freed ones: they are at hand
        story.world.wait(0.05)
    end = story.run()
    for lease in held:
        book.pool.free(lease)
    story.check(end)
    assert story.windows[0] != story.windows[1]


def test_many_resumes() -> None:
    story = Story(100 * WINDOW + 3, World(blocks=8, window_tokens=WINDOW))
    story.open()
    end = story.run(2000)
    story.check(end)
    assert story.resumes == [WINDOW * (n + 1) for n in range(100)]
    assert end.last_resume_at == 100 * WINDOW


@pytest.mark.parametrize("total", [0, 1, BLOCK, WINDOW - 1, WINDOW, WINDOW + 1, 37])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("handoff", [True, False])
def test_every_length(total: int, late: bool, handoff: bool) -> None:
    story = Story(total, late=late, handoff=handoff)
    story.open()
    story.check(story.run())


def test_a_total_told_after_exactly_one_window_was_taken() -> None:
    story = Story(WINDOW)
    story.open()
    story.world.wait(0.01)
    story.produce()
    story.world.wait(0.05)
    seen = story.sink()
    assert (seen.sent_tokens, seen.total_tokens) == (WINDOW, None)
    assert seen.stall is StallReason.WAITING_FOR_RESUME
    story.take(seen)
    story.resume(WINDOW)
    story.ready(WINDOW, WINDOW)
    story.check(story.run())


def test_handoff_copies_no_byte() -> None:
    story = Story(3 * WINDOW, handoff=True)
    story.open()
    story.check(story.run())
    counters = story.world.machines["b"].node.counters
    assert counters["blocks_handed_over"] == 3 * WINDOW // BLOCK
    assert counters["bytes_received"] == 0


@pytest.mark.parametrize("handoff", [True, False])
def test_a_prefix_that_the_sink_has_is_not_moved(handoff: bool) -> None:
    story = Story(5 * WINDOW, handoff=handoff, start=2 * WINDOW)
    story.open()
    story.check(story.run())


@pytest.mark.parametrize("handoff", [True, False])
def test_whole_mode_waits_with_nothing_or_has_it_all(handoff: bool) -> None:
    story = Story(20, World(blocks=32, window_tokens=WINDOW), handoff=handoff)
    story.open(mode=Mode.WHOLE, max_tokens=24)
    end = story.run()
    assert (end.base_tokens, story.resumes) == (0, [])
    story.check(end)


@pytest.mark.parametrize("first", ["source", "sink"])
def test_either_side_may_come_first(first: str) -> None:
    story = Story(2 * WINDOW)
    (story.open_source if first == "source" else story.open_sink)()
    story.world.wait(1)
    story.world.beat()
    (story.open_sink if first == "source" else story.open_source)()
    story.check(story.run())


def test_a_cut_stream_costs_only_what_was_on_it() -> None:
    story = Story(4 * WINDOW)
    story.open()
    world = story.world
    for _ in range(12):
        story.produce()
        while world.wire and world.sockets and len(world.wire) > 1:
            world.deliver()
        for key in list(world.sockets):
            world.cut(key)
        world.wait(0.3)
        seen = story.sink()
        if seen.stall is StallReason.WAITING_FOR_RESUME:
            story.take(seen)
            story.resume(seen.sent_tokens)
        world.beat()
    story.check(story.run())


def test_a_retry_on_both_sides_ends_the_first_attempt() -> None:
    story = Story(3 * WINDOW)
    story.open()
    story.world.wait(0.05)
    story.produce()
    story.world.wait(0.05)
    assert story.sink().sent_tokens == WINDOW
    story.release()
    story.attempt, story.read, story.windows = 1, [], []
    story.open()
    assert story.sink().sent_tokens == 0
    story.check(story.run())


def test_crossing_quotas_do_not_lock() -> None:
    """The source's quota is full of one transfer, the sink's must not be held by another."""
    story = Story(4 * WINDOW, World(blocks=4, window_tokens=WINDOW))
    world = story.world
    story.open_sink()  # `t` waits for its source, and must hold nothing meanwhile
    for name in ("u", "t"):
        world.call("a", SOURCE, worker.Send(transfer_id=name))
    world.wait(0.1)
    assert world.snapshot("b", SINK, Role.SINK).allocated_tokens == 0
    call = worker.Receive(transfer_id="u", source="tcp://a:1")
    world.call("b", SINK, call)
    seen = world.snapshot("a", SOURCE, Role.SOURCE, "u")
    assert seen.allocated_tokens == WINDOW
    world.fill("a", seen, WINDOW)
    ready = worker.Ready(transfer_id="u", ready_tokens=WINDOW, total_tokens=WINDOW)
    world.call("a", SOURCE, ready)
    world.wait(0.1)
    assert world.snapshot("b", SINK, Role.SINK, "u").state is State.SUCCESS
    world.call("b", SINK, worker.Release(transfer_id="u", role=Role.SINK))
    world.wait(0.1)
    story.check(story.run())


def test_blocks_are_wiped_only_when_they_change_owner() -> None:
    story = Story(5 * WINDOW, World(blocks=2 * WINDOW // BLOCK, window_tokens=WINDOW))
    story.open()
    story.check(story.run())
    assert story.world.machines["b"].zeroed_blocks == 0
    story.attempt, story.read = 1, []
    story.open()
    story.check(story.run())
    assert story.world.machines["b"].zeroed_blocks == WINDOW // BLOCK


def test_a_lost_pull_is_sent_again_with_what_it_wanted() -> None:
    story = Story(2 * WINDOW)
    story.open()
    story.world.wait(0.05)
    seen = story.source()
    story.world.fill("a", seen, WINDOW)
    story.ready(WINDOW)
    while not story.world.machines["b"].claims:
        story.world.deliver()
    story.world.wire.clear()  # the pull that names the claims
    story.world.wait(1)
    assert story.sink().sent_tokens == WINDOW


def test_a_repeated_pull_serves_nothing_twice() -> None:
    story = Story(2 * WINDOW)
    story.open()
    story.world.wait(0.05)
    story.produce()
    while not story.world.machines["b"].claims:
        story.world.deliver()
    for _ in range(3):
        story.world.deliver(keep=True)  # the pull, again and again
    story.world.settle()
    counters = story.world.machines["a"].node.counters
    assert counters["chunks_sent"] == WINDOW // BLOCK


def test_blocks_that_are_still_read_are_not_freed() -> None:
    """The sink has acknowledged them, but a chunk of theirs lies half sent in our thread."""
    story = Story(4 * WINDOW)
    story.open()
    story.world.wait(0.05)
    story.produce()
    world = story.world
    while not any(isinstance(thing, Chunk) for thing in world.wire):
        world.deliver()
    source = world.machines["a"].node.transfers[Key(Role.SOURCE, "t", 0)]
    assert isinstance(source, SourceTransfer)
    pull = Pull(
        transfer_id="t",
        attempt=0,
        number=99,
        handle=1,
        layout_digest=b"x" * 16,
        start_tokens=0,
        acked_tokens=WINDOW,
    )
    assert source.sink is not None
    freed = [
        e for e in source.handle(Pulled(source.sink, source.sink, pull)) if isinstance(e, Free)
    ]
    assert freed == []
    assert source.window.base_tokens == 0


def test_a_source_that_changes_its_total_fails_the_transfer() -> None:
    story = Story(2 * WINDOW, late=False)
    story.open()
    story.world.wait(0.05)
    sink = story.world.machines["b"].node.transfers[Key(Role.SINK, "t", 0)]
    news = Progress(
        transfer_id="t", attempt=0, number=1, state=State.TRANSFERRING, total_tokens=2 * WINDOW + 1
    )
    sink.handle(Heard(news))
    assert sink.error is not None
    assert sink.error.code == "total_changed"


def test_a_resume_ahead_is_refused_and_changes_nothing() -> None:
    story = Story(2 * WINDOW)
    story.open()
    story.world.wait(0.05)
    before = story.sink()
    assert story.resume(1).error.code == "resume_ahead"
    assert story.sink() == before
