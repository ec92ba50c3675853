"""The thread that sends: it ends when told to, once, and reads nothing afterwards."""

import os
import queue
import select
import socket
import threading
from collections.abc import Iterator

import pytest
import xxhash

from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp.receiver import StreamReceiver
from kvferry_daemon.transports.tcp.sender import PLAIN_STEP_BYTES, SendJob, StreamSender
from kvferry_proto.chunk import HEADER_BYTES, ChunkHeader, pack_trailer, read_header

WAIT_S = 10.0
PROMPT_S = 2.0
MANY_BYTES = 64 << 20  # far more than any socket buffers
Events = queue.Queue[te.StreamEvent]


class Line:
    """A sender, the socket at the other end, and what the sender posts."""

    def __init__(self, checksum: bool = True) -> None:
        one, self.far = socket.socketpair()
        self.far.settimeout(WAIT_S)
        self.events: Events = queue.Queue()
        self._before = set(threading.enumerate())
        self.sender = StreamSender(one, "key", self.events.put, checksum)
        [self.thread] = set(threading.enumerate()) - self._before

    def put(self, payload: bytes | bytearray, handle: int = 1, first_token: int = 0) -> None:
        self.sender.put(SendJob("owner", handle, first_token, 4, [memoryview(payload)]))

    def chunk(self) -> tuple[ChunkHeader, bytes]:
        """The next chunk, with its trailer taken off and checked."""
        header = read_header(self._read(HEADER_BYTES))
        payload = self._read(header.payload_bytes)
        if header.has_checksum:
            assert self._read(8) == pack_trailer(xxhash.xxh3_64(payload).intdigest())
        return header, payload

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.far.recv(size - len(data))
            assert part, "it ended"
            data += part
        return data

    def ended(self) -> te.StreamDown:
        """Wait until the thread has ended: it said so exactly once, as its last word."""
        self.thread.join(PROMPT_S)
        assert not self.thread.is_alive()
        posted = [self.events.get_nowait() for _ in range(self.events.qsize())]
        downs = [event for event in posted if isinstance(event, te.StreamDown)]
        assert len(downs) == 1
        assert posted[-1] is downs[0]
        return downs[0]


@pytest.fixture
def line() -> Iterator[Line]:
    one = Line()
    yield one
    one.sender.close()
    one.far.close()
    one.thread.join(WAIT_S)


def test_a_reader_that_never_reads_does_not_hold_up_the_end(line: Line) -> None:
    line.put(bytes(MANY_BYTES))
    line.put(bytes(MANY_BYTES), first_token=4)
    assert line.far.recv(HEADER_BYTES, socket.MSG_PEEK | socket.MSG_WAITALL)  # it is under way
    assert line.events.empty()  # and stuck, or soon: no buffer takes so much
    line.sender.close()
    line.thread.join(PROMPT_S)
    assert not line.thread.is_alive()
    assert isinstance(line.events.get_nowait(), te.StreamDown)
    assert line.events.empty()


def test_an_idle_sender_ends_when_told_however_often(line: Line) -> None:
    line.sender.close()
    line.sender.close()
    line.ended()
    line.sender.close()
    line.put(b"late")  # its news crossed our close
    assert line.events.empty()


def test_it_ends_when_the_other_side_closes(line: Line) -> None:
    line.put(b"abc")
    assert line.chunk()[1] == b"abc"
    assert isinstance(line.events.get(timeout=WAIT_S), te.Sent)
    line.far.close()
    assert line.ended().reason == "closed by the other side"


def test_it_ends_when_the_other_side_closes_in_the_middle_of_a_chunk(line: Line) -> None:
    line.put(bytes(MANY_BYTES))
    line.put(b"never sent", first_token=4)
    assert line.far.recv(1000)
    line.far.close()
    line.thread.join(PROMPT_S)
    assert isinstance(line.events.get_nowait(), te.StreamDown)
    assert line.events.empty()


def test_a_sink_that_talks_on_its_stream_is_cut_off(line: Line) -> None:
    line.far.sendall(b"hello?")
    line.ended()


@pytest.mark.parametrize("checksum", [True, False])
def test_chunks_go_out_in_order_and_are_told_once_each(checksum: bool) -> None:
    line = Line(checksum)
    payloads = [bytes([number]) * (1 + 700 * number) for number in range(200)]
    for number, payload in enumerate(payloads):
        line.put(payload, first_token=number)
    for number, payload in enumerate(payloads):
        assert line.chunk() == (ChunkHeader(1, number, 4, len(payload), checksum), payload)
    for number, payload in enumerate(payloads):
        told = line.events.get(timeout=WAIT_S)
        assert told == te.Sent("key", "owner", number, len(payload))
    line.far.close()
    line.ended()


def test_every_wake_up_counts(line: Line) -> None:
    """One job at a time, each once the thread has gone to sleep or is about to."""
    for number in range(2000):
        line.put(b"x", first_token=number)
        assert line.chunk()[0].first_token == number
        assert line.events.get(timeout=WAIT_S) == te.Sent("key", "owner", number, 1)


def test_thousands_of_pieces_are_one_chunk_on_both_ends() -> None:
    """More pieces than one call of the kernel takes."""
    one, two = socket.socketpair()
    sent: Events = queue.Queue()
    received: Events = queue.Queue()
    source = os.urandom(5003)
    target = bytearray(len(source))
    receiver = StreamReceiver(two, "key", received.put)
    sender = StreamSender(one, "key", sent.put, checksum=True)
    into = memoryview(target)
    receiver.claim(1, 0, 4, [into[at : at + 1] for at in range(len(target))])
    out_of = memoryview(source)
    sender.put(SendJob("owner", 1, 0, 4, [out_of[at : at + 1] for at in range(len(source))]))
    assert received.get(timeout=WAIT_S) == te.Received("key", 1, 0, len(source))
    assert target == source
    sender.close()
    assert isinstance(received.get(timeout=WAIT_S), te.StreamDown)


@pytest.mark.parametrize("size", [600_000, (8 << 20) + 600_000])
def test_sent_means_that_nothing_is_read_any_more(line: Line, size: int) -> None:
    """Until then the kernel has not got all bytes; from then on the block may be another's."""
    payload = bytearray(os.urandom(size))
    before = bytes(payload)
    line.put(payload)
    assert select.select([line.far], [], [], WAIT_S)[0]
    assert line.events.empty()  # a part of it is still in the pool
    header, got = line.chunk()
    assert line.events.get(timeout=WAIT_S) == te.Sent("key", "owner", 0, len(payload))
    payload[:] = bytes(len(payload))
    assert got == before
    assert header.payload_bytes == len(before)


def test_a_sender_leaves_no_descriptor_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(20):
        line = Line()
        line.far.close()
        line.ended()
    assert descriptors() == before


@pytest.mark.parametrize("checksum", [True, False])
def test_what_has_left_is_told_while_more_is_queued(checksum: bool) -> None:
    """With large chunks and checksums it was told when the queue had run dry."""
    line = Line(checksum=checksum)
    payload = bytearray(PLAIN_STEP_BYTES)
    for number in range(64):
        line.put(payload, first_token=number)
    for _ in range(3):  # by then the first has left; the last are far from it
        line.chunk()
    assert line.events.get(timeout=WAIT_S) == te.Sent("key", "owner", 0, PLAIN_STEP_BYTES)
    line.sender.close()
    line.far.close()
    line.ended()
