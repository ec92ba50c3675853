"""What operators are told of a transfer, where there is much of it."""

from itertools import product

from kvferry_daemon.core.explain import explain
from kvferry_daemon.core.report import live_row
from kvferry_daemon.story import story
from kvferry_proto import control, worker
from kvferry_proto.states import Role, StallReason
from world import BLOCK, World

RANKS = 64
LONG = "vllm-decode-worker-" + "x" * 109  # as long as a name may be


def group(ranks: int, name: str = LONG) -> World:
    """The source side of a group, each rank with a window; its workers have long names."""
    world = World(blocks=4 * ranks, window_tokens=BLOCK, workers_max=ranks)
    for rank in range(ranks):
        route = f"rank {rank}".encode()
        world.hello("a", route, user=f"0:0:{1000 + rank}", called=name)
        send = worker.Send(transfer_id="t", rank=rank, world_size=ranks)
        assert isinstance(world.call("a", route, send, f"0:0:{1000 + rank}"), worker.Snapshots)
    return world


def explained(world: World, transfer_id: str = "t") -> control.Explained:
    """The one side that daemon a knows, as it goes over the wire."""
    node = world.machines["a"].node
    answer = explain(node, control.Explain(transfer_id=transfer_id), world.now_s)
    (one,) = answer.transfers
    control.ANSWERS.decode(control.ANSWERS.encode(answer))
    return one


def test_the_workers_of_a_large_group_are_counted_where_they_are_too_many_to_name() -> None:
    one = explained(group(RANKS))
    assert one.seen.snapshot.role is Role.SOURCE
    assert one.holding.startswith(f"1 blocks from token 0 of each of {RANKS} ranks, used by worker")
    assert one.holding.endswith(f" and {RANKS - 4} more workers")
    assert one.holding.count(LONG) == 4


def test_a_worker_is_named_with_the_pid_that_the_kernel_has() -> None:
    assert "worker decode (pid 1003)" in explained(group(4, "decode")).holding


def test_a_source_names_the_daemon_that_pulls() -> None:
    world = two_sides()
    one = explained(world)
    assert one.seen.sink == "tcp://b:1"
    assert one.seen.snapshot.stall is StallReason.WAITING_FOR_RESUME
    assert "at the sink's daemon, tcp://b:1," in one.helps
    assert "the sink's daemon is tcp://b:1" in story(control.Explanation(transfers=[one]))


def two_sides() -> World:
    """A transfer from a to b, whose window is full."""
    world = World(blocks=16, window_tokens=2 * BLOCK)
    world.hello("a", b"prefill")
    world.hello("b", b"decode")
    world.call("a", b"prefill", worker.Send(transfer_id="t"))
    world.call("b", b"decode", worker.Receive(transfer_id="t", source="tcp://a:1"))
    world.settle()
    for tokens in (2 * BLOCK, 4 * BLOCK):
        world.call("a", b"prefill", worker.Ready(transfer_id="t", ready_tokens=tokens))
        world.wait(1.0)
    return world


def test_holders_of_blocks_are_others_and_each_is_told_with_those_of_all_its_ranks() -> None:
    world = World(blocks=16, window_tokens=3 * BLOCK)
    routes = [f"rank {rank}".encode() for rank in range(2)]
    for name, route in product("ab", routes):
        world.hello(name, route)
    for transfer_id, tokens in (("greedy", 3 * BLOCK), ("hungry", BLOCK), ("hungry", 2 * BLOCK)):
        for rank, route in enumerate(routes):
            named = {"transfer_id": transfer_id, "rank": rank, "world_size": 2}
            world.call("b", route, worker.Send.model_validate(named))
            named["source"] = "tcp://b:1"
            world.call("a", route, worker.Receive.model_validate(named))
        world.wait(1.0)
        for rank, route in enumerate(routes):
            ready = worker.Ready(transfer_id=transfer_id, rank=rank, ready_tokens=tokens)
            world.call("b", route, ready)
        world.wait(1.0)
    node = world.machines["a"].node
    greedy, hungry = (live_row(node, one, world.now_s) for one in node.transfers.values())
    assert (greedy.blocks, hungry.blocks) == (6, 2), "leased of the pool, for both ranks"
    assert hungry.snapshot.stall is StallReason.WAITING_FOR_BLOCKS
    (holder,) = explained(world, "hungry").holders
    assert (holder.transfer_id, holder.blocks) == ("greedy", greedy.blocks)


def test_the_workers_of_a_small_group_are_named() -> None:
    one = explained(group(4, "decode"))
    assert one.holding.count("worker decode") == 4
    assert "more" not in one.holding
