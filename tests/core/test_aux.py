"""Aux values are kept as long as somebody may ask for them, and no longer."""

import pytest

from core.stories import SINK, SOURCE, Story
from core.test_groups import Group
from kvferry_daemon.core import aux_books
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.aux_values import digest_of
from kvferry_daemon.core.events import Key, Timing
from kvferry_daemon.core.opening import Opened
from kvferry_daemon.core.records import RECORDS, OpeningRecord
from kvferry_proto import worker
from kvferry_proto.errors import AGAIN_S, Code
from kvferry_proto.states import Role, State
from world import BLOCK, World, layout

AUX: dict[str, int | float | str | bytes] = {"first": b"x" * 1000, "second": 7}
LARGE: dict[str, int | float | str | bytes] = {"big": bytes(1 << 16)}
OTHER: dict[str, int | float | str | bytes] = {**AUX, "second": 8}
SENT = Key(Role.SOURCE, "t", 0)
RECEIVED = Key(Role.SINK, "t", 0)


def moved(*, handoff: bool) -> Story:
    """A payload that ended after all its tokens had been taken over: its sink holds no block."""
    story = Story(BLOCK, handoff=handoff)
    story.world = World()
    for where, route in ((story.where, SOURCE), ("b", SINK)):
        story.world.hello(where, route, layout(aux=("first", "second")))
    story.open()
    story.world.wait(0.02)
    story.produce()
    story.world.wait(0.02)
    story.take(story.sink())
    story.resume(BLOCK)
    last = worker.Ready(transfer_id="t", ready_tokens=BLOCK, total_tokens=BLOCK, aux=AUX)
    story.world.call(story.where, SOURCE, last)
    story.world.wait(0.02)
    return story


@pytest.mark.parametrize("handoff", [True, False])
def test_a_sink_is_told_them_until_it_is_released(handoff: bool) -> None:
    story = moved(handoff=handoff)
    node = story.world.machines["b"].node
    assert node.transfers[RECEIVED].window.blocks == 0
    for _ in range(2):
        seen = story.sink()
        assert (seen.state, seen.aux) == (State.SUCCESS, AUX)
        story.world.wait(2.0)
        story.world.beat()
    story.world.call("b", SINK, worker.Release(transfer_id="t", role=Role.SINK))
    assert RECEIVED not in node.transfers
    assert (story.sink().state, story.sink().aux) == (State.SUCCESS, None)


def test_a_sink_that_nobody_releases_is_forgotten_as_late_as_its_tombstone_would_be() -> None:
    story = moved(handoff=True)
    node = story.world.machines["b"].node
    beats = int(Timing().tombstone_s)
    for _ in range(beats - 5):
        story.world.wait(1.0)
        story.world.beat()
    assert story.sink().aux == AUX
    for _ in range(10):
        story.world.wait(1.0)
        story.world.beat()
    assert RECEIVED not in node.transfers
    assert (story.sink().state, story.sink().aux) == (State.SUCCESS, None)


def test_a_rank_that_comes_after_the_end_of_no_tokens_is_told_them_too() -> None:
    world = World()
    for where, role in (("a", Role.SOURCE), ("b", Role.SINK)):
        for rank in range(2):
            world.hello(where, f"{role} {rank}".encode(), layout(aux=("first", "second")))
    group = Group(total=0, world=world)
    group.open(Role.SOURCE, 0, total_tokens=0, aux=AUX)
    group.open(Role.SOURCE, 1, total_tokens=0)
    for rank in range(2):
        world.wait(0.1)
        (opened,) = group.open(Role.SINK, rank).transfers
        world.wait(0.1)
        assert rank == 0 or opened.aux == AUX
        assert (group.now(Role.SINK, rank).state, group.now(Role.SINK, rank).aux) == (
            State.SUCCESS,
            AUX,
        )
        group.call(Role.SINK, rank, worker.Release, role=Role.SINK)
    assert not world.machines["b"].node.transfers


def test_a_tombstone_knows_what_was_sent_without_keeping_it() -> None:
    world = World()
    world.hello("a", SOURCE, layout(aux=("first", "second")))
    send = worker.Send(transfer_id="t", aux=AUX)
    world.call("a", SOURCE, send)
    differs = world.call("a", SOURCE, send.model_copy(update={"aux": OTHER})).error
    assert (differs.code, differs.message) == (
        "parameters_differ",
        "aux is not what it was before: second",
    )
    world.call("a", SOURCE, worker.Abort(transfer_id="t", role=Role.SOURCE))
    world.call("a", SOURCE, worker.Release(transfer_id="t", role=Role.SOURCE))
    assert SENT not in world.machines["a"].node.transfers
    (seen,) = world.call("a", SOURCE, send).transfers
    assert (seen.state, seen.aux) == (State.FAILED, None)
    for aux in (OTHER, None):
        differs = world.call("a", SOURCE, send.model_copy(update={"aux": aux})).error
        assert (differs.code, differs.message) == (
            "parameters_differ",
            "aux is not what it was before",
        )


def test_the_ledger_has_them_once_and_not_behind_the_end() -> None:
    world = World()
    rows: dict[str, bytes | None] = {}
    world.hello("a", SOURCE, layout(aux=("first", "second")))
    node = world.machines["a"].node
    calls: list[out.WorkerCall] = [
        worker.Send(transfer_id="t", aux=AUX),
        worker.Abort(transfer_id="t", role=Role.SOURCE),
        worker.Release(transfer_id="t", role=Role.SOURCE),
    ]
    held = []
    for call in calls:
        for effect in node.handle(out.WorkerCalled(SOURCE, call), world.now_s):
            if isinstance(effect, out.Write):
                rows |= effect.rows
        held.append([name for name, row in rows.items() if b"x" * 1000 in (row or b"")])
    assert held == [["aux:source:0:t"]] * 2 + [[]]
    opening = RECORDS.decode(rows["opening:source:0:t"] or b"")
    assert isinstance(opening, OpeningRecord)
    once = opening.model_copy(update={"call": calls[0], "aux_digest": None})  # of other versions
    assert Opened.noted(once) == Opened.noted(opening)
    assert Opened.noted(opening).aux_digest == digest_of(AUX)


def two_of_one_source(monkeypatch: pytest.MonkeyPatch, values: float) -> tuple[World, list[State]]:
    """Two workers send to two others; ``values``: how many transfers' there is room for."""
    monkeypatch.setattr(aux_books, "OF_ONE_MAX", int(values * aux_books.bytes_of(LARGE)))
    world, ends = World(), []
    for name in (b"t", b"u"):
        world.hello("a", name, layout(aux=("big",)))
        world.hello("b", name, layout(aux=("big",)))
        send = worker.Send(transfer_id=name.decode(), total_tokens=0, aux=LARGE)
        world.call("a", name, send)
        world.call("b", name, worker.Receive(transfer_id=name.decode(), source="tcp://a:1"))
        world.wait(0.1)
        seen = world.snapshot("b", name, Role.SINK, name.decode())
        ends.append(seen.state)
        if seen.error is not None:
            told = (seen.error.code, seen.error.retry_after_s)
            assert told == (Code.RESOURCE_EXHAUSTED, AGAIN_S)
    return world, ends


def test_what_one_source_tells_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    world, ends = two_of_one_source(monkeypatch, 1.5)
    assert ends == [State.SUCCESS, State.FAILED]
    node = world.machines["b"].node
    assert node.counters["aux_over_bound"] == 1
    assert node.aux_books.kept_bytes == aux_books.bytes_of(LARGE)
    for name in (b"t", b"u"):
        release = worker.Release(transfer_id=name.decode(), role=Role.SINK)
        world.call("b", name, release)
    assert (node.aux_books.kept_bytes, len(node.aux_books._of)) == (0, 0)


def test_what_all_keep_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aux_books, "OF_ALL_MAX", int(1.5 * aux_books.bytes_of(LARGE)))
    _, ends = two_of_one_source(monkeypatch, 9)
    assert ends == [State.SUCCESS, State.FAILED]


def test_what_is_within_the_bounds_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ends = two_of_one_source(monkeypatch, 2)
    assert ends == [State.SUCCESS, State.SUCCESS]
