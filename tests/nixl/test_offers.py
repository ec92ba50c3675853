"""The threads at both ends of a connection on which blocks are offered, over real NIXL agents."""

import ctypes
import mmap
import queue
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from kvferry_daemon.transports.nixl.agent import Memory
from kvferry_daemon.transports.nixl.poller import Poller
from kvferry_daemon.transports.nixl.receiver import POOLS_MAX, OfferReceiver
from kvferry_daemon.transports.nixl.sender import OfferSender
from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp.sender import SendJob
from kvferry_daemon.transports.tcp.staging import Blocks
from kvferry_proto.offer import (
    FRAME_BYTES,
    POOL_BLOCKS_MAX,
    ByeFrame,
    Frame,
    OfferFrame,
    PoolFrame,
    ReadFrame,
    StoodFrame,
    read_frame,
)

pytest.importorskip("nixl", reason="NIXL is not installed")

WAIT_S = 20.0
BLOCK = 4096
BLOCKS = 64


@dataclass
class End:
    """A pool of one side, and what its thread posts."""

    pool_id: str
    memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, BLOCK * BLOCKS))
    poller: Poller = field(default_factory=Poller)
    events: "queue.Queue[te.StreamEvent]" = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.anchor = (ctypes.c_char * len(self.memory)).from_buffer(self.memory)
        address = ctypes.addressof(self.anchor)
        self.poller.add_pool(self.pool_id, Memory(address, BLOCK, BLOCKS, self.anchor))
        self.poller.revoke(self.pool_id, 0).result(WAIT_S)  # behind it: the pool is registered

    def block(self, number: int) -> bytes:
        return self.memory[number * BLOCK : (number + 1) * BLOCK]

    def fill(self, number: int, byte: int) -> None:
        self.memory[number * BLOCK : (number + 1) * BLOCK] = bytes([byte]) * BLOCK

    def next(self) -> te.StreamEvent:
        return self.events.get(timeout=WAIT_S)


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[End, End]]:
    ends = End("of-source"), End("of-sink")
    yield ends
    for end in ends:
        end.poller.close()


def connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        two, _ = server.accept()
    return one, two


@dataclass
class Line:
    """A sender and a receiver behind one connection."""

    source: End
    sink: End

    def __post_init__(self) -> None:
        one, two = connection()
        self.source.events, self.sink.events = queue.Queue(), queue.Queue()
        self.sender = OfferSender(one, "key", self.source.events.put, True, self.source.poller)
        self.receiver = OfferReceiver(two, "key", self.sink.events.put, self.sink.poller)

    def claim(self, first: int, runs: tuple[tuple[int, int], ...]) -> None:
        blocks = Blocks(self.sink.pool_id, runs)
        views = [memoryview(self.sink.memory)[a * BLOCK : (a + n) * BLOCK] for a, n in runs]
        self.receiver.claim(1, first, 4, views, blocks)

    def offer(self, first: int, runs: tuple[tuple[int, int], ...], payload: bytes) -> None:
        """``payload`` is what would go if the bytes were sent after all."""
        blocks = Blocks(self.source.pool_id, runs)
        self.sender.put(SendJob("owner", 1, first, 4, [memoryview(payload)], blocks))

    def end(self) -> None:
        self.receiver.close()
        for end in (self.sink, self.source):
            while not isinstance(end.next(), te.StreamDown):
                pass


@pytest.fixture
def line(pools: tuple[End, End]) -> Iterator[Line]:
    for end in pools:
        for number in range(BLOCKS):
            end.fill(number, 0)
    line = Line(*pools)
    yield line
    line.end()


def test_the_sink_reads_scattered_blocks_into_other_ones(line: Line) -> None:
    for number, byte in ((3, 1), (4, 2), (9, 3)):
        line.source.fill(number, byte)
    line.claim(0, ((60, 1), (7, 2)))
    line.offer(0, ((3, 2), (9, 1)), b"x" * 3 * BLOCK)
    assert line.sink.next() == te.Received("key", 1, 0, 3 * BLOCK)
    assert line.source.next() == te.Sent("key", "owner", 0, 3 * BLOCK)
    assert [line.sink.block(n)[0] for n in (60, 7, 8)] == [1, 2, 3]
    assert [line.sink.block(n) for n in (6, 9, 61)] == [bytes(BLOCK)] * 3


def test_what_nobody_claimed_is_not_read_and_the_source_may_go_on(line: Line) -> None:
    line.source.fill(3, 1)
    line.offer(0, ((3, 1),), b"x" * BLOCK)
    assert line.source.next() == te.Sent("key", "owner", 0, BLOCK)
    assert line.sink.next() == te.Drained("key", 0)
    assert line.sink.memory[:] == bytes(BLOCK * BLOCKS)


def test_a_claim_of_other_blocks_is_not_filled(line: Line) -> None:
    line.claim(0, ((7, 2),))
    line.offer(0, ((3, 1),), b"x" * BLOCK)
    assert line.sink.next() == te.Drained("key", 0)
    assert line.receiver.cancel(range(1, 2)) == [(1, 0)]  # it stands, for who brings all of it


def test_what_is_not_in_whole_blocks_goes_as_a_chunk_between_offers(line: Line) -> None:
    line.source.fill(3, 1)
    line.claim(0, ((7, 1),))
    line.claim(4, ((8, 1),))
    line.claim(8, ((9, 1),))
    line.offer(0, ((3, 1),), b"x" * BLOCK)
    line.sender.put(SendJob("owner", 1, 4, 4, [memoryview(b"\5" * BLOCK)]))
    line.offer(8, ((3, 1),), b"x" * BLOCK)
    firsts = set()
    for _ in range(3):
        event = line.sink.next()
        assert isinstance(event, te.Received)
        firsts.add(event.first_token)
    assert firsts == {0, 4, 8}
    assert [line.sink.block(n)[0] for n in (7, 8, 9)] == [1, 5, 1]


class Hand:
    """A sink by hand, behind a real sender."""

    def __init__(self, source: End) -> None:
        one, self.sock = connection()
        self.sock.settimeout(WAIT_S)
        source.events = queue.Queue()
        before = set(threading.enumerate())
        self.sender = OfferSender(one, "key", source.events.put, True, source.poller)
        [self.thread] = set(threading.enumerate()) - before
        blocks = Blocks(source.pool_id, ((3, 1),))
        self.sender.put(SendJob("owner", 1, 0, 4, [memoryview(b"x" * BLOCK)], blocks))
        self.pool = self.frame()
        self.offer = self.frame()
        assert isinstance(self.offer, OfferFrame)

    def frame(self) -> object:
        found = read_frame(self._read(FRAME_BYTES))
        assert found is not None
        self._read(found[1])
        return found[0]

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            assert part, "it ended"
            data += part
        return data

    def still_waits(self) -> bool:
        """Whether the sender has sent its last byte, and still lives."""
        assert self.sock.recv(1) == b""
        self.thread.join(0.1)
        return self.thread.is_alive()


@pytest.fixture
def source(pools: tuple[End, End]) -> End:
    return pools[0]


def test_a_pool_is_shown_before_its_first_offer_only(source: End) -> None:
    hand = Hand(source)
    assert isinstance(hand.pool, PoolFrame)
    assert (hand.pool.block_bytes, hand.pool.blocks) == (BLOCK, BLOCKS)
    blocks = Blocks(source.pool_id, ((5, 2),))
    hand.sender.put(SendJob("owner", 1, 4, 4, [memoryview(b"x" * 2 * BLOCK)], blocks))
    assert hand.frame() == OfferFrame(1, 4, 4, hand.pool.number, ())
    hand.sock.sendall(ReadFrame(1, 4).pack())
    assert source.next() == te.Sent("key", "owner", 4, 2 * BLOCK)
    assert hand.frame() == StoodFrame(1, 4)
    hand.sock.close()
    assert isinstance(source.next(), te.StreamDown)


@pytest.mark.parametrize("word", [ReadFrame(1, 0).pack(), ByeFrame().pack(), b""])
def test_an_ended_connection_keeps_its_blocks_until_the_sink_says_so(
    source: End, word: bytes
) -> None:
    hand = Hand(source)
    before = source.poller.frame_of(source.pool_id)
    hand.sender.close()
    assert hand.still_waits()
    assert source.events.empty()
    if word:
        hand.sock.sendall(word)
    else:
        hand.sock.close()
    last = source.next()
    if word == ReadFrame(1, 0).pack():
        assert last == te.Sent("key", "owner", 0, BLOCK)
        last = source.next()
    assert isinstance(last, te.StreamDown)
    assert source.poller.frame_of(source.pool_id) == before  # nobody had to be shut out
    hand.sock.close()


def test_a_sink_that_cannot_be_asked_any_more_is_shut_out(source: End) -> None:
    hand = Hand(source)
    before = source.poller.frame_of(source.pool_id)
    hand.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    hand.sock.close()  # a reset: the network's word, not the sink's
    assert isinstance(source.next(), te.StreamDown)
    after = source.poller.frame_of(source.pool_id)
    assert before is not None
    assert after is not None
    assert before.number < after.number
    assert before.metadata != after.metadata


@pytest.mark.parametrize(
    "word", [ReadFrame(1, 4).pack(), StoodFrame(1, 0).pack(), b"hello" + bytes(59)]
)
def test_a_sink_that_says_what_it_may_not_is_shut_out(source: End, word: bytes) -> None:
    hand = Hand(source)
    before = source.poller.frame_of(source.pool_id)
    hand.sock.sendall(word)
    assert isinstance(source.next(), te.StreamDown)
    assert source.poller.frame_of(source.pool_id) != before
    hand.sock.close()


def test_a_sink_whose_pool_was_shut_out_of_hears_it_and_may_read_anew(
    pools: tuple[End, End],
) -> None:
    source, sink = pools
    line = Line(source, sink)
    line.claim(0, ((7, 1),))
    line.offer(0, ((3, 1),), b"x" * BLOCK)
    assert isinstance(sink.next(), te.Received)
    frame = source.poller.frame_of(source.pool_id)
    assert frame is not None
    source.poller.revoke(source.pool_id, frame.number).result(WAIT_S)
    source.fill(4, 9)
    line.claim(4, ((8, 1),))
    line.offer(4, ((4, 1),), b"x" * BLOCK)  # the pool is shown anew before it
    assert sink.next() == te.Received("key", 1, 4, BLOCK)
    assert sink.block(8) == bytes([9]) * BLOCK
    line.end()


class Source:
    """A source by hand, before a real receiver."""

    def __init__(self, source: End, sink: End) -> None:
        frame = source.poller.frame_of(source.pool_id)
        assert frame is not None
        self.frame = frame
        self.sock, two = connection()
        self.sock.settimeout(WAIT_S)
        sink.events = queue.Queue()
        self.receiver = OfferReceiver(two, "key", sink.events.put, sink.poller)
        views = [memoryview(sink.memory)[7 * BLOCK : 8 * BLOCK]]
        self.receiver.claim(1, 0, 4, views, Blocks(sink.pool_id, ((7, 1),)))
        self.source = source
        source.poller.offered(source.pool_id)  # so that reads are served
        self.say(frame)

    def close(self) -> None:
        self.sock.close()
        self.source.poller.answered(self.source.pool_id)

    def say(self, *frames: Frame) -> None:
        self.sock.sendall(b"".join([frame.pack() for frame in frames]))

    def hear(self) -> object:
        data = self.sock.recv(FRAME_BYTES, socket.MSG_WAITALL)
        found = read_frame(data) if data else None
        return found[0] if found else None


def test_a_stood_before_the_read_counts_for_nothing(pools: tuple[End, End]) -> None:
    """Else the tokens would count, and their blocks be somebody else's, while they are written."""
    source, sink = pools
    hand = Source(source, sink)
    offer = OfferFrame(1, 0, 4, hand.frame.number, ((3, 1),))
    hand.say(StoodFrame(1, 0), offer, StoodFrame(1, 0), offer)
    assert hand.hear() == ReadFrame(1, 0)
    assert hand.hear() == ReadFrame(1, 0)  # of the second offer, which nobody claimed any more
    assert sink.next() == te.Drained("key", 0)
    assert sink.events.empty()
    hand.say(StoodFrame(1, 0))
    assert sink.next() == te.Received("key", 1, 0, BLOCK)
    hand.close()
    assert isinstance(sink.next(), te.StreamDown)


def test_a_read_that_fails_ends_its_connection_and_the_next_one_reads(
    pools: tuple[End, End],
) -> None:
    source, sink = pools
    hand = Source(source, sink)
    bad = hand.frame._replace(number=99, metadata=b"what no agent has said")
    hand.say(bad, OfferFrame(1, 0, 4, 99, ((3, 1),)))
    refused = sink.next()
    assert isinstance(refused, te.Rejected)
    assert isinstance(sink.next(), te.StreamDown)
    assert hand.hear() == ByeFrame()
    hand.close()
    source.fill(3, 7)
    line = Line(source, sink)
    line.claim(0, ((7, 1),))
    line.offer(0, ((3, 1),), b"x" * BLOCK)
    assert sink.next() == te.Received("key", 1, 0, BLOCK)
    assert sink.block(7) == bytes([7]) * BLOCK
    line.end()


@pytest.mark.parametrize(("blocks", "shown"), [(1, POOLS_MAX), (POOL_BLOCKS_MAX // 4, 4)])
def test_a_source_that_shows_pool_after_pool_is_cut_off(
    pools: tuple[End, End], blocks: int, shown: int
) -> None:
    """Who reads keeps 24 bytes of every block that it was shown, until the connection ends."""
    source, sink = pools
    hand = Source(source, sink)  # which shows one
    for number in range(1, shown + 1):
        hand.say(hand.frame._replace(number=number, blocks=blocks))
    down = sink.next()
    assert isinstance(down, te.StreamDown)
    assert "too many pools" in down.reason
    hand.close()


def test_a_sink_that_gives_two_extents_one_name_is_cut_off(source: End) -> None:
    hand = Hand(source)
    blocks = Blocks(source.pool_id, ((5, 1),))
    hand.sender.put(SendJob("other", 1, 0, 4, [memoryview(b"x" * BLOCK)], blocks))
    down = source.next()
    assert isinstance(down, te.StreamDown)
    assert "names two extents" in down.reason
    hand.sock.close()


def test_a_reset_between_read_and_stood_leaves_no_offer_open(source: End) -> None:
    hand = Hand(source)
    hand.sock.sendall(ReadFrame(1, 0).pack())
    hand.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    hand.sock.close()
    while not isinstance(source.next(), te.StreamDown):
        pass
    source.poller.revoke(source.pool_id, 0).result(WAIT_S)  # behind what was put before
    assert not source.poller._offers


def test_an_offer_from_outside_of_the_pool_ends_the_connection(pools: tuple[End, End]) -> None:
    source, sink = pools
    frame = source.poller.frame_of(source.pool_id)
    assert frame is not None
    one, two = connection()
    sink.events = queue.Queue()
    receiver = OfferReceiver(two, "key", sink.events.put, sink.poller)
    receiver.claim(1, 0, 4, [memoryview(bytearray(BLOCK))], Blocks(sink.pool_id, ((7, 1),)))
    one.sendall(frame.pack() + OfferFrame(1, 0, 4, frame.number, ((BLOCKS, 1),)).pack())
    down = sink.next()
    assert isinstance(down, te.StreamDown)
    assert "blocks 64 to 65 of a pool of 64" in down.reason
    one.close()
