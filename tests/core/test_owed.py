"""The death of a worker with many transfers, told a few of them a turn, and what comes between."""

from dataclasses import replace

from core.deaths import DYING, MANY, NEW, OTHER, Deaths, dying, key_of, live, pull_of, worker_layout
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.blocks import PASSED_MAX
from kvferry_daemon.core.events import Key, PeerUp
from kvferry_daemon.core.node import OWED_A_TURN, Node
from kvferry_daemon.core.past import Past
from kvferry_proto import peer, worker
from kvferry_proto.states import Role, State
from world import BLOCK, Machine


def test_the_death_of_a_worker_with_many_transfers_takes_several_turns() -> None:
    world = Deaths(1000)
    world.die()
    assert world.left == 1000 - OWED_A_TURN
    assert world.session not in world.node.sessions
    left = world.left
    while world.node.owed:
        assert out.ForgetWorker(world.session) not in world.seen
        assert f"session:{world.session}" in world.ledger  # a later life finds it dead again
        world.turn()
        assert left - OWED_A_TURN <= world.left < left
        left = world.left
    world.check_end()
    assert {world.ended_of(n) for n in range(1000)} == {(State.FAILED, "worker_lost")}
    assert world.node.wake_at_s > world.now_s


def test_the_death_of_a_worker_with_few_takes_one() -> None:
    world = Deaths(OWED_A_TURN)
    world.die()
    world.check_end()


def test_of_a_worker_without_any_nothing_is_left_at_once() -> None:
    world = Deaths(0)
    world.die()
    world.die()
    assert not world.ledger.keys() & {f"session:{world.session}"}
    assert world.seen.count(out.ForgetWorker(world.session)) == 1


def test_no_block_is_wiped_for_one_that_is_about_to_hear() -> None:
    """What the first give back would else go from one of them to the next, in one turn."""
    world = Deaths()
    world.machines["a"].zeroed_blocks = 0
    world.hello("a", OTHER)
    world.call("a", OTHER, worker.Send(transfer_id="other", window_tokens=BLOCK))
    world.die()
    world.finish()
    assert world.snapshot("a", OTHER, Role.SOURCE, "other").runs  # it was the last in the queue
    assert world.machines["a"].zeroed_blocks == 1
    world.call("a", OTHER, worker.Abort(transfer_id="other", role=Role.SOURCE))
    world.call("a", OTHER, worker.Release(transfer_id="other", role=Role.SOURCE))
    world.check_end()


def test_nobody_waits_for_blocks_behind_those_that_are_about_to_hear() -> None:
    world = Deaths(1000)
    world.hello("a", OTHER)
    world.call("a", OTHER, worker.Send(transfer_id="other", window_tokens=BLOCK))
    world.die()
    turns = 1
    while not world.snapshot("a", OTHER, Role.SOURCE, "other").runs:
        world.turn()
        turns += 1
    assert turns <= -(-1000 // PASSED_MAX)
    assert world.left > 1000 - (turns + 1) * OWED_A_TURN
    world.finish()


def test_other_events_meanwhile_are_not_held_up() -> None:
    """Each of a hundred in one turn of the loop would else end some of them."""
    world = Deaths()
    world.hello("a", OTHER)
    world.die()
    left = world.left
    for _ in range(100):
        world.call("a", OTHER, worker.Heartbeat())
    assert world.left == left
    world.finish()
    world.check_end()


def test_nobody_comes_back_as_the_dead_one() -> None:
    world = dying()
    assert world.call("a", DYING, worker.Heartbeat()).error.code == "hello_first"
    lock = f"lock{DYING.hex()}"
    again = worker.Hello(lock=lock, layout=worker_layout(world), session=world.session)
    afresh = worker.Hello(lock=lock, layout=worker_layout(world))
    for hello, code in ((again, "unknown_session"), (afresh, "worker_not_locked")):
        world.feed("a", out.WorkerCalled(DYING, hello, lock_held=True))
        assert world.machines["a"].inbox[DYING].pop().error.code == code
    world.finish()
    world.check_end()
    assert world.hello("a", DYING).session != world.session


def test_a_new_worker_is_served_and_may_retry_what_has_not_heard_yet() -> None:
    world = dying()
    number = live(world)
    world.hello("a", NEW)
    retry = worker.Send(transfer_id=f"t{number}", attempt=1, window_tokens=BLOCK)
    assert world.call("a", NEW, retry).transfers[0].state is State.BOOTSTRAPPING
    assert world.ended_of(number) == (State.FAILED, "worker_lost")  # not superseded: it was first
    world.finish()
    assert list(world.node.transfers) == [Key(Role.SOURCE, f"t{number}", 1)]
    again = world.snapshot("a", NEW, Role.SOURCE, f"t{number}", 1)
    assert again.allocated_tokens == BLOCK
    world.call("a", NEW, worker.Abort(transfer_id=f"t{number}", attempt=1, role=Role.SOURCE))
    world.call("a", NEW, worker.Release(transfer_id=f"t{number}", attempt=1, role=Role.SOURCE))
    world.check_end()


def test_a_sink_that_asks_for_one_hears_how_it_ended() -> None:
    world = dying()
    number = live(world)
    hello = peer.PeerHello(boot_id="b" * 16, daemon_id="b" * 16, life=1)
    world.feed("a", out.SinkSaid(b"b", hello))
    world.seen.clear()
    world.feed("a", out.SinkSaid(b"b", pull_of(world, number)))
    said = [one.message for one in world.seen if isinstance(one, out.ToSink)]
    assert isinstance(said[-1], peer.Progresses)
    last = said[-1].progresses[0]
    assert last.error is not None
    assert (last.state, last.error.code) == (State.FAILED, "worker_lost")
    world.finish()
    world.check_end()


def test_a_sink_here_takes_nothing_over_from_one_whose_worker_is_dead() -> None:
    world = Deaths()
    ready = worker.Ready(transfer_id="t0", ready_tokens=BLOCK)
    assert isinstance(world.call("a", DYING, ready), worker.Snapshots)
    world.hello("a", OTHER)
    world.node.owed_a_turn = 1
    world.node.tell({key_of(1): None}, PeerUp())  # so that none of the dead is told at once
    world.die()
    assert not world.node.transfers[key_of(0)].ended
    sink = world.call("a", OTHER, worker.Receive(transfer_id="t0"))
    assert sink.transfers[0].state is State.FAILED
    assert world.ended_of(0) == (State.FAILED, "worker_lost")
    world.finish()
    world.call("a", OTHER, worker.Release(transfer_id="t0", role=Role.SINK))
    world.check_end()


def test_an_operator_aborts_one_that_has_not_heard_yet() -> None:
    world = dying()
    number = live(world)
    world.feed("a", out.TransfersAborted((key_of(number),), "why not"))
    assert world.ended_of(number) == (State.FAILED, "worker_lost")
    world.finish()
    world.check_end()


def test_a_second_death_meanwhile() -> None:
    world = Deaths()
    second = world.hello("a", OTHER).session
    for number in range(MANY, 2 * MANY):
        world.call("a", OTHER, worker.Send(transfer_id=f"t{number}", window_tokens=BLOCK))
    world.die()
    world.turn()
    world.die(second)
    world.die()  # the watch finds it dead until it is forgotten
    assert not world.node.sessions
    assert set(world.node.workers.dying) == {world.session, second}
    world.count = 2 * MANY
    assert world.finish() >= 2 * MANY // OWED_A_TURN - 10
    world.check_end()
    assert world.seen.count(out.ForgetWorker(second)) == 1
    assert not [row for row in world.ledger if row.startswith("session:")]


def test_a_restart_in_the_middle_finds_the_worker_dead_again() -> None:
    world = dying()
    ended = MANY - world.left
    past = Past()
    for row, body in sorted(world.ledger.items()):
        past.add(row, body)
    settings = replace(world.node.settings, boot_id="c" * 16, life=2)
    world.machines["a"] = Machine(Node(settings, world._secret, 1, world.now_s))
    world.seen.clear()
    world.feed("a", out.Restored(past))
    assert world.left == MANY - ended
    assert out.WatchWorker(world.session, f"lock{DYING.hex()}") in world.seen
    world.die()
    world.finish()
    world.check_end()


def test_a_silent_worker_that_comes_back_meanwhile_has_lost_them_all() -> None:
    """As if it had come when all had been told: nobody can be half lost."""
    world = Deaths()
    world.now_s = world.node.settings.timing.lost_s + 0.5
    world.node._sweep_at_s = world.now_s  # it did not sleep
    world.feed("a", out.TimePassed())
    assert world.left
    world.call("a", DYING, worker.Heartbeat())
    number = live(world)
    ready = worker.Ready(transfer_id=f"t{number}", ready_tokens=0)
    reply = world.call("a", DYING, ready)
    assert reply.transfers[0].error.code == "worker_lost"
    world.finish()
    assert not world.left
    for number in range(MANY):
        world.call("a", DYING, worker.Release(transfer_id=f"t{number}", role=Role.SOURCE))
    assert world.blocks_free("a")
    assert f"session:{world.session}" in world.ledger
    world.die()
    world.check_end()


def test_one_that_dies_while_its_silence_is_told() -> None:
    world = Deaths()
    world.now_s = world.node.settings.timing.lost_s + 0.5
    world.node._sweep_at_s = world.now_s
    world.feed("a", out.TimePassed())
    world.die()
    world.finish()
    world.check_end()


def test_a_rank_that_lives_hears_of_the_one_that_died() -> None:
    world = Deaths()
    world.hello("a", OTHER)
    for route, rank in ((DYING, 0), (OTHER, 1)):
        call = worker.Send(transfer_id="group", rank=rank, world_size=2, window_tokens=BLOCK)
        assert isinstance(world.call("a", route, call), worker.Snapshots)
    world.die()
    key = Key(Role.SOURCE, "group", 0)
    assert not world.node.transfers[key].ended
    ready = worker.Ready(transfer_id="group", ready_tokens=0, rank=1)
    error = world.call("a", OTHER, ready).transfers[0].error
    assert (error.code, error.message.partition(":")[0]) == ("worker_lost", "rank 0 of 2")
    world.call("a", OTHER, worker.Release(transfer_id="group", role=Role.SOURCE, rank=1))
    world.finish()
    world.check_end()
