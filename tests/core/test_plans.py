"""Who has other layouts may have us work out what goes where, but not for ever."""

import gc
import weakref

import pytest

from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allowance import NAMES_MAX
from kvferry_daemon.core.plans import (
    ALL_A_S,
    NEW_MAX,
    NEW_S,
    SHARED_MAX,
    SHARED_S,
    Plans,
)
from kvferry_daemon.core.shape import KEPT_CELLS_MAX, KEPT_MAX, Planned, Side
from kvferry_proto import peer, worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role, State
from world import BLOCK, World, layout

SOURCE, SINK = b"source worker", b"sink worker"
FIRST, OTHER = "c" * 16, "d" * 16


def side(blocks: int) -> Side:
    return Side.of(layout(block=blocks * BLOCK), 1)


def ask(plans: Plans, name: str, one: Side, now_s: float, shared: str = "") -> bool:
    """Whether it may have a new plan between ours and this one, which it then has."""
    names = ("source", name), ("worker", shared or name)
    if not plans.may_make(*names, side(1), one, now_s):
        return False
    plans.make(side(1), one)
    return True


def test_new_layouts_are_counted_and_known_ones_are_not() -> None:
    plans = Plans()
    told = [ask(plans, "hog", side(2 + number), 0.0) for number in range(2 * NEW_MAX)]
    assert told == [True] * NEW_MAX + [False] * NEW_MAX
    assert all(ask(plans, "hog", side(2), 0.0) for _ in range(100))
    assert ask(plans, "honest", side(99), 0.0)
    assert not ask(plans, "hog", side(98), NEW_S * 0.9)
    assert ask(plans, "hog", side(98), NEW_S * 1.1)
    assert not ask(plans, "hog", side(97), NEW_S * 1.1)


def test_who_has_many_addresses_has_not_as_many_new_plans() -> None:
    """A worker may name 500 that it listens on itself, and a daemon in clear is who it says."""
    plans = Plans()
    told = [
        ask(plans, f"of hog {number}", side(2 + number), 0.1 * number, "hog")
        for number in range(5 * SHARED_MAX)
    ]
    assert SHARED_MAX <= sum(told) <= SHARED_MAX + 0.5 * SHARED_MAX / SHARED_S
    now_s = 0.5 * SHARED_MAX
    assert ask(plans, "honest", side(1000), now_s)


def test_all_together_have_new_plans_for_a_share_of_the_time() -> None:
    plans = Plans()
    told = [ask(plans, str(number), side(2 + number), 0.0) for number in range(5 * NEW_MAX)]
    assert sum(told) == int(ALL_A_S)
    assert not ask(plans, "late", side(99), 0.0)
    assert ask(plans, "late", side(2), 0.0)  # as one that is in the plan of others already
    assert ask(plans, "late", side(99), 2.0 / ALL_A_S)


def test_who_is_refused_for_others_sake_has_lost_nothing() -> None:
    plans = Plans()
    for number in range(int(ALL_A_S)):
        assert ask(plans, str(number), side(2 + number), 0.0)
    for number in range(10 * NEW_MAX):
        assert not ask(plans, "honest", side(100 + number), 0.0)
    told = [ask(plans, "honest", side(100 + number), 1.0) for number in range(2 * NEW_MAX)]
    assert sum(told) == NEW_MAX


def heads(ranks: int, planes: int, block: int = BLOCK) -> Side:
    """A rank's share of 64 heads."""
    made = tuple(
        Plane(name=f"p{n}", dtype=Dtype.UINT8, shape=(64 // ranks,), heads_total=64)
        for n in range(planes)
    )
    return Side.of(Layout(planes=made, block_size_tokens=block), ranks)


def test_a_large_plan_counts_as_many() -> None:
    """It takes as long; one is all that there is for a second."""
    plans, large, ours = Plans(), heads(64, 1024), heads(1, 1024)
    name = ("source", "hog")
    assert plans.may_make(name, name, large, ours, 0.0)
    plans.make(large, ours)
    assert not ask(plans, "other", side(2), 0.0)
    assert ask(plans, "other", side(2), 1.0)


def test_names_that_are_kept_are_bounded() -> None:
    plans = Plans()
    for number in range(NAMES_MAX + 50):
        ask(plans, str(number), side(2 + number % 50), 1000.0 * number)
    for each in (plans._each, plans._shared, plans._all):
        assert len(each._left) <= NAMES_MAX


def test_what_was_worked_out_is_had_again_by_who_has_many() -> None:
    """A fleet has more layouts and ranks than may be new at once."""
    plans = Plans()
    theirs = [side(2 + number) for number in range(3 * NEW_MAX)]
    for number, one in enumerate(theirs):
        assert ask(plans, "fleet", one, number * NEW_S)
    now_s = len(theirs) * NEW_S
    for _ in range(3):
        assert all(ask(plans, "fleet", one, now_s) for one in theirs)
    assert plans.kept.made == len(theirs)


def test_plans_that_are_kept_are_bounded_by_their_size() -> None:
    """They were 32, of 13 MiB each."""
    kept = Planned()
    largest = 64 * 1024
    for number in range(1, 8):
        kept.shapes(heads(64, 1024, number * BLOCK), heads(1, 1024, BLOCK))
        assert kept.cells <= KEPT_CELLS_MAX
    assert kept.cells > KEPT_CELLS_MAX // 2
    assert len(kept) == KEPT_CELLS_MAX // largest - 1  # they are a bit larger


def test_plans_that_are_kept_are_bounded_by_their_number() -> None:
    kept = Planned()
    for number in range(KEPT_MAX + 10):
        kept.shapes(side(1), side(2 + number))
        kept.shapes(side(1), side(2))  # is asked for again and again
    assert len(kept) == KEPT_MAX
    assert kept.made == KEPT_MAX + 10


def test_what_does_not_fit_is_kept_by_the_length_of_its_words() -> None:
    kept = Planned()
    for number in range(KEPT_MAX):
        names = tuple(f"{number}-{aux}-" + "x" * 50 for aux in range(64))
        planes = (Plane(name="kv", dtype=Dtype.UINT8),)
        one, two = (Side.of(Layout(planes=planes, aux=aux), 1) for aux in (names, ()))
        with pytest.raises(FerryError):
            kept.shapes(one, two)
    assert 32 * KEPT_MAX < kept.cells <= KEPT_CELLS_MAX


def test_a_plan_keeps_no_layouts() -> None:
    """They are 0.7 MiB each, of a thousand planes."""
    kept, ours, theirs = Planned(), heads(1, 4), heads(2, 4)
    gone = weakref.ref(theirs.layout)
    kept.shapes(theirs, ours)
    del theirs
    gc.collect()
    assert gone() is None
    assert len(kept) == 1


def test_that_two_layouts_do_not_fit_is_found_out_once() -> None:
    plane = Plane(name="other", dtype=Dtype.UINT8, shape=(3,))
    other = Side.of(Layout(planes=(plane,), block_size_tokens=7), 1)
    kept = Planned()
    for _ in range(3):
        with pytest.raises(FerryError) as caught:
            kept.shapes(side(1), other)
        assert caught.value.code is Code.LAYOUT_MISMATCH
    assert kept.made == 1


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
    kept = world.machines["a"].node.plans.kept
    before = kept.made
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
    assert kept.made == before


def test_one_daemon_has_so_many_new_plans_of_sources(world: World) -> None:
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
    assert node.plans.kept.made == NEW_MAX
    assert node.counters["plans_refused"] == 30 - NEW_MAX


def test_a_source_has_so_many_new_plans_of_sinks() -> None:
    world = World()
    world.hello("b", SINK)
    world.call("b", SINK, worker.Receive(transfer_id="t", source="tcp://a:1"))
    world.settle()
    node = world.machines["b"].node
    [found] = node.sinks.peers.values()
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
    assert node.plans.kept.made == NEW_MAX
    assert ev.Key(Role.SINK, "t", 0) in node.transfers
