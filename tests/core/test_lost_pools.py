"""Pools in a device that fails, or that ended with an earlier life of their daemon."""

from dataclasses import replace
from typing import Any

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.past import Past
from kvferry_proto import worker
from kvferry_proto.errors import Code
from kvferry_proto.layout import Layout
from kvferry_proto.states import Role, State
from world import BLOCK, Machine, World, layout

SOURCE, SINK, OTHER = b"source worker", b"sink worker", b"another worker"
AGAIN = b"a worker in its next session"
WINDOW = 8
MEMORY = worker.DeviceMemory(device="cuda:0", uuid=b"u" * 16, handle=b"h" * 64)


class Devices(World):
    """A world whose pools are in devices (of the daemons named), and whose ledgers are kept."""

    def __init__(self, *on_device: str) -> None:
        super().__init__(window_tokens=WINDOW)
        self.rows: dict[str, dict[str, bytes]] = {"a": {}, "b": {}}
        self.dropped: list[str] = []
        self.not_made: tuple[str, Code, bool] | None = None  # message, code, usable: of any pool
        for name in on_device:
            node = self.machines[name].node
            node.settings = replace(node.settings, device="cuda:0")

    def _perform(self, name: str, me: Machine, effect: out.NodeEffect) -> list[out.NodeEvent]:
        match effect:
            case out.Write():
                for row, body in effect.rows:
                    if body is None:
                        self.rows[name].pop(row, None)
                    else:
                        self.rows[name][row] = body
            case out.DropPool():
                self.dropped.append(effect.pool_id)
            case out.MakePool() if self.not_made is not None:
                return [out.PoolNotMade(effect.pool_id, *self.not_made)]
            case out.MakePool() if me.node.settings.device != "host":
                return [out.PoolMade(effect.pool_id, f"/{name}", MEMORY)]
        return super()._perform(name, me, effect)

    def restart(self, name: str) -> None:
        """The daemon is killed and goes on from its ledger; its connections are gone."""
        past = Past()
        for row, body in self.rows[name].items():
            past.add(row, body)
        before = self.machines[name].node.settings
        settings = replace(before, life=before.life + 1, boot_id=f"{name * 15}{before.life}")
        for key in list(self.sockets):
            self.cut(key)
        self.wire.clear()
        self.machines[name] = Machine(Node(settings, self._secret, 1, self.now_s))
        self.feed(name, out.Restored(past))

    def open_both(self) -> None:
        """A payload of two windows whose first one has arrived."""
        for name, route in (("a", SOURCE), ("b", SINK)):
            self.hello(name, route)
        self.call("a", SOURCE, worker.Send(transfer_id="t"))
        self.call("b", SINK, worker.Receive(transfer_id="t", source="tcp://a:1"))
        self.settle()
        self.fill("a", self.snapshot("a", SOURCE, Role.SOURCE), WINDOW)
        ready = worker.Ready(transfer_id="t", ready_tokens=WINDOW, total_tokens=2 * WINDOW)
        self.call("a", SOURCE, ready)
        self.live(1)
        assert self.snapshot("b", SINK, Role.SINK).sent_tokens == WINDOW

    def live(self, seconds: int) -> None:
        """Time passes, and workers beat."""
        for _ in range(seconds):
            self.beat()
            self.wait(1.0)

    def pool_id(self, name: str) -> str:
        return next(iter(self.machines[name].node.books))

    def break_pool(self, name: str, *, usable: bool = True) -> None:
        """The device fails in a copy."""
        self.feed(name, out.PoolBroken(self.pool_id(name), "a copy on cuda:0 failed: x", usable))
        self.wait(1.0)

    def error(self, name: str, route: bytes, role: Role, attempt: int = 0) -> tuple[str, str]:
        seen = self.snapshot(name, route, role, attempt=attempt)
        assert seen.state is State.FAILED, seen
        assert seen.error is not None
        return seen.error.code, seen.error.message

    def refused_hello(
        self, name: str, route: bytes, session: str | None = None, kind: Layout | None = None
    ) -> Any:
        """A hello that is not welcomed; the error."""
        hello = worker.Hello(lock=f"lock{route.hex()}", layout=kind or layout(), session=session)
        self.feed(name, out.WorkerCalled(route, hello, lock_held=True))
        reply = self.machines[name].inbox[route].pop()
        assert isinstance(reply, worker.Failure), reply
        return reply.error

    def die(self, name: str) -> None:
        """Every worker of a daemon ends."""
        for session in list(self.machines[name].node.sessions):
            self.feed(name, out.LockDropped(session))

    def run(self, attempt: int, source: bytes, sink: bytes) -> None:
        """The same payload in another attempt, to its good end."""
        self.call("a", source, worker.Send(transfer_id="t", attempt=attempt))
        receive = worker.Receive(transfer_id="t", attempt=attempt, source="tcp://a:1")
        self.call("b", sink, receive)
        self.live(3)
        self.fill("a", self.snapshot("a", source, Role.SOURCE, attempt=attempt), WINDOW)
        ready = worker.Ready(
            transfer_id="t", attempt=attempt, ready_tokens=WINDOW, total_tokens=WINDOW
        )
        self.call("a", source, ready)
        self.live(3)
        end = self.snapshot("b", sink, Role.SINK, attempt=attempt)
        assert end.state is State.SUCCESS, end
        assert self.read("b", end) == [("t", attempt, token) for token in range(WINDOW)]


def test_a_worker_is_told_how_to_open_the_memory() -> None:
    world = Devices("b")
    host, device = world.hello("a", SOURCE).pool, world.hello("b", SINK).pool
    assert (host.path, host.device) == ("/a", None)
    assert (device.path, device.device, device.board) == ("", MEMORY, "/b.board")


def test_a_failed_copy_fails_the_pools_transfers_on_both_sides() -> None:
    world = Devices("b")
    world.open_both()
    world.break_pool("b")
    code, message = world.error("b", SINK, Role.SINK)
    assert code == "device_failed"
    assert message.startswith("a copy on cuda:0 failed: x; its workers must close their clients")
    code, message = world.error("a", SOURCE, Role.SOURCE)
    assert code == "sink_failed"
    assert "a copy on cuda:0 failed" in message
    assert world.machines["b"].node.counters["pools_broken"] == 1


def test_other_pools_live_on() -> None:
    world = Devices("b")
    world.open_both()
    other = layout(block=2 * BLOCK)
    node = world.machines["b"].node
    world.hello("b", OTHER, other)
    world.call("b", OTHER, worker.Receive(transfer_id="u", source="tcp://a:1"))
    world.break_pool("b")
    assert world.snapshot("b", OTHER, Role.SINK, "u").state is State.BOOTSTRAPPING
    assert [book.lost != "" for book in node.books.values()] == [True, False]


def test_nothing_is_opened_in_a_broken_pool_and_what_was_can_be_let_go() -> None:
    world = Devices("b")
    world.open_both()
    world.break_pool("b")
    call = worker.Receive(transfer_id="t", attempt=1, source="tcp://a:1")
    assert world.call("b", SINK, call).error.code == Code.DEVICE_FAILED
    assert not world.blocks_free("b"), "its worker may still read them"
    world.call("b", SINK, worker.Release(transfer_id="t", role=Role.SINK))
    assert world.blocks_free("b")


def test_a_broken_pool_is_made_anew_once_nobody_has_it_open() -> None:
    """What the driver does with memory that is freed while another process has it open is not said."""
    world = Devices("b")
    world.open_both()
    pool_id = world.pool_id("b")
    watched = worker.Watched(role=Role.SINK, transfer_id="t")
    world.call("b", SINK, worker.Poll(transfers=[watched], board=True))
    world.break_pool("b")
    error = world.refused_hello("b", AGAIN)
    assert error.code == Code.DEVICE_FAILED
    assert "once all who have it open (1 workers) have closed" in error.message
    assert world.dropped == []
    world.die("b")
    assert world.hello("b", AGAIN).pool.device == MEMORY
    assert world.dropped == [pool_id]
    world.run(1, SOURCE, AGAIN)
    world.die("a")
    world.die("b")
    world.wait(100.0)
    assert world.blocks_free("a")
    assert world.blocks_free("b")


def test_a_late_word_of_the_same_failure_changes_nothing() -> None:
    world = Devices("b")
    world.open_both()
    world.break_pool("b")
    number = world.snapshot("b", SINK, Role.SINK).snapshot
    world.break_pool("b")
    assert world.snapshot("b", SINK, Role.SINK).snapshot == number
    world.feed("b", out.PoolBroken("none", "x", True))


def test_a_device_that_is_lost_takes_no_pool_until_the_daemon_is_restarted() -> None:
    world = Devices("b")
    world.open_both()
    world.break_pool("b", usable=False)
    assert (
        "the daemon has lost the device and must be restarted"
        in world.error("b", SINK, Role.SINK)[1]
    )
    world.die("b")
    for kind in (layout(), layout(block=2 * BLOCK)):
        error = world.refused_hello("b", AGAIN, kind=kind)
        assert (error.code, "must be restarted" in error.message) == (Code.DEVICE_FAILED, True)
    world.restart("b")
    world.hello("b", AGAIN)
    world.run(1, SOURCE, AGAIN)


def test_a_device_that_ends_while_a_pool_is_made_takes_none_until_the_daemon_is_restarted() -> None:
    world = Devices("b")
    world.not_made = "no 8 bytes of cuda:0: x", Code.DEVICE_FAILED, False
    for kind in (layout(), layout(), layout(block=2 * BLOCK)):
        error = world.refused_hello("b", AGAIN, kind=kind)
        assert error.code == Code.DEVICE_FAILED
        assert error.message == (
            "no 8 bytes of cuda:0: x; the daemon has lost the device and must be restarted"
        )
        world.not_made = None  # the others are not tried
    assert not world.machines["b"].node.books
    world.restart("b")
    world.hello("b", AGAIN)


def test_a_pool_that_a_device_that_works_could_not_make_is_tried_again() -> None:
    world = Devices("b")
    world.not_made = "no 8 bytes of cuda:0: x", Code.DEVICE_FAILED, True
    error = world.refused_hello("b", AGAIN)
    assert (error.code, error.message) == (Code.DEVICE_FAILED, "no 8 bytes of cuda:0: x")
    world.not_made = None
    world.hello("b", AGAIN)


def test_a_sinks_pool_ends_with_its_daemons_life() -> None:
    world = Devices("b")
    world.open_both()
    session = next(iter(world.machines["b"].node.sessions))
    world.restart("b")
    assert world.refused_hello("b", SINK, session).code == Code.UNKNOWN_SESSION
    world.hello("b", SINK)  # its lock is the same: nobody has it any more
    code, message = world.error("b", SINK, Role.SINK)
    assert code == "pool_lost"
    assert message == "the pool was in cuda:0, and ended with the daemon's life before"
    world.live(3)
    assert world.error("a", SOURCE, Role.SOURCE)[0] == "sink_failed"
    world.call("a", SOURCE, worker.Release(transfer_id="t", role=Role.SOURCE))
    world.run(1, SOURCE, SINK)


def test_a_sources_pool_ends_with_its_daemons_life() -> None:
    world = Devices("a")
    world.open_both()
    world.restart("a")
    world.hello("a", SOURCE)
    assert world.error("a", SOURCE, Role.SOURCE)[0] == "pool_lost"
    world.live(5)
    code, message = world.error("b", SINK, Role.SINK)
    assert code == "source_failed"
    assert "pool_lost" in message
    world.call("b", SINK, worker.Release(transfer_id="t", role=Role.SINK))
    world.run(1, SOURCE, SINK)


def test_a_ledger_that_tells_of_a_lost_pool_can_be_gone_on_from_again_and_again() -> None:
    world = Devices("b")
    world.open_both()
    for _ in range(3):
        world.restart("b")
    assert not any(row.startswith("session:") for row in world.rows["b"])
    world.hello("b", SINK)
    assert world.error("b", SINK, Role.SINK)[0] == "pool_lost"
    world.restart("b")  # the pool in the lost one's place is lost, too
    world.hello("b", SINK)
    assert world.error("b", SINK, Role.SINK)[0] == "pool_lost"
    assert world.machines["b"].node.counters["pools_lost"] == 1


def test_a_success_stays_one_and_shows_no_block_any_more() -> None:
    world = Devices("b")
    world.hello("a", SOURCE)
    world.hello("b", SINK)
    world.run(0, SOURCE, SINK)
    world.restart("b")
    transfer = next(iter(world.machines["b"].node.transfers.values()), None)
    stones = world.machines["b"].node.tombstones.snapshots()
    [seen] = [transfer.snapshot()] if transfer is not None else list(stones)
    assert (seen.state, seen.runs) == (State.SUCCESS, [])


def test_host_pools_of_the_same_daemon_live_on() -> None:
    """Its config has changed between two lives."""
    world = Devices()
    world.open_both()
    node = world.machines["b"].node
    node.settings = replace(node.settings, device="cuda:0")
    other = layout(block=2 * BLOCK)
    world.hello("b", OTHER, other)
    world.call("b", OTHER, worker.Receive(transfer_id="u", source="tcp://a:1"))
    session = node.sessions[next(iter(node.sessions))].secret
    world.restart("b")
    hello = worker.Hello(lock=f"lock{SINK.hex()}", layout=layout(), session=session)
    world.feed("b", out.WorkerCalled(SINK, hello, lock_held=True))
    [welcome] = world.machines["b"].inbox[SINK]
    assert isinstance(welcome, worker.Welcome)
    assert welcome.pool.path == "/pools/" + layout().digest.hex()
    world.machines["b"].inbox[SINK].clear()
    assert world.snapshot("b", SINK, Role.SINK).state is State.TRANSFERRING
    world.hello("b", OTHER, other)
    assert world.snapshot("b", OTHER, Role.SINK, "u").error is not None


def test_a_pool_made_anew_has_the_lost_ones_part_of_the_budget() -> None:
    world = Devices("b")
    node = world.machines["b"].node
    budget = 8 * layout().block_bytes
    node.settings = replace(node.settings, budget_bytes=budget, pool_tokens=None)
    world.open_both()
    world.feed("b", out.PoolBroken(world.pool_id("b"), "x", True))
    world.die("b")
    assert node.transfers, "its source has not noted the end yet"
    assert world.hello("b", AGAIN).pool.blocks == 8


def test_a_lost_transfer_that_is_not_forgotten_yet_keeps_no_slot_of_the_new_board() -> None:
    world = Devices("b")
    world.open_both()
    node = world.machines["b"].node

    def slots(route: bytes, attempt: int) -> list[int]:
        watched = worker.Watched(role=Role.SINK, transfer_id="t", attempt=attempt)
        reply = world.call("b", route, worker.Poll(transfers=[watched], board=True))
        return [one.slot.index for one in reply.transfers if one.slot is not None]

    assert slots(SINK, 0) == [0]
    world.feed("b", out.PoolBroken(world.pool_id("b"), "x", True))
    world.die("b")
    old = next(iter(node.transfers))
    world.hello("b", AGAIN)  # before the source has noted the end of the old one
    world.call("b", AGAIN, worker.Receive(transfer_id="t", attempt=1, source="tcp://a:1"))
    assert old in node.transfers
    assert slots(AGAIN, 1) == [0]
    world.wait(1.0)
    assert old not in node.transfers
    world.call("b", AGAIN, worker.Receive(transfer_id="u", source="tcp://a:1"))
    watched = worker.Watched(role=Role.SINK, transfer_id="u")
    reply = world.call("b", AGAIN, worker.Poll(transfers=[watched], board=True))
    assert reply.transfers[0].slot.index == 1
