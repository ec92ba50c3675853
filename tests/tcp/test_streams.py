"""The threads of a data connection over a real socket pair."""

import itertools
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

WAIT_S = 10
Events = queue.Queue[te.StreamEvent]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, StreamReceiver, Events]]:
    """The sending socket, the receiver behind the other end, and what it posts."""
    one, two = socket.socketpair()
    events: Events = queue.Queue()
    receiver = StreamReceiver(two, "key", events.put)
    yield one, receiver, events
    receiver.close()
    one.close()
    while not isinstance(events.get(timeout=WAIT_S), te.StreamDown):
        pass


def chunk(payload: bytes, first_token: int = 0, flip: int | None = None) -> bytes:
    """A chunk by hand; ``flip`` damages one byte of the payload."""
    header = ChunkHeader(1, first_token, 4, len(payload), has_checksum=True).pack()
    trailer = pack_trailer(xxhash.xxh3_64(payload).intdigest())
    damaged = bytearray(payload)
    if flip is not None:
        damaged[flip] ^= 1
    return header + bytes(damaged) + trailer


@pytest.mark.parametrize("checksum", [True, False])
def test_scattered_pieces_arrive_in_their_places(checksum: bool) -> None:
    one, two = socket.socketpair()
    sent, received = Events(), Events()
    source = bytearray(range(256)) * 40_000
    target = bytearray(len(source))
    sender = StreamSender(one, "key", sent.put, checksum)
    receiver = StreamReceiver(two, "key", received.put)
    half = len(source) // 2
    for number, cuts in enumerate([(0, 7, half), (half, half + 1, len(source))]):
        views = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        receiver.claim(1, number, 4, [memoryview(target)[view] for view in views])
        sender.put(SendJob("owner", 1, number, 4, [memoryview(source)[view] for view in views]))
    for number in (0, 1):
        assert sent.get(timeout=WAIT_S) == te.Sent("key", "owner", number, half)
        assert received.get(timeout=WAIT_S) == te.Received("key", 1, number, half)
    assert target == source
    sender.close()
    assert isinstance(sent.get(timeout=WAIT_S), te.StreamDown)
    assert isinstance(received.get(timeout=WAIT_S), te.StreamDown)


def test_a_damaged_byte_is_refused_and_ends_the_stream(
    ends: tuple[socket.socket, StreamReceiver, Events],
) -> None:
    sock, receiver, events = ends
    receiver.claim(1, 0, 4, [memoryview(bytearray(100))])
    sock.sendall(chunk(bytes(100), flip=50))
    assert isinstance(events.get(timeout=WAIT_S), te.Rejected)
    down = events.get(timeout=WAIT_S)
    assert isinstance(down, te.StreamDown)
    assert "checksum" in down.reason
    events.put(down)


def test_what_nobody_claimed_is_read_aside(
    ends: tuple[socket.socket, StreamReceiver, Events],
) -> None:
    sock, receiver, events = ends
    target = bytearray(100)
    receiver.claim(1, 0, 4, [memoryview(target)])
    assert receiver.cancel(range(1, 2)) == [(1, 0)]
    sock.sendall(chunk(b"x" * 100))
    assert events.get(timeout=WAIT_S) == te.Drained("key", 100)
    receiver.claim(1, 8, 4, [memoryview(target)])
    sock.sendall(chunk(b"x" * 99, first_token=8))  # another size than was claimed
    assert events.get(timeout=WAIT_S) == te.Drained("key", 99)
    assert target == bytes(100)


def test_a_damaged_header_ends_the_stream(
    ends: tuple[socket.socket, StreamReceiver, Events],
) -> None:
    sock, _, events = ends
    sock.sendall(b"\x00" + chunk(bytes(100))[1:64])
    down = events.get(timeout=WAIT_S)
    assert isinstance(down, te.StreamDown)
    events.put(down)


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_thread_that_moves_bytes_enters_its_place_first(side: str) -> None:
    one, two = socket.socketpair()
    entered: queue.Queue[str] = queue.Queue()
    events = Events()

    def enter() -> None:
        entered.put(threading.current_thread().name)

    end: StreamSender | StreamReceiver
    if side == "send":
        end = StreamSender(one, "key", events.put, True, enter)
    else:
        end = StreamReceiver(one, "key", events.put, enter)
    assert entered.get(timeout=WAIT_S) == f"kvferry-{side}"
    end.close()
    assert isinstance(events.get(timeout=WAIT_S), te.StreamDown)
    two.close()
