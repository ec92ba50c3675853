"""Sliced chunks over a real line: gathered when they are sent, scattered once they are verified."""

import queue
import socket
import threading
from collections.abc import Iterator

import pytest
import xxhash

from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp.receiver import StreamReceiver
from kvferry_daemon.transports.tcp.sender import SendJob, StreamSender
from kvferry_proto.chunk import ChunkHeader, pack_trailer
from kvferry_proto.layout import Dtype, Order
from slicing import Group, Move, PlaneKind, Window, content, layout_of

WAIT_S = 10.0
Events = queue.Queue[te.StreamEvent]
TOKENS = 61
KINDS = [PlaneKind(4, (3,), Dtype.BFLOAT16)] * 3 + [PlaneKind(None, (5,)), PlaneKind(2, ())]
MADE = content(KINDS, TOKENS)


class Line:
    """A sender and a receiver, and a thread each."""

    def __init__(self, checksum: bool = True) -> None:
        self.one, self.two = socket.socketpair()
        self.sent, self.received = Events(), Events()
        self.checksum = checksum
        self._before = set(threading.enumerate())
        self.receiver = StreamReceiver(self.two, "key", self.received.put)

    def send(self) -> StreamSender:
        return StreamSender(self.one, "key", self.sent.put, self.checksum)

    def close(self) -> None:
        self.receiver.close()
        self.one.close()
        for thread in set(threading.enumerate()) - self._before:
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.fixture(params=[True, False], ids=["checksum", "plain"])
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    one = Line(request.param)
    yield one
    one.close()


@pytest.fixture
def checked() -> Iterator[Line]:
    one = Line()
    yield one
    one.close()


def groups(source_ranks: int, sink_ranks: int) -> tuple[Move, Group]:
    """A source that is full, a sink that is not, and the sink as it has to become."""
    source = Group(
        layout_of(KINDS, source_ranks, 4, Order.HND), source_ranks, Window(0, ((11, 7), (1, 9)))
    )
    layout = layout_of(KINDS, sink_ranks, 16, Order.NHD)
    sink, expected = (
        Group(layout, sink_ranks, Window(0, ((3, 1), (1, 2), (5, 1)))) for _ in range(2)
    )
    source.fill(MADE, 0, TOKENS)
    expected.fill(MADE, 0, TOKENS)
    return Move(source, sink), expected


@pytest.mark.parametrize(("source_ranks", "sink_ranks"), [(1, 1), (2, 1), (1, 2), (2, 4), (4, 2)])
def test_every_part_arrives_bit_by_bit(line: Line, source_ranks: int, sink_ranks: int) -> None:
    """All at once, so that chunks wait for each other; and plain ones between them."""
    move, expected = groups(source_ranks, sink_ranks)
    plain, target = bytes(range(200)), bytearray(200)
    jobs, sizes = [], []
    for handle, part in enumerate(move.parts):
        for first, tokens in move.chunks(0, TOKENS, wires=3):
            gathered, scattered = move.extents(part, first, tokens)
            line.receiver.claim(handle, first, tokens, scattered)
            jobs.append(SendJob(handle, handle, first, tokens, gathered))
            sizes.append(gathered.payload_bytes)
        line.receiver.claim(1000 + handle, 0, 1, [memoryview(target)])
        jobs.append(SendJob(1000 + handle, 1000 + handle, 0, 1, [memoryview(plain)]))
        sizes.append(200)
    sender = line.send()
    for job in jobs:
        sender.put(job)
    for job, size in zip(jobs, sizes, strict=True):
        assert line.received.get(timeout=WAIT_S) == te.Received(
            "key", job.handle, job.first_token, size
        )
        assert line.sent.get(timeout=WAIT_S) == te.Sent("key", job.owner, job.first_token, size)
    assert move.sink.pools == expected.pools
    assert target == plain
    sender.close()


def by_hand(move: Move, handle: int, flip: int | None = None) -> bytes:
    """Part 0's first 8 tokens as the wire page has them; ``flip`` damages a byte behind a hash."""
    payload = bytearray(move.on_the_wire(move.parts[0], MADE, 0, 8))
    trailer = pack_trailer(xxhash.xxh3_64(payload).intdigest())
    if flip is not None:
        payload[flip] ^= 1
    return ChunkHeader(handle, 0, 8, len(payload), True).pack() + bytes(payload) + trailer


@pytest.mark.parametrize("flip", [0, -1])
def test_a_damaged_chunk_touches_no_block(checked: Line, flip: int) -> None:
    move, _ = groups(2, 1)
    before = [bytes(pool) for pool in move.sink.pools]
    checked.receiver.claim(1, 0, 8, move.extents(move.parts[0], 0, 8)[1])
    checked.one.sendall(by_hand(move, 1, flip))
    assert isinstance(checked.received.get(timeout=WAIT_S), te.Rejected)
    assert isinstance(checked.received.get(timeout=WAIT_S), te.StreamDown)
    assert move.sink.pools == before


@pytest.mark.parametrize("missing", [1, 9, 100])
def test_a_chunk_that_is_cut_short_touches_no_block(checked: Line, missing: int) -> None:
    move, _ = groups(2, 1)
    before = [bytes(pool) for pool in move.sink.pools]
    checked.receiver.claim(1, 0, 8, move.extents(move.parts[0], 0, 8)[1])
    checked.one.sendall(by_hand(move, 1)[:-missing])
    checked.one.close()
    assert isinstance(checked.received.get(timeout=WAIT_S), te.StreamDown)
    assert move.sink.pools == before


def test_a_chunk_that_nobody_claimed_any_more_touches_no_block(checked: Line) -> None:
    move, _ = groups(2, 1)
    before = [bytes(pool) for pool in move.sink.pools]
    for handle in (1, 2):
        checked.receiver.claim(handle, 0, 8, move.extents(move.parts[0], 0, 8)[1])
    assert checked.receiver.cancel(range(1, 2)) == [(1, 0)]
    checked.one.sendall(by_hand(move, 1))
    assert isinstance(checked.received.get(timeout=WAIT_S), te.Drained)
    assert move.sink.pools == before
    checked.one.sendall(by_hand(move, 2))
    assert isinstance(checked.received.get(timeout=WAIT_S), te.Received)
    assert move.sink.pools != before


class Slow:
    """Slices that look what was said before they were copied."""

    def __init__(self, payload: bytes, said: Events) -> None:
        self.payload_bytes = len(payload)
        self.payload = payload
        self.said = said
        self.said_before: list[bool] = []
        self.got = b""

    def gather(self, out: memoryview) -> None:
        self.said_before.append(not self.said.empty())
        out[:] = self.payload

    def scatter(self, data: memoryview) -> None:
        self.said_before.append(not self.said.empty())
        self.got = bytes(data)


def test_it_is_received_when_the_blocks_hold_it_and_sent_when_the_bytes_have_left(
    line: Line,
) -> None:
    payload = bytes(range(256)) * (32 << 12)  # far more than a socket buffers
    source, sink = Slow(payload, line.sent), Slow(payload, line.received)
    sender = line.send()
    sender.put(SendJob("owner", 1, 0, 4, source))  # nobody claims it: it is read aside
    assert line.sent.get(timeout=WAIT_S) == te.Sent("key", "owner", 0, len(payload))
    assert line.received.get(timeout=WAIT_S) == te.Drained("key", len(payload))
    line.receiver.claim(1, 0, 4, sink)
    sender.put(SendJob("owner", 1, 0, 4, source))
    assert line.received.get(timeout=WAIT_S) == te.Received("key", 1, 0, len(payload))
    assert sink.got == payload
    assert (source.said_before, sink.said_before) == ([False, False], [False])
    sender.close()


def test_nothing_is_said_of_a_chunk_that_does_not_leave() -> None:
    one, far = socket.socketpair()
    sent = Events()
    source = Slow(bytes(64 << 20), sent)
    sender = StreamSender(one, "key", sent.put, checksum=False)
    sender.put(SendJob("owner", 1, 0, 4, source))
    assert far.recv(1000)
    assert sent.empty()
    far.close()
    assert isinstance(sent.get(timeout=WAIT_S), te.StreamDown)
    assert sent.empty()


def test_a_smaller_chunk_after_a_larger_one_is_its_own(line: Line) -> None:
    """The buffer is used again; what it held before does not show."""
    payloads = [bytes([number]) * size for number, size in enumerate((3000, 10, 5000, 1, 2999))]
    sinks = [Slow(payload, line.received) for payload in payloads]
    for number, sink in enumerate(sinks):
        line.receiver.claim(1, number, 4, sink)
    sender = line.send()
    for number, payload in enumerate(payloads):
        sender.put(SendJob("owner", 1, number, 4, Slow(payload, line.sent)))
    for _ in payloads:
        assert isinstance(line.received.get(timeout=WAIT_S), te.Received)
    assert [sink.got for sink in sinks] == payloads
    sender.close()


class Broken(Slow):
    """Slices whose copies fail: no memory, no numpy, a mistake of ours."""

    def gather(self, out: memoryview) -> None:
        raise MemoryError("no room")

    def scatter(self, data: memoryview) -> None:
        raise MemoryError("no room")


def test_a_copy_that_fails_ends_its_stream_and_says_why(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    """It was "closed by the other side", which sends people to look at the wrong daemon."""
    good, bad = Slow(b"0123", line.sent), Broken(b"0123", line.sent)
    line.receiver.claim(1, 0, 4, bad)
    sender = line.send()
    sender.put(SendJob("owner", 1, 0, 4, good))
    assert line.sent.get(timeout=WAIT_S) == te.Sent("key", "owner", 0, 4)
    down = line.received.get(timeout=WAIT_S)
    assert isinstance(down, te.StreamDown), "nothing is received that is not in the blocks"
    assert "no room" in down.reason
    down = line.sent.get(timeout=WAIT_S)
    assert isinstance(down, te.StreamDown)
    assert "closed" in down.reason
    assert [record.name.rpartition(".")[2] for record in caplog.records] == ["receiver"]


def test_a_source_that_cannot_copy_says_why(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    sender = line.send()
    sender.put(SendJob("owner", 1, 0, 4, Broken(b"0123", line.sent)))
    down = line.sent.get(timeout=WAIT_S)
    assert isinstance(down, te.StreamDown)
    assert "no room" in down.reason
    assert isinstance(line.received.get(timeout=WAIT_S), te.StreamDown)
    assert [record.name.rpartition(".")[2] for record in caplog.records] == ["sender"]
