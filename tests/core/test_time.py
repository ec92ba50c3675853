"""Time in which the daemon itself did not run, links that come and go, timers that are over."""

from dataclasses import replace
from typing import Any

import pytest

from core.stories import SINK, SOURCE, Story
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Key, Timing
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.peer_effects import Say
from kvferry_daemon.core.sink_daemons import SINKS_MAX
from kvferry_daemon.core.sink_desk import (
    FRAME_PULLS_MAX,
    IDLE_PEER_S,
    PEERS_MAX,
    PEERS_OF_ONE_MAX,
)
from kvferry_daemon.core.tenants import Tenancy
from kvferry_proto import peer, worker
from kvferry_proto.peer import PeerHello
from kvferry_proto.states import TERMINAL, Role, State
from world import Machine, World, layout

WINDOW = 8


def test_a_daemon_that_stood_still_blames_nobody() -> None:
    """Beats and answers of that time lie unread in its sockets when its timers run."""
    story = Story(3 * WINDOW)
    story.open()
    story.produce()
    story.world.wait(0.5)
    before = story.sink().sent_tokens
    assert before == WINDOW
    story.world.now_s += 90.0  # every daemon stops; all deadlines would be over
    for name in ("a", "b"):
        story.world.feed(name, out.TimePassed())
        node = story.world.machines[name].node
        assert not any(session.lost for session in node.sessions.values())
        assert all(peer.state == "up" for peer in node.sinks.peers.values())
        assert not any(t.state in TERMINAL for t in node.transfers.values())
    story.world.beat()
    end = story.run()
    story.check(end)


def test_no_moment_to_fall_asleep_at_costs_a_worker_its_transfers() -> None:
    """What the daemon slept for was a worker's silence, as far as no sweep had been due."""
    timing = Timing(lost_s=1.5, heartbeat_s=0.4)
    for tenths in range(12):
        world = World()
        settings = replace(world.machines["a"].node.settings, timing=timing)
        world.machines = {"a": Machine(Node(settings, world._secret, 1, 0.0))}
        world.hello("a", SOURCE)
        world.call("a", SOURCE, worker.Send(transfer_id="t"))
        world.wait(tenths / 10)
        world.beat()
        world.wait(0.4)
        world.now_s += 1.3  # stopped
        world.feed("a", out.TimePassed())
        world.beat()
        assert world.snapshot("a", SOURCE, Role.SOURCE).state not in TERMINAL


def test_time_that_passes_turn_by_turn_is_silence() -> None:
    story = Story(3 * WINDOW)
    story.open()
    for _ in range(5):
        story.world.wait(1)  # nobody beats
    assert story.source().state is State.FAILED


def test_a_link_that_was_dropped_for_being_idle_moves_data_again() -> None:
    """Its connections began at number 0 again, which the source took for old messages."""
    story = Story(WINDOW)
    story.open()
    story.check(story.run())
    for _ in range(int(IDLE_PEER_S) + 5):
        story.world.wait(1)
        story.world.beat()
    assert story.world.machines["b"].node.sinks.peers == {}
    story.attempt, story.read = 1, []
    story.open()
    story.check(story.run())


def test_one_source_by_two_names_is_two_links() -> None:
    world = World()
    world.hello("b", SINK)
    for number, address in enumerate(("tcp://a:1", "tcp://a.:1")):
        call = worker.Receive(transfer_id=f"t{number}", source=address)
        assert isinstance(world.call("b", SINK, call), worker.Snapshots)
    links = world.machines["b"].node.sinks.peers.values()
    assert len({peer.our_boot_id for peer in links}) == 2


def link(world: World, user: str, host: str) -> Any:
    """A worker of that user names a source, and gives up; what it is told."""
    route = user.encode()
    call = worker.Receive(transfer_id=f"{host}-{user}", source=f"tcp://{host}:1")
    answer = world.call("b", route, call, user)
    world.call("b", route, worker.Abort(transfer_id=call.transfer_id, role=Role.SINK), user)
    return answer


def test_sources_are_bounded() -> None:
    world = World()
    users = [f"7:7:{pid}" for pid in range(1, PEERS_MAX // PEERS_OF_ONE_MAX + 2)]
    for user in users:
        world.hello("b", user.encode(), user=user)
    for number in range(PEERS_MAX):
        answer = link(world, users[number // PEERS_OF_ONE_MAX], f"host{number}")
        assert isinstance(answer, worker.Snapshots), (number, answer)
    assert link(world, users[-1], "one-more").error.code == "resource_exhausted"
    assert isinstance(link(world, users[-1], "host7"), worker.Snapshots)


@pytest.mark.parametrize(
    ("tenancy", "others"), [("off", {"7:7:0": False, "7:7:2": True}), ("uid", {"7:7:2": False})]
)
def test_sources_of_one_leave_room_for_others(tenancy: Tenancy, others: dict[str, bool]) -> None:
    """One process, in whatever sessions; with tenants, one user in whatever processes."""
    world = World()
    node = world.machines["b"].node
    node.settings = replace(
        node.settings, workers_max=100, tenancy=tenancy, tenant_budget_bytes=1 << 20
    )
    first = "7:7:1" if tenancy == "uid" else "7:7:0"
    for user in ("7:7:1", "7:7:2", "7:7:0", "8:7:0", "8:7:1"):
        world.hello("b", user.encode(), user=user)
    for number in range(PEERS_OF_ONE_MAX):
        assert isinstance(link(world, first, f"host{number}"), worker.Snapshots)
    for user, fits in {**others, first: False, "8:7:0": True, "8:7:1": True}.items():
        answer = link(world, user, f"more{user.replace(':', '')}")
        assert isinstance(answer, worker.Snapshots) is fits, (user, answer)
    world.wait(2 * IDLE_PEER_S)
    assert isinstance(link(world, first, "later"), worker.Snapshots)
    assert len(node.sinks.linked_for) == len(node.sinks.peers)


def test_timers_of_polls_that_were_answered_do_not_pile_up() -> None:
    story = Story(WINDOW)
    story.open()
    node = story.world.machines["a"].node
    for tokens in range(1, WINDOW + 1):
        watched = worker.Watched(role=Role.SOURCE, transfer_id="t", after=story.source().snapshot)
        for _ in range(500):
            call = worker.Poll(transfers=[watched], wait_s=60)
            assert story.world.call("a", SOURCE, call) is None
        story.ready(tokens)
        assert len(node.polls) == 0
        story.world.machines["a"].inbox[SOURCE].clear()
    assert len(node.timers) < 1000


def test_a_lock_that_belongs_to_a_session_is_nobody_elses() -> None:
    """A worker that came back under the name of its dead self would hide its own death."""
    world = World()
    world.hello("a", SOURCE)
    call = worker.Hello(lock=f"lock{SOURCE.hex()}", layout=layout())
    reply = None
    for effect in world.machines["a"].node.handle(
        out.WorkerCalled(b"another connection", call, lock_held=True), 0.0
    ):
        reply = getattr(effect, "reply", None)
    assert isinstance(reply, worker.Failure)
    assert reply.error.code == "worker_not_locked"


def test_many_transfers_that_are_due_at_once_are_worked_off_in_turns() -> None:
    """Two thousand of them held the event loop up for a second."""
    world = World(blocks=400)
    world.hello("b", SINK)
    for number in range(90):
        world.call("b", SINK, worker.Receive(transfer_id=f"t{number}", source="tcp://a:1"))
    world.machines["a"].node.sources.unmet.most = 0  # it promises nothing, so all ask again
    world.wait(0.1)
    node = world.machines["b"].node
    world.now_s += 1.5
    node._sweep_at_s = world.now_s + 1.0  # it is no sleep
    turns: list[int] = []
    asked: set[str] = set()
    while node.wake_at_s <= world.now_s:
        pulls = [
            effect.message.pulls
            for effect in node.handle(out.TimePassed(), world.now_s)
            if isinstance(effect, Say) and isinstance(effect.message, peer.Pulls)
        ]
        assert all(len(frame) <= FRAME_PULLS_MAX for frame in pulls)
        turns.append(sum(len(frame) for frame in pulls))
        asked |= {pull.transfer_id for frame in pulls for pull in frame}
    assert 1 < max(turns) <= 50
    assert len(asked) == 90


@pytest.mark.parametrize(("stall_s", "ends_s"), [(None, 60), (5.0, 5), (120.0, 120)])
def test_a_transfer_may_have_deadlines_of_its_own(stall_s: float | None, ends_s: int) -> None:
    world = World()
    for role, call in (
        (Role.SOURCE, worker.Send(transfer_id="t", stall_s=stall_s)),
        (Role.SINK, worker.Receive(transfer_id="t", source="tcp://c:1", stall_s=stall_s)),
    ):
        where = "a" if role is Role.SOURCE else "b"
        world.hello(where, SOURCE)
        world.call(where, SOURCE, call)
        world.machines[where].node.sinks.peers.clear()  # nobody is there, and nobody says so
    for second in range(1, ends_s + 3):
        world.wait(1)
        world.beat()
        for role, where in ((Role.SOURCE, "a"), (Role.SINK, "b")):
            seen = world.snapshot(where, SOURCE, role)
            if second < ends_s - 1:
                assert seen.state not in TERMINAL
            elif second > ends_s + 1:
                assert seen.error is not None
                assert seen.error.code == "stalled"


def test_a_lease_of_its_own_ends_a_source_that_nobody_asks() -> None:
    story = Story(3 * WINDOW)
    call = worker.Send(transfer_id="t", lease_s=5.0)
    story.world.call("a", SOURCE, call)
    story.open_sink()
    story.world.wait(0.1)
    for second in range(1, 8):
        story.world.now_s += 1
        story.world.feed("a", out.TimePassed())  # the sink's daemon says nothing more
        story.world.beat()
        error = story.source().error
        assert (error is not None) == (second >= 5), (second, error)
    assert error is not None
    assert error.code == "lease_expired"


def test_a_source_whose_sink_has_nothing_to_ask_lives_by_its_pings() -> None:
    story = Story(3 * WINDOW)
    story.world.call("a", SOURCE, worker.Send(transfer_id="t", lease_s=5.0))
    story.open_sink()
    story.world.wait(0.1)
    before = story.world.machines["a"].node.counters["pulls_received"]
    for _ in range(12):
        story.world.wait(1)
        story.world.beat()
    assert story.source().error is None
    assert story.world.machines["a"].node.counters["pulls_received"] == before  # none was needed


def waiting_sinks(world: World, count: int) -> int:
    """Let sinks ask for what their source has not heard of; return how many pulls it has got."""
    world.hello("a", SOURCE)
    world.hello("b", SINK)
    for number in range(count):
        world.call("b", SINK, worker.Receive(transfer_id=f"t{number}", source="tcp://a:1"))
    world.wait(0.1)
    return world.machines["a"].node.counters["pulls_received"]


def beat(world: World, seconds: int) -> None:
    """Let time pass with both workers alive."""
    for _ in range(seconds):
        world.wait(1)
        for name, route in (("a", SOURCE), ("b", SINK)):
            world.call(name, route, worker.Heartbeat())


def test_a_source_that_has_not_come_is_asked_for_once_a_lease() -> None:
    """A thousand sinks that waited asked five hundred times a second."""
    world = World(blocks=400)
    before = waiting_sinks(world, 20)
    beat(world, 29)
    assert world.machines["a"].node.counters["pulls_received"] == before
    beat(world, 2)
    assert world.machines["a"].node.counters["pulls_received"] == before + 20


def test_a_source_that_comes_tells_those_who_asked_also_if_the_news_are_lost() -> None:
    world = World()
    waiting_sinks(world, 1)
    beat(world, 10)
    world.call("a", SOURCE, worker.Send(transfer_id="t0", total_tokens=4))
    world.wire.clear()  # what it tells them
    beat(world, 2)
    assert world.snapshot("b", SINK, Role.SINK, "t0").total_tokens == 4


def test_who_asks_early_is_kept_for_as_long_as_he_asks() -> None:
    """The table must not be full of those who have gone."""
    world = World()
    node = world.machines["a"].node
    world.hello("a", SOURCE)
    world.hello("b", SINK)
    for name in ("ends", "stays", "vanishes"):
        call = worker.Receive(transfer_id=name, source="tcp://a:1", stall_s=600)
        world.call("b", SINK, call)
    beat(world, 1)
    world.call("b", SINK, worker.Abort(transfer_id="ends", role=Role.SINK))
    world.wait(0.1)
    assert len(node.sources.unmet) == 2
    sinks, gone = world.machines["b"].node, Key(Role.SINK, "vanishes", 0)
    del sinks.transfers[gone]
    sinks.census.gone(gone)
    beat(world, 64)
    assert len(node.sources.unmet) == 1


def test_those_for_whom_a_source_has_no_room_ask_again_soon() -> None:
    world = World(blocks=400)
    world.machines["a"].node.sources.unmet.most = 5
    before = waiting_sinks(world, 20)
    beat(world, 8)
    asked = world.machines["a"].node.counters["pulls_received"] - before
    assert 15 * 4 <= asked <= 15 * 8  # after 0.2, 0.4, ... and then every 2 s
    assert len(world.machines["a"].node.sources.unmet) == 5


def test_news_that_were_lost_are_asked_for_after_the_next_beat() -> None:
    story = Story(2 * WINDOW)
    story.open()
    story.world.wait(0.1)
    story.produce()
    story.world.wire.clear()  # what the source tells its sink
    story.world.wait(2)
    assert story.sink().sent_tokens == WINDOW
    assert story.world.machines["b"].node.counters["news_lost"] == 1


def test_a_hello_that_comes_late_does_not_hide_that_news_are_lost() -> None:
    """It was said twice, and what it is answered gets lost: the source must not count anew."""
    story = Story(2 * WINDOW)
    story.open()
    story.world.wait(0.1)
    [peer] = story.world.machines["b"].node.sinks.peers.values()
    story.world.feed("a", out.SinkSaid(b"b", peer.hello))
    story.world.wire.clear()
    story.produce()
    story.world.wire.clear()
    story.world.wait(2)
    assert story.sink().sent_tokens == WINDOW


def test_a_sink_that_its_source_had_to_forget_asks_for_what_it_was_not_told() -> None:
    story = Story(2 * WINDOW)
    story.open()
    story.world.wait(0.1)
    for number in range(SINKS_MAX):
        other = PeerHello(boot_id=f"f{number:031x}", daemon_id=f"{number:032x}", life=1)
        story.world.feed("a", out.SinkSaid(b"b", other))
    story.world.wire.clear()
    story.produce()
    assert story.world.wire == []  # nobody is there to tell it
    story.world.wait(2.5)
    assert story.sink().sent_tokens == WINDOW


def test_a_hold_of_its_own_quarantines_what_is_not_released() -> None:
    story = Story(WINDOW // 2, late=False)
    story.open_source()
    call = worker.Receive(transfer_id="t", source="tcp://a:1", hold_s=5.0)
    story.world.call("b", SINK, call)
    assert story.run().state is State.SUCCESS
    pool = next(iter(story.world.machines["b"].node.books.values())).pool
    for second in range(1, 8):
        assert (pool.quarantined_blocks > 0) == (second > 5)
        story.world.wait(1)
        story.world.beat()


@pytest.mark.parametrize(
    ("asked", "limits"),
    [
        ({"stall_s": 3601.0}, "stall_s 3601 is not between 0 and 3600"),
        ({"lease_s": 1.9}, "lease_s 1.9 is not between 2 and 3600"),
    ],
)
def test_deadlines_beyond_the_limits_are_refused(asked: dict[str, float], limits: str) -> None:
    world = World()
    world.hello("a", SOURCE)
    reply = world.call("a", SOURCE, worker.Send(transfer_id="t", **asked))  # type: ignore[arg-type]
    assert (reply.error.code, limits in reply.error.message) == ("bad_deadline", True)
    assert not world.machines["a"].node.transfers
