"""Groups: ranks that come too late, or with what cannot be, leave nothing behind."""

import pytest

from core.test_groups import Group
from kvferry_daemon.core import outside as out
from kvferry_proto import worker
from kvferry_proto.states import Role, State
from world import World, layout


def with_aux() -> Group:
    world = World(blocks=16)
    for rank in range(2):
        world.hello("a", f"{Role.SOURCE} {rank}".encode(), layout(aux=("first",)))
    return Group(world=world)


def test_a_rank_that_is_refused_has_not_come() -> None:
    group = with_aux()
    group.open(Role.SOURCE, 0)
    before = group.now(Role.SOURCE, 0)
    refused = group.open(Role.SOURCE, 1, aux={"another": 1})
    assert refused.error.code == "aux_missing"
    group.world.wait(0.1)
    assert group.now(Role.SOURCE, 0) == before
    come = group.open(Role.SOURCE, 1, aux={"first": 7}).transfers[0]
    assert (come.rank, come.aux) == (1, {"first": 7})


def test_a_rank_may_not_say_another_total_when_it_says_send_again() -> None:
    group = Group()
    group.open(Role.SOURCE, 0, total_tokens=8)
    group.open(Role.SOURCE, 1, total_tokens=8)
    assert isinstance(group.open(Role.SOURCE, 1, total_tokens=8), worker.Snapshots)
    assert group.open(Role.SOURCE, 1, total_tokens=9).error.code == "total_changed"
    assert group.now(Role.SOURCE, 0).state is not State.FAILED


def test_a_rank_that_comes_as_the_others_give_up_is_not_kept() -> None:
    """Its call is read before the daemon has noticed how late it is."""
    group = Group()
    group.open(Role.SOURCE, 0)
    for _ in range(59):
        group.world.wait(1)
        group.world.beat()
    group.world.wait(0.9)
    group.world.now_s += 0.2  # no sleep, but late
    late = group.open(Role.SOURCE, 1).transfers[0]
    assert (late.state, late.error.code) == (State.FAILED, "rank_missing")
    node = group.world.machines["a"].node
    assert not node.transfers
    session = node.workers.session_at(group.route(Role.SOURCE, 1), "")
    assert session is not None
    assert not session.keys
    group.world.feed("a", out.LockDropped(session.secret))


def test_a_rank_that_never_was_is_shown_nothing_of_what_has_ended() -> None:
    group = Group(ranks=1)
    group.open(Role.SOURCE, 0)
    group.call(Role.SOURCE, 0, worker.Release, role=Role.SOURCE)
    group.world.hello("a", b"stranger")
    watched = worker.Watched(role=Role.SOURCE, transfer_id="t", rank=1)
    reply = group.world.call("a", b"stranger", worker.Poll(transfers=[watched]))
    assert not reply.transfers
    assert reply.refused[0].error.code == "unknown_transfer"


@pytest.mark.parametrize("teller", [0, 1])
def test_any_rank_may_tell_the_aux_values_before_it_releases(teller: int) -> None:
    """The last `ready` of another rank was refused, and that rank gave up a healthy group."""
    group = aux_group()
    for rank in (0, 1):
        told = group.call(Role.SOURCE, rank, worker.Ready, ready_tokens=4, total_tokens=4)
        assert isinstance(told, worker.Snapshots), told
    group.call(Role.SOURCE, 1 - teller, worker.Release, role=Role.SOURCE)
    group.call(Role.SOURCE, teller, worker.Ready, ready_tokens=4, total_tokens=4, aux={"first": 7})
    seen = group.now(Role.SOURCE, 0)
    assert (seen.state is State.FAILED, seen.aux) == (False, {"first": 7})
    assert group.world.machines["a"].node.transfers


def test_a_group_that_goes_without_telling_its_aux_values_has_failed() -> None:
    group = aux_group()
    for rank in (0, 1):
        group.call(Role.SOURCE, rank, worker.Ready, ready_tokens=4, total_tokens=4)
    for rank in (0, 1):
        last = group.call(Role.SOURCE, rank, worker.Release, role=Role.SOURCE).transfers[0]
    assert last.error.code == "aux_missing"
    assert "first" in last.error.message


def aux_group() -> Group:
    """Two ranks at the source whose layout has an aux value, with their blocks."""
    group = with_aux()
    for rank in range(2):
        group.open(Role.SOURCE, rank)
    group.world.wait(0.1)
    return group


def test_whatever_ends_a_group_names_the_ranks_that_had_not_come() -> None:
    group = Group(ranks=4)
    for rank in (1, 2):
        group.open(Role.SOURCE, rank)
    group.call(Role.SOURCE, 2, worker.Abort, role=Role.SOURCE, reason="enough")
    error = group.now(Role.SOURCE, 1).error
    assert error is not None
    assert error.message.endswith("enough; of 4 ranks, 0, 3 had not come")
