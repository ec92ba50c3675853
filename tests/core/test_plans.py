"""Who has other layouts may have us work out what goes where, but not for ever."""

import pytest

from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allowance import NAMES_MAX
from kvferry_daemon.core.plans import KNOWN_MAX, NEW_MAX, NEW_S, Plans
from kvferry_daemon.core.shape import Side, planned, shapes
from kvferry_proto import peer, worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role, State
from world import BLOCK, World, layout

SOURCE, SINK = b"source worker", b"sink worker"
FIRST, OTHER = "c" * 16, "d" * 16


def side(blocks: int) -> Side:
    return Side.of(layout(block=blocks * BLOCK), 1)


def test_new_layouts_are_counted_and_known_ones_are_not() -> None:
    plans, ours = Plans(), side(1)
    told = [plans.may_make("hog", ours, side(2 + number), 0.0) for number in range(2 * NEW_MAX)]
    assert told == [True] * NEW_MAX + [False] * NEW_MAX
    assert all(plans.may_make("hog", ours, side(2), 0.0) for _ in range(100))
    assert plans.may_make("honest", ours, side(99), 0.0)
    assert not plans.may_make("hog", ours, side(98), NEW_S * 0.9)
    assert plans.may_make("hog", ours, side(98), NEW_S * 1.1)
    assert not plans.may_make("hog", ours, side(97), NEW_S * 1.1)


def test_names_and_layouts_that_are_kept_are_bounded() -> None:
    plans, ours, theirs = Plans(), side(1), side(2)
    for number in range(NAMES_MAX + 50):
        plans.may_make(str(number), ours, theirs, 0.0)
    for number in range(1, 50):
        plans.may_make("one", ours, side(number), 1000.0 * number)
    assert len(plans._known) <= NAMES_MAX
    assert len(plans._known["one"]) <= KNOWN_MAX


def test_what_was_worked_out_is_had_again_by_who_has_many() -> None:
    """A fleet has more layouts and ranks than may be new at once."""
    plans, ours = Plans(), side(1)
    theirs = [side(2 + number) for number in range(3 * NEW_MAX)]
    for number, one in enumerate(theirs):
        assert plans.may_make("fleet", ours, one, number * NEW_S)
    now_s = len(theirs) * NEW_S
    for _ in range(3):
        assert all(plans.may_make("fleet", ours, one, now_s) for one in theirs)


def test_that_two_layouts_do_not_fit_is_found_out_once() -> None:
    plane = Plane(name="other", dtype=Dtype.UINT8, shape=(3,))
    other = Side.of(Layout(planes=(plane,), block_size_tokens=7), 1)
    before = planned.cache_info().misses
    for _ in range(3):
        with pytest.raises(FerryError) as caught:
            shapes(side(1), other)
        assert caught.value.code is Code.LAYOUT_MISMATCH
    assert planned.cache_info().misses == before + 1


def pull(world: World, sink: str, number: int, blocks: int, acked: int = 0) -> peer.Progress | None:
    """What a sink with such blocks is answered, if it is."""
    kind = layout(block=blocks * BLOCK)
    asked = peer.Pull(
        transfer_id="t",
        attempt=0,
        number=number,
        handle=0,
        layout_digest=kind.digest,
        start_tokens=0,
        acked_tokens=acked,
        layout=kind,
    )
    said = peer.Pulls(source_boot_id="a" * 16, sink_boot_id=sink, pulls=[asked])
    node = world.machines["a"].node
    for effect in node.handle(out.SinkSaid(sink.encode(), said), world.now_s):
        if isinstance(effect, out.ToSink) and isinstance(effect.message, peer.Progresses):
            return effect.message.progresses[0]
    return None


@pytest.fixture
def world() -> World:
    """A source, and two daemons that may pull from it."""
    one = World()
    one.hello("a", SOURCE)
    one.call("a", SOURCE, worker.Send(transfer_id="t"))
    for boot in (FIRST, OTHER):
        hello = peer.PeerHello(boot_id=boot, daemon_id=boot, life=1)
        one.feed("a", out.SinkSaid(boot.encode(), hello))
    return one


def test_a_pull_that_is_refused_anyhow_is_refused_before_any_work(world: World) -> None:
    """Each brought a layout that nobody had seen, and held the loop for up to a second."""
    assert pull(world, FIRST, 1, 1) is not None
    before = planned.cache_info().misses
    for number in range(20):
        thief = pull(world, OTHER, number, 100 + number)
        liar = pull(world, FIRST, 2 + number, 200 + number, acked=99 * BLOCK)
        assert [one and one.error and one.error.code for one in (thief, liar)] == [
            Code.SINK_TAKEN,
            Code.PEER_PROTOCOL,
        ]
    world.call("a", SOURCE, worker.Abort(transfer_id="t", role=Role.SOURCE))
    for number in range(20):
        pull(world, FIRST, 30 + number, 300 + number)
    assert planned.cache_info().misses == before


def test_one_daemon_has_so_many_new_plans_of_sources(world: World) -> None:
    before = planned.cache_info().misses
    node = world.machines["a"].node
    for number in range(30):  # layouts that do not fit: no answer lasts
        kind = Layout(
            planes=(Plane(name=f"p{number}", dtype=Dtype.UINT8),), block_size_tokens=BLOCK
        )
        asked = peer.Pull(
            transfer_id="t",
            attempt=0,
            number=number,
            handle=0,
            layout_digest=kind.digest,
            start_tokens=0,
            acked_tokens=0,
            layout=kind,
        )
        said = peer.Pulls(source_boot_id="a" * 16, sink_boot_id=FIRST, pulls=[asked])
        node.handle(out.SinkSaid(b"route", said), 0.0)
    assert planned.cache_info().misses == before + NEW_MAX
    assert node.counters["plans_refused"] == 30 - NEW_MAX


def test_a_source_has_so_many_new_plans_of_sinks() -> None:
    world = World()
    world.hello("b", SINK)
    world.call("b", SINK, worker.Receive(transfer_id="t", source="tcp://a:1"))
    world.settle()
    node = world.machines["b"].node
    [found] = node.sinks.peers.values()
    before = planned.cache_info().misses
    for number in range(30):
        progress = peer.Progress(
            transfer_id="t",
            attempt=0,
            number=1,
            state=State.BOOTSTRAPPING,
            layout=layout(block=BLOCK * (500 + number)),
        )
        said = peer.Progresses(
            before=0,
            progresses=[progress],
            source_boot_id=found.boot_id or "",
            sink_boot_id=found.our_boot_id,
        )
        node.handle(out.SourceSaid("tcp://a:1", said), world.now_s)
    assert planned.cache_info().misses == before + NEW_MAX
    assert ev.Key(Role.SINK, "t", 0) in node.transfers
