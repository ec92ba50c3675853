"""Rates and crowds: what is over a bound is refused, and nothing grows."""

from dataclasses import replace

import pytest

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allowance import NAMES_MAX, Allowances
from kvferry_daemon.core.crowd import ANYBODY, BAR_S, MANY, Bounds, Crowd
from kvferry_daemon.core.tenants import Tenancy
from kvferry_daemon.core.welcome import SESSIONS_OF_ONE_MAX, TENANT_SHARE
from kvferry_proto import worker
from world import World, layout


def test_a_second_of_them_may_come_at_once_and_then_no_faster_than_they_grow_back() -> None:
    rates = Allowances(10)
    assert [rates.wait_s("a", 5.0) for _ in range(10)] == [0.0] * 10
    assert rates.wait_s("a", 5.0) == pytest.approx(0.1)
    assert rates.wait_s("b", 5.0) == 0.0  # each has its own
    assert rates.wait_s("a", 5.05) == pytest.approx(0.05)  # to ask does not cost
    assert rates.wait_s("a", 5.11) == 0.0
    assert rates.wait_s("a", 5.11) > 0
    assert [rates.wait_s("a", 99.0) for _ in range(11)].count(0.0) == 10  # not saved up


def test_what_was_worth_more_delays_the_next_one() -> None:
    rates = Allowances(10)
    assert rates.wait_s("a", 0.0) == 0.0
    rates.owe("a", 19)  # of ten that there were, one taken
    assert rates.wait_s("a", 0.0) == pytest.approx(1.1)
    assert rates.wait_s("a", 1.0) == pytest.approx(0.1)
    assert rates.wait_s("a", 1.11) == 0.0


def test_names_are_bounded() -> None:
    rates = Allowances(1)
    for name in range(3 * NAMES_MAX):
        rates.wait_s(name, 0.0)
    assert len(rates._left) <= NAMES_MAX


def a_crowd(**bounds: float) -> Crowd:
    wide = {"at_once": 100, "of_one": 100, "a_s": 1000.0, "of_one_a_s": 1000.0}
    return Crowd(Bounds(**{**wide, **bounds}))  # type: ignore[arg-type]


def test_connections_of_one_and_of_all_are_bounded() -> None:
    crowd = a_crowd(at_once=3, of_one=2)
    assert [crowd.arrived(n, "a", 0.0) for n in (1, 2)] == ["", ""]
    assert crowd.arrived(3, "a", 0.0) == "a: over 2 connections at once"
    assert crowd.arrived(4, "b", 0.0) == ""
    assert crowd.arrived(5, "c", 0.0) == "over 3 connections at once"
    assert crowd.inside == {1: "a", 2: "a", 4: "b"}
    crowd.left(1)
    crowd.left(3)  # was never in
    assert crowd.arrived(6, "a", 0.0) == ""
    assert len(crowd) == 3


def test_a_number_that_is_given_out_again_was_left_before() -> None:
    crowd = a_crowd(of_one=1)
    assert crowd.arrived(1, "a", 0.0) == ""
    assert crowd.arrived(1, "a", 0.0) == ""
    crowd.left(1)
    assert len(crowd) == 0
    assert not crowd._counts


def test_connections_a_second_are_bounded() -> None:
    crowd = a_crowd(a_s=3, of_one_a_s=2)
    told = [crowd.arrived(n, source, 0.0) for n, source in enumerate("aaabb")]
    assert told == [
        "",
        "",
        "a: over 2 connections a second",
        "",
        "over 3 connections a second",
    ]
    assert crowd.arrived(9, "a", 1.0) == ""


def test_who_is_not_known_has_only_the_bounds_of_all() -> None:
    crowd = a_crowd(of_one=1, of_one_a_s=1)
    assert [crowd.arrived(n, ANYBODY, 0.0) for n in range(5)] == [""] * 5


def test_processes_of_one_user_that_have_no_number_may_have_half_of_all() -> None:
    """Workers in pods of their own are many; but one of them must not keep other users out."""
    crowd, pods, others = a_crowd(at_once=8, of_one=2), f"{MANY}1000", f"{MANY}1001"
    told = [crowd.arrived(number, pods, 0.0) for number in range(5)]
    assert told == ["", "", "", "", f"{pods}: over 4 connections at once"]
    assert [crowd.arrived(10 + number, others, 0.0) for number in range(4)] == [""] * 4
    crowd = a_crowd(a_s=6, of_one_a_s=1)
    assert [bool(crowd.arrived(number, pods, 0.0)) for number in range(4)] == [False] * 3 + [True]
    assert crowd.arrived(9, others, 0.0) == ""
    crowd.bar(pods, 0.0)
    assert crowd.arrived(10, pods, 1.0) == f"{pods}: has to stay away for {BAR_S:g} s"
    assert crowd.arrived(11, others, 1.0) == ""


def test_who_was_thrown_out_stays_away_for_a_while() -> None:
    crowd = a_crowd()
    assert [crowd.arrived(1, "a", 0.0), crowd.arrived(2, ANYBODY, 0.0)] == ["", ""]
    crowd.bar("a", 0.0)
    crowd.bar(ANYBODY, 0.0)  # nobody knows who that is
    assert crowd.arrived(3, "a", BAR_S - 1) == f"a: has to stay away for {BAR_S:g} s"
    assert [crowd.arrived(4, "b", BAR_S - 1), crowd.arrived(5, ANYBODY, BAR_S - 1)] == ["", ""]
    assert crowd.arrived(6, "a", BAR_S) == ""
    assert not crowd._barred


def joins(world: World, user: str, number: int) -> bool:
    """Whether one more session of that user comes into being, over whatever connection."""
    node = world.machines["a"].node
    hello = worker.Hello(lock=f"{user.replace(':', '-')}-{number}", layout=layout())
    route = f"{user} {number}".encode()
    before = len(node.sessions)
    for _ in range(2):  # the same hello again is the same session, and none too many
        world.feed("a", out.WorkerCalled(route, hello, lock_held=True, user=user))
    reply = world.machines["a"].inbox[route].pop()
    if isinstance(reply, worker.Welcome):
        return len(node.sessions) == before + 1
    assert reply.error.code == "resource_exhausted"
    assert reply.error.retry_after_s is not None
    return False


def crowded(tenancy: Tenancy) -> World:
    world = World()
    node = world.machines["a"].node
    node.settings = replace(
        node.settings, workers_max=1024, tenancy=tenancy, tenant_budget_bytes=1 << 20
    )
    return world


def test_sessions_of_one_process_leave_room_for_others() -> None:
    """Of a process in another PID namespace the kernel tells the user only."""
    world = crowded("off")
    for user in ("7:7:1", "7:7:0"):
        assert all(joins(world, user, number) for number in range(SESSIONS_OF_ONE_MAX))
        assert not joins(world, user, SESSIONS_OF_ONE_MAX)
    assert not joins(world, "7:8:0", 0)
    assert joins(world, "7:7:2", 0)
    assert joins(world, "8:7:0", 0)


def test_hellos_of_one_process_that_wait_for_a_pool_leave_room_for_others() -> None:
    """It may go by one connection after another meanwhile."""
    node = crowded("off").machines["a"].node

    def refused(user: str, number: int) -> bool:
        hello = worker.Hello(lock=f"lock{number}", layout=layout())
        called = out.WorkerCalled(f"{user} {number}".encode(), hello, lock_held=True, user=user)
        return any(isinstance(one, out.ToWorker) for one in node.handle(called, 0.0))

    assert not any(refused("7:7:1", number) for number in range(SESSIONS_OF_ONE_MAX))
    assert not refused("7:7:1", 0)  # said again
    assert refused("7:7:1", SESSIONS_OF_ONE_MAX)
    assert not refused("7:7:2", SESSIONS_OF_ONE_MAX + 1)


def test_sessions_of_one_tenant_leave_room_for_others() -> None:
    world = crowded("uid")
    most = 1024 // TENANT_SHARE
    assert [joins(world, f"7:7:{n // 100 + 1}", n) for n in range(most + 1)].count(True) == most
    assert joins(world, "8:7:9", 0)
