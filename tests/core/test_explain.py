"""What operators are told of a transfer, where there is much of it."""

from kvferry_daemon.core.explain import explain
from kvferry_proto import control, worker
from kvferry_proto.states import Role
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


def test_the_workers_of_a_small_group_are_named() -> None:
    one = explained(group(4, "decode"))
    assert one.holding.count("worker decode") == 4
    assert "more" not in one.holding
