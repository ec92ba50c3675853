"""Several transfers that want the same room: nobody waits for ever, and room goes to who can use it."""

from typing import Any

from kvferry_daemon.core.blocks import PoolBook
from kvferry_daemon.core.events import Key, WantBlocks
from kvferry_daemon.core.pool import BlockPool
from kvferry_proto import worker
from kvferry_proto.states import TERMINAL, Mode, Role, StallReason, State
from world import World, layout

Call = worker.Send | worker.Receive | worker.Ready
SOURCE, SINK, LOCAL = b"source worker", b"sink worker", b"worker beside the sink"


class Crowd:
    """Transfers by name, from ``a`` to ``b``, or within ``b``."""

    def __init__(self, blocks: int = 8, window_tokens: int = 8) -> None:
        self.world = World(blocks=blocks, window_tokens=window_tokens)
        self.world.hello("a", SOURCE)
        self.world.hello("b", SINK)
        self.here: set[str] = set()

    def at(self, name: str) -> tuple[str, bytes]:
        return ("b", LOCAL) if name in self.here else ("a", SOURCE)

    def send(self, name: str, *, here: bool = False, **more: Any) -> None:
        if here:
            self.here.add(name)
        self._call(*self.at(name), worker.Send(transfer_id=name, **more))

    def receive(self, name: str, **more: Any) -> None:
        source = None if name in self.here else "tcp://a:1"
        self._call("b", SINK, worker.Receive(transfer_id=name, source=source, **more))

    def ready(self, name: str, tokens: int, total: int | None = None) -> None:
        where, route = self.at(name)
        self.world.fill(where, self.world.snapshot(where, route, Role.SOURCE, name), tokens)
        call = worker.Ready(transfer_id=name, ready_tokens=tokens, total_tokens=total)
        self._call(where, route, call)
        self.world.wait(0.1)

    def release(self, name: str, role: Role) -> None:
        where, route = self.at(name) if role is Role.SOURCE else ("b", SINK)
        self.world.call(where, route, worker.Release(transfer_id=name, role=role))

    def source(self, name: str) -> worker.Snapshot:
        return self.world.snapshot(*self.at(name), Role.SOURCE, name)

    def sink(self, name: str) -> worker.Snapshot:
        return self.world.snapshot("b", SINK, Role.SINK, name)

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.world.wait(1)
            self.world.beat()

    def _call(self, where: str, route: bytes, call: Call) -> None:
        reply = self.world.call(where, route, call)
        assert isinstance(reply, worker.Snapshots), reply


def test_what_was_set_aside_for_a_local_sink_ends_with_it() -> None:
    """Its remote neighbour waited until its deadline, with every block free."""
    crowd = Crowd()
    crowd.world.hello("b", LOCAL)
    crowd.send("local", here=True)
    crowd.receive("local", mode=Mode.WHOLE, max_tokens=16)
    crowd.ready("local", 4)
    crowd.wait(3)
    crowd.send("remote", total_tokens=8)
    crowd.ready("remote", 8, 8)
    crowd.receive("remote", mode=Mode.WHOLE, max_tokens=16)
    crowd.wait(1)
    assert crowd.sink("remote").stall is StallReason.WAITING_FOR_BLOCKS
    crowd.ready("local", 4, 4)
    crowd.wait(3)
    crowd.release("local", Role.SINK)
    crowd.release("local", Role.SOURCE)
    crowd.wait(3)
    assert crowd.sink("remote").state is State.SUCCESS


def test_a_local_sink_hears_at_once_of_the_source_that_came_later() -> None:
    crowd = Crowd()
    crowd.world.hello("b", LOCAL)
    crowd.here.add("t")
    crowd.receive("t")
    crowd.wait(10)  # its pulls come every two seconds by now
    crowd.send("t", here=True, total_tokens=8)
    assert crowd.sink("t").state is not State.BOOTSTRAPPING


def test_one_that_needs_all_at_once_is_overtaken_by_those_that_need_one_block() -> None:
    """A one-block payload waited a minute beside three free blocks."""
    crowd = Crowd()
    crowd.send("long", window_tokens=4)
    crowd.receive("long", window_tokens=8)
    crowd.ready("long", 4)
    crowd.ready("long", 8)
    crowd.send("whole", window_tokens=4)
    crowd.receive("whole", mode=Mode.WHOLE, max_tokens=16)
    crowd.ready("whole", 4)
    crowd.send("small", window_tokens=4)
    crowd.receive("small", window_tokens=4)
    crowd.ready("small", 4, 4)
    crowd.wait(1)
    assert crowd.sink("whole").stall is StallReason.WAITING_FOR_BLOCKS
    assert crowd.sink("small").state is State.SUCCESS


def test_one_that_needs_all_at_once_is_not_overtaken_for_ever() -> None:
    """Small ones come without end, three at a time; the whole one gets its turn."""
    crowd = Crowd(blocks=8)
    crowd.send("whole", window_tokens=4)
    crowd.ready("whole", 4)
    live: list[str] = []
    for number in range(120):
        name = f"small{number}"
        crowd.send(name, window_tokens=4)
        crowd.receive(name, window_tokens=4)
        crowd.ready(name, 4, 4)
        live.append(name)
        if number == 3:
            crowd.receive("whole", mode=Mode.WHOLE, max_tokens=16)
        if len(live) >= 3:
            done = next((n for n in live if crowd.sink(n).state in TERMINAL), live[0])
            crowd.release(done, Role.SINK)
            crowd.release(done, Role.SOURCE)
            live.remove(done)
            crowd.wait(1)
        if number > 3 and crowd.sink("whole").sent_tokens:
            break
    assert crowd.sink("whole").sent_tokens == 4


def test_blocks_behind_a_late_total_are_given_to_others() -> None:
    crowd = Crowd(blocks=16)
    for number in range(4):  # windows of two blocks: together all that sources may have
        crowd.send(f"t{number}")
        crowd.world.wait(0.05)
        crowd.ready(f"t{number}", 1, 1)
        assert crowd.source(f"t{number}").allocated_tokens == 4
    crowd.send("t4")
    crowd.wait(1)
    assert crowd.source("t4").allocated_tokens == 8


def test_a_source_that_has_ended_for_somebody_else_is_lost() -> None:
    crowd = Crowd()
    crowd.send("t", total_tokens=8)
    crowd.ready("t", 8, 8)
    crowd.receive("t")
    crowd.wait(1)
    assert crowd.source("t").state is State.SUCCESS
    key = next(iter(crowd.world.machines["b"].node.transfers))
    crowd.release("t", Role.SOURCE)
    crowd.release("t", Role.SINK)
    crowd.wait(1)
    node = crowd.world.machines["b"].node
    node.tombstones._stones.pop(key)  # as after a restart that remembered nothing
    crowd.receive("t")
    crowd.wait(1)
    error = crowd.sink("t").error
    assert error is not None
    assert error.code == "source_lost"


def test_sinks_of_a_source_that_never_answered_do_not_fill_the_table() -> None:
    crowd = Crowd()
    for number in range(120):  # over transfers_max
        call = worker.Receive(transfer_id=f"t{number}", source="tcp://nobody:1")
        assert isinstance(crowd.world.call("b", SINK, call), worker.Snapshots)
        abort = worker.Abort(transfer_id=f"t{number}", role=Role.SINK)
        crowd.world.call("b", SINK, abort)
        crowd.release(f"t{number}", Role.SINK)
    assert crowd.world.machines["b"].node.transfers == {}


def test_who_holds_nothing_gets_one_block_first_and_then_stands_in_line() -> None:
    """One that gave its window back and asked anew got all of it again, and the other starved."""
    pool = BlockPool(8, 4, 4)
    book = PoolBook("p", "/p", "cpu", layout(), pool, 4, 4)
    held = pool.grant(99, Role.SINK, 4).leases[0]
    waits, begins = Key(Role.SINK, "waits", 0), Key(Role.SINK, "begins", 0)
    book.want(waits, WantBlocks(3))
    book.want(begins, WantBlocks(4, urgent=True))
    assert list(book.grants()) == []
    pool.free_front(held, 4)
    given = [(key, sum(lease.run.blocks for lease in grant.leases)) for key, grant in book.grants()]
    assert given == [(begins, 1), (waits, 3)]


def test_a_group_that_came_first_is_not_passed_by_while_it_waits_for_a_block_a_rank() -> None:
    """Room for one block went to whoever needed no more than that, each time there was some."""
    pool = BlockPool(8, 4, 4)
    book = PoolBook("p", "/p", "cpu", layout(), pool, 4, 4)
    one, other = (pool.grant(99, Role.SINK, 1).leases[0] for _ in range(2))
    pool.grant(98, Role.SINK, 2)
    group, small = Key(Role.SINK, "group", 0), Key(Role.SINK, "small", 0)
    book.want(group, WantBlocks(2, urgent=True, ranks=2))
    book.want(small, WantBlocks(1, whole=True))
    pool.free_front(one, 1)
    assert list(book.grants()) == []
    pool.free_front(other, 1)
    assert [key for key, _ in book.grants()] == [group]
