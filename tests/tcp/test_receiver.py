"""What may come over a line that is no chunk we wait for: unclaimed, damaged, cut."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import xxhash

from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp import listener
from kvferry_daemon.transports.tcp.listener import ConnectError, connect
from kvferry_daemon.transports.tcp.receiver import StreamReceiver
from kvferry_proto.chunk import (
    GREETING_BYTES,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    TRAILER_BYTES,
    ChunkHeader,
    pack_trailer,
)

WAIT_S = 10.0
ONE = range(1, 2)  # the handle of the first claim
SIZE = 100_000
PAYLOAD = bytes(range(1, 251)) * (SIZE // 250)  # no zero: what arrived can be told from nothing
Events = queue.Queue[te.StreamEvent]


def chunk(payload: bytes = PAYLOAD, handle: int = 1, first_token: int = 0) -> bytes:
    """A chunk by hand."""
    header = ChunkHeader(handle, first_token, 4, len(payload), has_checksum=True).pack()
    return header + payload + pack_trailer(xxhash.xxh3_64(payload).intdigest())


def until(condition: Callable[[], object]) -> None:
    """Look until it holds."""
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


class Line:
    """A receiver with one claim for tokens 0 to 4, and the socket at the other end."""

    def __init__(self) -> None:
        self.far, two = socket.socketpair()
        self.events: Events = queue.Queue()
        self.target = bytearray(SIZE)
        before = set(threading.enumerate())
        self.receiver = StreamReceiver(two, "key", self.events.put)
        [self.thread] = set(threading.enumerate()) - before
        self.claim()

    def claim(self, handle: int = 1, first_token: int = 0) -> None:
        self.receiver.claim(handle, first_token, 4, [memoryview(self.target)])

    def next(self) -> te.StreamEvent:
        return self.events.get(timeout=WAIT_S)

    def ended(self) -> list[te.StreamEvent]:
        """All that was posted until the thread ended: exactly one StreamDown, at the end."""
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        posted = [self.events.get_nowait() for _ in range(self.events.qsize())]
        assert [isinstance(event, te.StreamDown) for event in posted].count(True) == 1
        assert isinstance(posted[-1], te.StreamDown)
        return posted


@pytest.fixture
def line() -> Iterator[Line]:
    one = Line()
    yield one
    one.receiver.close()
    one.far.close()
    one.thread.join(WAIT_S)


def test_a_claim_taken_back_in_time_is_never_written(line: Line) -> None:
    line.claim(first_token=4)
    line.claim(handle=2)
    assert sorted(line.receiver.cancel(ONE)) == [(1, 0), (1, 4)]
    assert line.receiver.cancel(ONE) == []
    line.far.sendall(chunk() + chunk(first_token=4))
    assert [line.next(), line.next()] == [te.Drained("key", SIZE)] * 2
    assert not any(line.target)
    line.far.sendall(chunk(handle=2))  # the other transfer's claim and the stream still stand
    assert line.next() == te.Received("key", 2, 0, SIZE)
    assert line.target == PAYLOAD


def test_a_chunk_that_is_being_received_cannot_be_taken_back(line: Line) -> None:
    data = chunk()
    line.far.sendall(data[: SIZE // 2])
    until(lambda: line.target[0])
    assert line.receiver.cancel(ONE) == []
    assert line.events.empty()
    line.far.sendall(data[SIZE // 2 :])
    assert line.next() == te.Received("key", 1, 0, SIZE)
    assert line.target == PAYLOAD


def test_a_chunk_is_taken_once(line: Line) -> None:
    line.far.sendall(chunk())
    assert line.next() == te.Received("key", 1, 0, SIZE)
    line.target[:] = bytes(SIZE)
    line.far.sendall(chunk())
    assert line.next() == te.Drained("key", SIZE)
    assert not any(line.target)


@pytest.mark.parametrize(("handle", "first_token"), [(2, 0), (1, 4), (1 << 63, 1 << 62)])
def test_a_chunk_that_nobody_knows_is_read_aside(line: Line, handle: int, first_token: int) -> None:
    line.far.sendall(chunk(handle=handle, first_token=first_token) + chunk())
    assert line.next() == te.Drained("key", SIZE)
    assert line.next() == te.Received("key", 1, 0, SIZE)


@pytest.mark.parametrize("tokens", [3, 5, 1 << 32])
def test_a_chunk_of_another_number_of_tokens_is_read_aside(line: Line, tokens: int) -> None:
    line.far.sendall(ChunkHeader(1, 0, tokens, SIZE, has_checksum=False).pack() + PAYLOAD)
    assert line.next() == te.Drained("key", SIZE)
    assert line.receiver.cancel(ONE) == [(1, 0)]  # the claim still waits for its own
    assert not any(line.target)


@pytest.mark.parametrize("size", [0, PAYLOAD_BYTES_MAX + 1, (1 << 64) - 1])
def test_an_absurd_size_ends_the_stream(line: Line, size: int) -> None:
    line.far.sendall(ChunkHeader(1, 0, 4, size, has_checksum=True).pack())
    [down] = line.ended()
    assert isinstance(down, te.StreamDown)
    assert f"{size} bytes" in down.reason


def test_the_largest_size_costs_no_memory(line: Line) -> None:
    """Its bytes would be read aside; the end of the line is the end of it, and no event."""
    line.far.sendall(ChunkHeader(9, 0, 4, PAYLOAD_BYTES_MAX, has_checksum=True).pack())
    line.far.sendall(bytes(3 << 20))
    line.far.close()
    [down] = line.ended()
    assert isinstance(down, te.StreamDown)
    assert "inside a chunk" in down.reason


@pytest.mark.parametrize("at", [0, SIZE // 2, SIZE - 1, SIZE, SIZE + TRAILER_BYTES - 1])
def test_a_damaged_byte_is_rejected_and_ends_the_stream(line: Line, at: int) -> None:
    data = bytearray(chunk())
    data[HEADER_BYTES + at] ^= 0x10
    line.claim(first_token=4)
    line.far.sendall(data)
    rejected, _ = line.ended()
    assert isinstance(rejected, te.Rejected)
    assert (rejected.handle, rejected.first_token) == (1, 0)
    assert line.receiver.cancel(ONE) == []  # the other claim ended with the stream


@pytest.mark.parametrize(
    "at",
    [
        1,
        HEADER_BYTES - 1,
        HEADER_BYTES,
        HEADER_BYTES + SIZE // 2,
        HEADER_BYTES + SIZE,
        HEADER_BYTES + SIZE + TRAILER_BYTES - 1,
    ],
)
def test_a_connection_cut_inside_a_chunk_brings_nothing(line: Line, at: int) -> None:
    line.far.sendall(chunk()[:at])
    line.far.close()
    [down] = line.ended()
    assert isinstance(down, te.StreamDown)
    assert "inside a chunk" in down.reason


def test_a_connection_cut_between_two_chunks_has_brought_the_first(line: Line) -> None:
    line.far.sendall(chunk())
    line.far.close()
    received, down = line.ended()
    assert received == te.Received("key", 1, 0, SIZE)
    assert isinstance(down, te.StreamDown)
    assert down.reason == "closed by the other side"


@pytest.mark.parametrize("sent", [0, 10, HEADER_BYTES + 10])
def test_close_ends_it_wherever_it_waits(line: Line, sent: int) -> None:
    line.far.sendall(chunk()[:sent])
    line.receiver.close()
    line.receiver.close()
    assert len(line.ended()) == 1
    line.receiver.close()
    assert line.events.empty()


# --- how a connection comes about ---


@pytest.mark.parametrize(
    ("says", "why"),
    [(b"HTTP/1.1 400 Bad\r\n", "no kvferry data port"), (b"KVFA", "no kvferry data port")],
)
def test_another_kind_of_server_is_named(says: bytes, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as sock:
                sock.recv(GREETING_BYTES, socket.MSG_WAITALL)
                sock.sendall(says)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConnectError, match=why):
            connect("127.0.0.1", server.getsockname()[1], bytes(32), WAIT_S)
        thread.join(WAIT_S)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began_s = time.monotonic()
        with pytest.raises(ConnectError, match=r"too slow|timed out"):
            connect("127.0.0.1", server.getsockname()[1], bytes(32), WAIT_S)
        assert time.monotonic() - began_s < WAIT_S / 2
