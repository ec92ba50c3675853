"""Groups: ranks that poll at different moments, and never disagree."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from kvferry_daemon.core import outside as out
from kvferry_proto import worker
from kvferry_proto.states import TERMINAL, Mode, Role, StallReason, State
from world import BLOCK, World, layout

WINDOW = 2 * BLOCK
TAKE = (StallReason.WAITING_FOR_RESUME, StallReason.WAITING_FOR_BLOCKS)
Name = tuple[int, int]  # rank, token


@dataclass
class Group:
    """The workers of both sides of one transfer, and what each decode worker has read."""

    ranks: int = 2
    total: int = 5 * BLOCK + 1
    world: World = field(default_factory=lambda: World(blocks=16, window_tokens=WINDOW))
    name: str = "t"
    handoff: bool = False
    whole: bool = False
    read: dict[int, list[Name]] = field(default_factory=dict)
    windows: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.where = {Role.SOURCE: "b" if self.handoff else "a", Role.SINK: "b"}
        for rank in range(self.ranks):
            self.read[rank], self.windows[rank] = [], []
            for role in Role:
                if self.route(role, rank) not in self.world.machines[self.where[role]].inbox:
                    self.world.hello(self.where[role], self.route(role, rank))

    def route(self, role: Role, rank: int) -> bytes:
        return f"{role} {rank}".encode()

    def call(self, side: Role, number: int, kind: type[Any], /, **more: Any) -> Any:
        call = kind(transfer_id=self.name, **({"rank": number} | more))
        return self.world.call(self.where[side], self.route(side, number), call)

    def open(self, role: Role, rank: int, /, **more: Any) -> Any:
        if role is Role.SOURCE:
            return self.call(role, rank, worker.Send, **({"world_size": self.ranks} | more))
        named = {
            "source": None if self.handoff else "tcp://a:1",
            "world_size": self.ranks,
            "mode": Mode.WHOLE if self.whole else Mode.CONSUME,
            "max_tokens": self.total if self.whole else None,
        }
        return self.call(role, rank, worker.Receive, **(named | more))

    def open_all(self) -> None:
        for role in Role:
            for rank in range(self.ranks):
                assert isinstance(self.open(role, rank), worker.Snapshots)

    def poll(self, role: Role, rank: int, after: int = -1) -> worker.Snapshot | None:
        watched = worker.Watched(role=role, transfer_id=self.name, rank=rank, after=after)
        poll = worker.Poll(transfers=[watched])
        reply = self.world.call(self.where[role], self.route(role, rank), poll)
        assert not reply.refused, reply
        return reply.transfers[0] if reply.transfers else None

    def now(self, role: Role, rank: int) -> worker.Snapshot:
        seen = self.poll(role, rank)
        assert seen is not None
        return seen

    def settle(self) -> None:
        """Let all that is under way arrive, while every decode worker polls."""
        for _ in range(10):
            self.world.wait(0.05)
            for rank in range(self.ranks):
                self.poll(Role.SINK, rank, self.now(Role.SINK, rank).snapshot)

    def produce(self, rank: int, up_to: int | None = None, total: int | None = None) -> Any:
        """A prefill worker fills its window and marks it ready."""
        seen = self.now(Role.SOURCE, rank)
        end = min(self.total if up_to is None else up_to, seen.base_tokens + seen.allocated_tokens)
        end = max(end, seen.available_tokens)
        if seen.state in TERMINAL:
            return None
        for token, (block, index) in self.world.slots(self.where[Role.SOURCE], seen):
            if seen.available_tokens <= token < end:
                self.world.block(self.where[Role.SOURCE], block)[index] = ("t", rank, token)
        told = self.total if end == self.total else None
        return self.call(
            Role.SOURCE, rank, worker.Ready, ready_tokens=end, total_tokens=total or told
        )

    def consume(self, rank: int, seen: worker.Snapshot) -> None:
        """A decode worker takes over what it must, and resumes."""
        first = len(self.read[rank])
        if seen.sent_tokens > first and (seen.stall in TAKE or seen.state in TERMINAL):
            for token, (block, index) in self.world.slots("b", seen):
                if first <= token < seen.sent_tokens:
                    name = self.world.block("b", block)[index]
                    assert name is not None
                    self.read[rank].append((name[1], name[2]))
            self.windows[rank].append(seen.sent_tokens)
            if seen.state not in TERMINAL:
                self.resume(rank, seen.sent_tokens)

    def resume(self, rank: int, at: int) -> Any:
        return self.call(Role.SINK, rank, worker.Resume, sent_tokens=at)

    def run(self, every: tuple[int, ...], steps: int = 600) -> None:
        """Rank r's decode worker polls in every ``every[r]``-th step only."""
        numbers = dict.fromkeys(range(self.ranks), -1)
        states: dict[int, State] = {}
        for step in range(steps):
            self.world.wait(0.01)
            for rank in range(self.ranks):
                self.produce(rank)
                if step % every[rank]:
                    continue
                seen = self.poll(Role.SINK, rank, numbers[rank])
                if seen is not None:
                    numbers[rank] = seen.snapshot
                    states[rank] = seen.state
                    self.consume(rank, seen)
            if len(states) == self.ranks and set(states.values()) <= TERMINAL:
                return
        raise AssertionError([self.now(role, 0) for role in Role])

    def check(self) -> None:
        """Each rank has read its own tokens, in the same steps, and every block comes back."""
        for rank in range(self.ranks):
            assert self.read[rank] == [(rank, token) for token in range(self.total)]
            assert self.windows[rank] == self.windows[0]
        for role in Role:
            for rank in range(self.ranks):
                self.call(role, rank, worker.Release, role=role)
        self.world.wait(1)
        assert self.world.blocks_free("a")
        assert self.world.blocks_free("b")


@pytest.mark.parametrize("handoff", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("every", [(1, 1), (1, 7), (5, 1, 3)])
def test_ranks_that_poll_at_different_moments_take_the_same(
    every: tuple[int, ...], whole: bool, handoff: bool
) -> None:
    world = World(blocks=40, window_tokens=WINDOW)
    group = Group(ranks=len(every), world=world, whole=whole, handoff=handoff)
    group.open_all()
    group.run(every)
    group.check()
    assert (len(group.windows[0]) > 1) is not whole


def test_a_step_is_shown_to_all_before_the_next_one_to_any() -> None:
    group = Group()
    group.open_all()
    for rank in range(2):
        group.produce(rank)
    group.settle()
    first = group.now(Role.SINK, 0)
    assert (first.sent_tokens, first.stall) == (WINDOW, StallReason.WAITING_FOR_RESUME)
    group.consume(0, first)
    for rank in range(2):
        group.produce(rank)
    group.world.wait(0.5)
    again = group.now(Role.SINK, 0)
    assert (again.sent_tokens, again.stall, again.base_tokens) == (WINDOW, first.stall, 0)
    other = group.now(Role.SINK, 1)
    assert (other.snapshot, other.sent_tokens) == (again.snapshot, WINDOW)
    assert other.runs != again.runs
    group.consume(1, other)
    group.settle()
    assert group.now(Role.SINK, 0).sent_tokens == 2 * WINDOW


def test_success_waits_for_those_who_have_a_step_to_take_and_no_longer_than_the_hold() -> None:
    group = Group(total=BLOCK)
    group.open_all()
    group.settle()
    for rank in range(2):
        group.produce(rank)
    group.world.wait(0.5)
    for _ in range(5):  # rank 1 does not poll
        seen = group.now(Role.SINK, 0)
        group.poll(Role.SINK, 0, seen.snapshot)
    assert (seen.state, seen.sent_tokens) != (State.SUCCESS, BLOCK)
    for _ in range(61):
        group.world.wait(1)
        group.world.beat()
    assert group.now(Role.SINK, 0).state is State.SUCCESS


def test_a_resume_of_one_rank_frees_nothing_and_one_ahead_of_what_was_shown_is_refused() -> None:
    group = Group()
    group.open_all()
    for rank in range(2):
        group.produce(rank)
    group.settle()
    held = group.now(Role.SINK, 0).runs
    reply = group.resume(0, WINDOW)
    assert reply.transfers[0].runs == held
    assert group.resume(0, WINDOW).transfers[0].runs == held  # repeated
    ahead = group.resume(1, WINDOW + 1)
    assert (ahead.error.code, str(WINDOW) in ahead.error.message) == ("resume_ahead", True)
    assert group.resume(1, BLOCK).transfers[0].base_tokens == BLOCK
    assert group.resume(1, WINDOW).transfers[0].base_tokens == WINDOW


def test_nothing_moves_before_all_have_come_and_who_does_not_is_named() -> None:
    group = Group(ranks=3)
    for role in Role:
        for rank in (0, 2):
            group.open(role, rank)
    for _ in range(59):
        group.world.wait(1)
        group.world.beat()
        assert not group.now(Role.SOURCE, 0).runs
    group.world.wait(2)
    for role in Role:
        seen = group.now(role, 2)
        assert seen.state is State.FAILED
        assert seen.error is not None
    error = group.now(Role.SOURCE, 0).error
    assert error is not None
    assert (error.code, "of 3 ranks, 1 did not come" in error.message) == ("rank_missing", True)
    late = group.open(Role.SOURCE, 1).transfers[0]  # it comes after all, and hears how it ended
    assert (late.state, late.rank, late.runs) == (State.FAILED, 1, [])


@pytest.mark.parametrize("role", Role)
def test_one_failure_fails_all(role: Role) -> None:
    group = Group()
    group.open_all()
    group.produce(0)
    group.produce(1)
    group.settle()
    group.call(role, 1, worker.Abort, role=role, reason="enough")
    group.world.wait(1)
    for side in Role:
        for rank in range(2):
            seen = group.now(side, rank)
            assert seen.state is State.FAILED
            assert seen.error is not None
            assert f"{role}, rank 1" in seen.error.message
    for side in Role:
        group.call(side, 0, worker.Release, role=side)
    group.world.wait(3)
    assert not group.world.blocks_free(group.where[role]), "rank 1 may still touch its blocks"
    for side in Role:
        group.call(side, 1, worker.Release, role=side)
    group.world.wait(3)
    assert group.world.blocks_free("a")
    assert group.world.blocks_free("b")


def test_a_dead_rank_fails_all_and_frees_nobody_elses_blocks() -> None:
    group = Group()
    group.open_all()
    group.produce(0)
    node = group.world.machines["a"].node
    session = node.workers.session_at(group.route(Role.SOURCE, 1), "")
    assert session is not None
    group.world.feed("a", out.LockDropped(session.secret))
    seen = group.now(Role.SOURCE, 0)
    assert seen.error is not None
    assert (seen.error.code, "rank 1 of 2" in seen.error.message) == ("worker_lost", True)
    assert seen.runs, "rank 0 still has its blocks"
    assert not group.world.blocks_free("a")
    group.call(Role.SOURCE, 0, worker.Release, role=Role.SOURCE)
    assert group.world.blocks_free("a")


def test_totals_that_differ_fail_all_with_both_numbers() -> None:
    group = Group(total=6)
    group.open_all()
    group.produce(0)
    seen = group.produce(1, up_to=5, total=5).transfers[0]
    assert seen.error.code == "total_mismatch"
    assert "rank 1 says 5 tokens in all, rank 0 said 6" in seen.error.message
    assert group.now(Role.SOURCE, 0).error == seen.error


def test_a_total_below_what_another_rank_has_fails_all() -> None:
    group = Group(total=8)
    group.open_all()
    group.produce(0, up_to=7)
    seen = group.produce(1, up_to=5, total=5).transfers[0]
    assert seen.error.code == "total_mismatch"
    assert "rank 0 has 7 tokens ready, but they are 5 in all" in seen.error.message


def test_a_rank_that_has_not_told_its_total_may_still_write_behind_the_others_end() -> None:
    group = Group(total=2 * BLOCK)
    group.open_all()
    group.produce(0, up_to=BLOCK, total=BLOCK)
    seen = group.now(Role.SOURCE, 1)
    assert (seen.total_tokens, seen.allocated_tokens) == (BLOCK, WINDOW)
    group.produce(1, up_to=BLOCK, total=BLOCK)
    assert group.now(Role.SOURCE, 1).allocated_tokens == BLOCK


@pytest.mark.parametrize("role", Role)
def test_ranks_that_cannot_be(role: Role) -> None:
    group = Group()
    assert group.open(role, 1, rank=2).error.code == "bad_rank"
    group.open(role, 0)
    before = group.now(role, 0)
    taken = group.open(role, 1, rank=0)  # the worker of rank 1 says that it is rank 0
    assert taken.error.code == "rank_taken"
    assert "rank 0" in taken.error.message
    differs = group.open(role, 1, world_size=4)
    assert differs.error.code == "group_differs"
    assert "world_size was 2, now 4" in differs.error.message
    assert group.call(role, 1, worker.Release, role=role).error.code == "unknown_transfer"
    where = group.where[role]
    group.world.hello(where, b"mixed", layout(block=2 * BLOCK))
    kind: type[Any] = worker.Send if role is Role.SOURCE else worker.Receive
    more = {} if role is Role.SOURCE else {"source": "tcp://a:1"}
    call = kind(transfer_id="t", rank=1, world_size=2, **more)
    mixed = group.world.call(where, b"mixed", call)
    assert mixed.error.code == "group_differs"
    assert "block_size_tokens: 4 and 8" in mixed.error.message
    assert group.now(role, 0) == before
    assert isinstance(group.open(role, 1), worker.Snapshots)
    assert isinstance(group.open(role, 1), worker.Snapshots)  # the same again


def test_a_group_with_another_source_is_refused() -> None:
    group = Group()
    group.open(Role.SINK, 0)
    differs = group.open(Role.SINK, 1, source="tcp://c:1")
    assert differs.error.code == "group_differs"
    assert "source was tcp://a:1, now tcp://c:1" in differs.error.message


def test_groups_that_want_the_same_blocks_all_end() -> None:
    """Two ranks each, and room for one window: who has a block of one rank has one of the other."""
    world = World(blocks=8, window_tokens=WINDOW)
    groups = [Group(world=world, name=name) for name in ("t", "u", "v")]
    for group in groups:
        group.open_all()
    left = list(groups)
    for _ in range(600):
        world.wait(0.01)
        for group in list(left):
            for rank in range(2):
                group.produce(rank)
                held = [len(group.now(role, one).runs) > 0 for role in Role for one in range(2)]
                assert held[0] == held[1]
                assert held[2] == held[3]
                seen = group.now(Role.SINK, rank)
                group.poll(Role.SINK, rank, seen.snapshot)
                group.consume(rank, seen)
            if all(len(group.read[rank]) == group.total for rank in range(2)):
                for role in Role:
                    for rank in range(2):
                        group.call(role, rank, worker.Release, role=role)
                left.remove(group)
        world.beat()
        if not left:
            break
    for group in groups:
        group.check()
