"""Bugs that were found, each as the shortest story that showed it."""

from core.stories import Story
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Key, StreamKey
from kvferry_daemon.core.sink_daemons import SINKS_MAX
from kvferry_daemon.core.sink_streams import CONNECTIONS_MAX
from kvferry_proto import peer, worker
from kvferry_proto.errors import Code
from kvferry_proto.states import Role, State
from world import BLOCK, World, layout

SOURCE, SINK = b"source worker", b"sink worker"
PEER = "f" * 16


def test_a_done_of_an_unknown_attempt_does_not_hide_an_older_live_one() -> None:
    """The older attempt was never superseded, and kept its blocks until its deadline."""
    world = World()
    world.hello("a", SOURCE)
    world.hello("b", SINK)
    world.call("a", SOURCE, worker.Send(transfer_id="t"))
    world.call("b", SINK, worker.Receive(transfer_id="t", attempt=1, source="tcp://a:1"))
    world.settle()
    world.call("b", SINK, worker.Abort(transfer_id="t", attempt=1, role=Role.SINK))
    world.settle()
    world.call("a", SOURCE, worker.Send(transfer_id="t", attempt=2))
    assert world.snapshot("a", SOURCE, Role.SOURCE, attempt=0).state is State.FAILED


def test_a_send_that_was_refused_may_be_corrected() -> None:
    """It left a tombstone behind, whose parameters the corrected call did not have."""
    world = World()
    world.hello("a", SOURCE, layout(aux=("rope",)))
    world.call("a", SOURCE, worker.Send(transfer_id="t"))
    wrong = worker.Send(transfer_id="t", attempt=1, aux={"other": 1})
    refused = world.call("a", SOURCE, wrong)
    assert refused.error.code == Code.AUX_MISSING
    assert world.snapshot("a", SOURCE, Role.SOURCE).state is State.BOOTSTRAPPING  # not superseded
    right = worker.Send(transfer_id="t", attempt=1, aux={"rope": 1})
    [snapshot] = world.call("a", SOURCE, right).transfers
    assert snapshot.state is State.BOOTSTRAPPING


def test_what_left_under_a_doubled_handle_is_counted_for_its_own_transfer() -> None:
    """The sink chooses handles: the blocks of one transfer were freed while they were read."""
    world = World()
    world.hello("a", SOURCE)
    node = world.machines["a"].node
    for name in ("one", "two"):
        world.call("a", SOURCE, worker.Send(transfer_id=name))
        ready = worker.Ready(transfer_id=name, ready_tokens=BLOCK, total_tokens=BLOCK)
        world.call("a", SOURCE, ready)
    stream = StreamKey(PEER, 0, 0)
    world.feed("a", out.SinkSaid(b"route", peer.PeerHello(boot_id=PEER, daemon_id=PEER, life=1)))
    world.feed("a", out.SourceStreamUp(stream))
    digest = next(iter(node.books.values())).layout.digest
    want = [peer.Want(first_token=0, tokens=BLOCK, stream=0, connection=0)]
    asked = {"number": 1, "handle": 7, "start_tokens": 0, "acked_tokens": 0, "want": want}
    pulls = [
        peer.Pull.model_validate(
            {"transfer_id": name, "attempt": 0, "layout_digest": digest, **asked}
        )
        for name in ("one", "two")
    ]
    told = peer.Pulls(source_boot_id="a" * 16, sink_boot_id=PEER, pulls=pulls)
    effects = node.handle(out.SinkSaid(b"route", told), world.now_s)
    first, second = (e for e in effects if isinstance(e, out.Transmit))
    assert (first.owner.transfer_id, second.owner.transfer_id) == ("one", "two")
    node.handle(out.ChunkSent(stream, first.owner, 0, 0, BLOCK), world.now_s)
    for name in ("one", "two"):
        abort = worker.Abort(transfer_id=name, role=Role.SOURCE)
        world.call("a", SOURCE, abort)
    held = {name: world.snapshot("a", SOURCE, Role.SOURCE, name).runs for name in ("one", "two")}
    assert not held["one"]
    assert held["two"], "its last bytes are still on their way"


def test_what_is_kept_of_sinks_is_bounded() -> None:
    world = World()
    node = world.machines["a"].node
    for number in range(SINKS_MAX + 100):
        boot = f"{number:016x}"
        node.handle(
            out.SinkSaid(b"route", peer.PeerHello(boot_id=boot, daemon_id=boot, life=1)), 0.0
        )
        ask = peer.OpenStream(stream=0, connection=1, source_boot_id="a" * 16, sink_boot_id=boot)
        node.handle(out.SinkSaid(b"route", ask), 0.0)
        if number == 0:
            node.handle(out.SourceStreamUp(StreamKey(boot, 0, 1)), 0.0)
    assert len(node.sources.streams._newest) <= SINKS_MAX
    assert len(node.sources.streams._tickets) <= CONNECTIONS_MAX


def test_a_stream_of_a_sink_that_was_forgotten_is_closed() -> None:
    world = World()
    node = world.machines["a"].node
    effects = node.handle(out.SourceStreamUp(StreamKey(PEER, 0, 1)), 0.0)
    assert effects == [out.Expel(StreamKey(PEER, 0, 1))]


def test_a_hello_that_is_repeated_while_its_pool_is_made_is_one_session() -> None:
    """The second session beat with nobody's heart: its transfers failed as of a lost worker."""
    node = World().machines["a"].node
    for number in (1, 2):
        hello = worker.Hello(call=number, lock="lock", layout=layout())
        effects = node.handle(out.WorkerCalled(SOURCE, hello, lock_held=True), 0.0)
    assert effects == []  # the second one waits with the first
    pool_id = layout().digest.hex()
    effects = node.handle(out.PoolMade(pool_id, "/a"), 5.0)
    welcomes = [e.reply for e in effects if isinstance(e, out.ToWorker)]
    assert [w.call for w in welcomes] == [2]
    again = worker.Hello(call=3, lock="lock", layout=layout())
    effects = node.handle(out.WorkerCalled(SOURCE, again, lock_held=True), 5.0)
    assert len(effects) == 1
    assert len(node.sessions) == 1


def test_hellos_of_one_worker_do_not_fill_the_queue_for_a_pool() -> None:
    node = World().machines["a"].node
    for number in range(node.settings.workers_max + 1):
        hello = worker.Hello(call=number, lock="lock", layout=layout())
        effects = node.handle(out.WorkerCalled(SOURCE, hello, lock_held=True), 0.0)
        assert [e for e in effects if isinstance(e, out.ToWorker)] == []  # no refusal


def test_an_empty_payload_may_tell_its_aux_after_it_was_opened() -> None:
    """Its total is its start: there is no last token to tell the aux with."""
    story = Story(0, late=False)
    story.world = World()
    story.world.hello("a", SOURCE, layout(aux=("rope",)))
    story.world.hello("b", SINK, layout(aux=("rope",)))
    story.open()
    story.world.settle()
    assert story.sink().state is not State.SUCCESS
    told = worker.Ready(transfer_id="t", ready_tokens=0, aux={"rope": 1})
    story.world.call("a", SOURCE, told)
    story.world.settle()
    assert story.sink().state is State.SUCCESS
    assert story.sink().aux == {"rope": 1}


def test_a_pull_that_came_early_is_kept_without_its_layout() -> None:
    """Thousands of them are kept, and a layout may have a thousand planes."""
    world = World()
    world.hello("a", b"p")
    node = world.machines["a"].node
    world.feed(
        "a", out.SinkSaid(b"c", peer.PeerHello(boot_id="c" * 16, daemon_id="d" * 16, life=1))
    )
    kind = layout(block=2 * BLOCK)
    pull = peer.Pull(
        transfer_id="t",
        attempt=0,
        number=1,
        handle=0,
        layout_digest=kind.digest,
        start_tokens=0,
        acked_tokens=0,
        layout=kind,
    )
    pulls = peer.Pulls(source_boot_id="a" * 16, sink_boot_id="c" * 16, pulls=[pull])
    world.feed("a", out.SinkSaid(b"c", pulls))
    kept, _ = node.sources.unmet._pulls[Key(Role.SOURCE, "t", 0)]
    assert kept.pull.layout is None


def test_a_sink_has_one_shape_for_as_long_as_it_lives() -> None:
    """Each pull could bring another layout, and each new one cost the loop a tenth of a second."""
    world = World()
    world.hello("a", SOURCE)
    world.call("a", SOURCE, worker.Send(transfer_id="t"))
    hello = peer.PeerHello(boot_id="c" * 16, daemon_id="d" * 16, life=1)
    world.feed("a", out.SinkSaid(b"c", hello))

    def pull(number: int, blocks: int) -> peer.Pull:
        kind = layout(block=blocks * BLOCK)
        return peer.Pull(
            transfer_id="t",
            attempt=0,
            number=number,
            handle=0,
            layout_digest=kind.digest,
            start_tokens=0,
            acked_tokens=0,
            layout=kind,
        )

    pulls = [pull(1, 3), pull(2, 5), pull(3, 7)]
    said = peer.Pulls(source_boot_id="a" * 16, sink_boot_id="c" * 16, pulls=pulls)
    world.feed("a", out.SinkSaid(b"c", said))
    assert world.machines["a"].node.plans.kept.made == 1


def test_a_retry_by_another_user_does_not_end_somebodys_transfer() -> None:
    """Whoever knew an id could end its transfer by opening a higher attempt."""
    world = World()
    world.hello("a", SOURCE, user="1:1:10")
    world.hello("a", b"stranger", user="2:2:20")
    world.hello("a", b"next life", user="1:1:11")
    world.call("a", SOURCE, worker.Send(transfer_id="t"), user="1:1:10")
    retry = worker.Send(transfer_id="t", attempt=1)
    refused = world.call("a", b"stranger", retry, user="2:2:20")
    assert refused.error.code == Code.NOT_YOUR_TRANSFER
    first = world.machines["a"].node.transfers[Key(Role.SOURCE, "t", 0)]
    assert not first.ended
    [snapshot] = world.call("a", b"next life", retry, user="1:1:11").transfers
    assert snapshot.state is State.BOOTSTRAPPING
    assert first.error is not None
    assert first.error.code == Code.SUPERSEDED
