"""What is kept of a transfer's life: every change in order, growth in one line, bounded."""

from kvferry_daemon.core import events as ev
from kvferry_daemon.core.explain import near_ids
from kvferry_daemon.core.history import RECORDS_KEPT, RECORDS_MAX, History, read
from kvferry_daemon.core.meters import CHUNK_EDGES_S, Meters, Times
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.transfer import Opening
from kvferry_proto import worker
from kvferry_proto.states import Role, StallReason, State
from world import World

KEY = ev.Key(Role.SINK, "t", 0)


def a_sink() -> SinkTransfer:
    opening = Opening(KEY, "s", "p", window_tokens=64, block_size_tokens=16, source="tcp://a:1")
    return SinkTransfer(opening, ev.Timing(), 100.0)


def test_growth_is_one_line_and_what_else_changes_another() -> None:
    sink = a_sink()
    history = History(100.0)
    for sent in (0, 16, 32, 48):
        sink.sent_tokens, sink.now_s = sent, 100.0 + sent
        history.note(sink)
    sink.stall = StallReason.WAITING_FOR_RESUME
    history.note(sink)
    seen = [(m.after_s, m.sent_tokens, m.stall) for m in history.moments()]
    assert seen == [
        (0.0, 0, None),
        (48.0, 48, None),
        (48.0, 48, StallReason.WAITING_FOR_RESUME),
    ]


def test_a_moment_has_every_number_it_was_noted_with() -> None:
    sink = a_sink()
    sink.state, sink.stall = State.TRANSFERRING, StallReason.DRAINING
    sink.sent_tokens, sink.available_tokens, sink.total_tokens = 1 << 40, (1 << 40) - 1, 1 << 40
    sink.last_resume_at, sink.now_s = -1, 100.25
    history = History(100.0)
    history.note(sink)
    (moment,) = history.moments()
    assert moment == (
        *(0.25, State.TRANSFERRING, StallReason.DRAINING, True),
        *(1 << 40, (1 << 40) - 1, 0, 0, -1),
    )


def test_the_oldest_lines_go_and_are_counted() -> None:
    sink = a_sink()
    history = History(100.0)
    changes = 3 * RECORDS_MAX
    for resume in range(changes):
        sink.last_resume_at = resume
        history.note(sink)
    moments = list(history.moments())
    assert (len(moments), history.lost) == (RECORDS_MAX, changes - RECORDS_MAX)
    assert moments[-1].last_resume_at == changes - 1
    records, lost = history.kept()
    assert [m.last_resume_at for m in read(records)] == list(range(changes))[-RECORDS_KEPT:]
    assert lost == changes - RECORDS_KEPT


def test_how_long_something_took_falls_into_its_bucket() -> None:
    times = Times((1.0, 2.0))
    for took_s, name in ((1.0, "a"), (1.5, "b"), (99.0, "c")):
        times.add(took_s, name)
    assert (times.counts, times.sum_s) == ([1, 1, 1], 101.5)
    assert times.last == [("a", 1.0), ("b", 1.5), ("c", 99.0)]


def test_a_claim_that_comes_to_nothing_is_not_kept() -> None:
    meters = Meters()
    one, other = ev.StreamKey("tcp://a:1", 0, 1), ev.StreamKey("tcp://a:1", 1, 2)
    for first in (0, 16, 32):
        meters.claimed(one, 8, first, 5.0)
    meters.claimed(other, 8, 48, 5.0)
    meters.received(one, 8, 0, 5.0 + CHUNK_EDGES_S[0], "t")
    meters.missed(one, 8, 16)
    meters.stream_down(one)
    meters.received(one, 8, 32, 6.0, "t")  # of a connection that is gone
    meters.missed(other, 8, 48)
    assert (sum(meters.chunk_s.counts), meters.chunk_s.counts[0]) == (1, 1)
    assert meters._claimed == {}


def test_near_ids_are_those_with_one_mistake() -> None:
    world = World()
    node = world.machines["b"].node
    for transfer_id in ("request-4711", "request-9999", "chat-4711x"):
        key = ev.Key(Role.SINK, transfer_id, 0)
        node.tombstones.add(
            key, a_sink().snapshot().model_copy(update={"transfer_id": transfer_id}), (), 0.0
        )
    assert near_ids(node, "request-471")[0] == "request-4711"
    assert near_ids(node, "equest-9999")[0] == "request-9999"
    assert near_ids(node, "zzz") == []


def test_stalls_are_counted_when_they_begin_and_timed_when_they_end() -> None:
    world = World()
    world.hello("a", b"w")
    world.call("a", b"w", worker.Receive(transfer_id="t"))
    meters, waits = world.machines["a"].node.meters, (Role.SINK, StallReason.WAITING_FOR_SOURCE)
    assert meters.stalls[waits] == 1
    assert meters.stalled_s[waits] == 0.0, "it is not over"
    world.wait(2.0)
    world.call("a", b"w", worker.Send(transfer_id="t"))
    assert meters.stalls[waits] == 1
    assert 2.0 <= meters.stalled_s[waits] < 3.0
