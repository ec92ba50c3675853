"""The collector over a modelled daemon: a counter never goes down, which reads as a new life."""

from typing import NoReturn

from kvferry_daemon.http.facts import Facts
from kvferry_daemon.http.metrics import NodeCollector
from kvferry_proto import worker
from kvferry_proto.control import LoopStatus
from kvferry_proto.errors import Code
from kvferry_proto.states import Role, StallReason, State
from world import World

WORKER = b"source worker"
LOOP = LoopStatus(looks=0, late_over_2_ms=0, late_over_10_ms=0, late_over_100_ms=0, late_max_ms=0.0)


def not_asked() -> NoReturn:
    raise AssertionError("only the page asks for it")


def collector(world: World) -> NodeCollector:
    """Of the source's daemon."""
    facts = Facts(
        host="127.0.0.1",
        now_s=lambda: world.now_s,
        insecure=False,
        by_tenant=False,
        status=not_asked,
        loop=lambda: LOOP,
        not_sent=lambda: 0,
        failing=lambda: "",
    )
    return NodeCollector(world.machines["a"].node, facts)


def value(metrics: NodeCollector, name: str, **labels: str) -> float:
    """Of one sample."""
    samples = [sample for family in metrics.collect() for sample in family.samples]
    (found,) = [s.value for s in samples if s.name == name and s.labels == labels]
    return found


def test_time_in_waits_does_not_go_down_where_one_ends_by_a_clock_that_lags() -> None:
    world = World()
    metrics = collector(world)
    world.hello("a", WORKER)
    world.call("a", WORKER, worker.Send(transfer_id="t"))
    world.now_s += 0.004
    waits = {"role": "source", "reason": StallReason.WAITING_FOR_PEER.value}
    before = value(metrics, "kvferry_stall_seconds_total", **waits)
    assert before > 0
    world.call("a", WORKER, worker.Abort(transfer_id="t", role=Role.SOURCE))
    assert value(metrics, "kvferry_stall_seconds_total", **waits) >= before


def test_a_failure_is_counted_by_its_code() -> None:
    world = World()
    metrics = collector(world)
    world.hello("a", WORKER)
    failed = "kvferry_transfers_failed_total"
    aborted = {"role": "source", "code": Code.ABORTED.value}
    assert value(metrics, failed, **aborted) == 0, "one that is not there at first is missed"
    world.call("a", WORKER, worker.Send(transfer_id="t"))
    world.call("a", WORKER, worker.Abort(transfer_id="t", role=Role.SOURCE))
    world.call("a", WORKER, worker.Send(transfer_id="left"))
    world.wait(100)
    assert world.snapshot("a", WORKER, Role.SOURCE, "left").state is State.FAILED
    assert value(metrics, failed, **aborted) == 1
    assert value(metrics, failed, role="source", code=Code.WORKER_LOST.value) == 1
