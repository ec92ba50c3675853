"""The status board as the node keeps it: what is written when, and whose a slot is."""

from dataclasses import replace
from typing import Any

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.boards import SLOTS
from kvferry_proto import worker
from kvferry_proto.board import slot_key
from kvferry_proto.states import Role, State
from world import BLOCK, World

WORKER = b"worker"


def opened(*transfer_ids: str) -> World:
    """A world whose worker at daemon a has opened source sides."""
    world = World()
    world.hello("a", WORKER)
    node = world.machines["a"].node
    node.settings = replace(node.settings, transfers_max=2 * SLOTS)
    for name in transfer_ids:
        world.call("a", WORKER, worker.Send(transfer_id=name))
    return world


def ask(world: World, *names: str, rank: int = 0, after: int = -1) -> list[worker.Snapshot]:
    """Ask for slots."""
    watched = [
        worker.Watched(role=Role.SOURCE, transfer_id=name, rank=rank, after=after) for name in names
    ]
    reply = world.call("a", WORKER, worker.Poll(transfers=watched, board=True))
    assert isinstance(reply, worker.Snapshots), reply
    return reply.transfers


def effects(world: World, call: Any) -> list[out.NodeEffect]:
    """What the node wants done about one call; it is not done."""
    return world.machines["a"].node.handle(out.WorkerCalled(WORKER, call), world.now_s)


def written(wanted: list[out.NodeEffect]) -> list[out.NodeEffect]:
    return [one for one in wanted if isinstance(one, out.ShowSlot | out.ClearSlot)]


def end(name: str) -> list[Any]:
    """The calls after which a source is forgotten."""
    fields: dict[str, Any] = {"role": Role.SOURCE, "transfer_id": name}
    return [worker.Abort(**fields), worker.Release(**fields)]


def test_nothing_is_written_for_who_did_not_ask() -> None:
    world = opened("t")
    watched = worker.Watched(role=Role.SOURCE, transfer_id="t")
    calls = [
        worker.Ready(transfer_id="t", ready_tokens=1),
        worker.Poll(transfers=[watched]),
        *end("t"),
    ]
    for call in calls:
        assert written(effects(world, call)) == []


def test_a_change_is_written_once_behind_the_ledger_and_before_the_answer() -> None:
    world = opened("t", "other")
    [seen] = ask(world, "t")
    wanted = effects(world, worker.Ready(transfer_id="t", ready_tokens=BLOCK, total_tokens=BLOCK))
    assert [type(one) for one in wanted[:2]] == [out.Write, out.ShowSlot]
    [shown] = written(wanted)
    [answer] = [one.reply for one in wanted if isinstance(one, out.ToWorker)]
    assert isinstance(shown, out.ShowSlot)
    assert isinstance(answer, worker.Snapshots)
    assert shown.snapshot.snapshot >= answer.transfers[0].snapshot > seen.snapshot
    assert shown.snapshot.available_tokens == BLOCK
    assert shown.snapshot.slot == seen.slot


def test_what_changes_nothing_writes_nothing() -> None:
    world = opened("t")
    [seen] = ask(world, "t")
    watched = worker.Watched(role=Role.SOURCE, transfer_id="t", after=seen.snapshot)
    for call in (
        worker.Heartbeat(),
        worker.Poll(transfers=[watched]),
        worker.Poll(transfers=[watched], board=True),
        worker.Ready(transfer_id="t", ready_tokens=0),
    ):
        assert written(effects(world, call)) == []


def test_who_asks_for_a_slot_is_answered_though_it_has_the_newest() -> None:
    world = opened("t")
    [first] = ask(world, "t")
    [again] = ask(world, "t", after=first.snapshot)
    assert again == first
    assert first.slot == worker.BoardSlot(index=0, key=slot_key(Role.SOURCE, "t", 0, 0))


def test_every_rank_has_a_slot_of_its_own() -> None:
    world = opened()
    for rank in (0, 1):
        world.call("a", WORKER, worker.Send(transfer_id="t", rank=rank, world_size=2))
    slots = [ask(world, "t", rank=rank)[0].slot for rank in (0, 1)]
    assert slots == [
        worker.BoardSlot(index=rank, key=slot_key(Role.SOURCE, "t", 0, rank)) for rank in (0, 1)
    ]
    shown = written(effects(world, worker.Ready(transfer_id="t", rank=1, ready_tokens=1)))
    assert [
        (one.snapshot.rank, one.snapshot.available_tokens)
        for one in shown
        if isinstance(one, out.ShowSlot)
    ] == [(0, 0), (1, 1)]


def test_a_slot_is_cleared_before_another_has_it() -> None:
    world = opened("t", "u")
    [seen] = ask(world, "t")
    assert seen.slot is not None
    calls: list[Any] = end("t")
    watched = worker.Watched(role=Role.SOURCE, transfer_id="u")
    both = worker.Batch(calls=[*calls, worker.Poll(transfers=[watched], board=True)])
    cleared, shown = written(effects(world, both))
    assert isinstance(cleared, out.ClearSlot)
    assert isinstance(shown, out.ShowSlot)
    assert cleared == out.ClearSlot(shown.pool_id, seen.slot.index)
    assert shown.snapshot.transfer_id == "u"
    assert shown.snapshot.slot is not None
    assert shown.snapshot.slot.index == seen.slot.index
    assert shown.snapshot.slot.key != seen.slot.key


def test_what_is_remembered_of_the_end_has_no_slot() -> None:
    world = opened("t")
    ask(world, "t")
    for call in end("t"):
        world.call("a", WORKER, call)
    [seen] = ask(world, "t")
    assert (seen.state, seen.slot) == (State.FAILED, None)


def test_who_finds_no_slot_free_is_answered_without_one() -> None:
    names = [f"t{number}" for number in range(SLOTS + 1)]
    world = opened()
    for name in names:
        effects(world, worker.Send(transfer_id=name))
    given = ask(world, *names[:SLOTS])
    assert {one.slot.index for one in given if one.slot} == set(range(SLOTS))
    [late] = ask(world, names[SLOTS])
    assert late.slot is None
    for call in end("t7"):
        effects(world, call)
    [later] = ask(world, names[SLOTS])
    assert later.slot is not None
    assert later.slot.index == 7
