"""Two daemons over a line that we damage, cut and hold up."""

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from kvferry_daemon.transports.tcp.listener import ConnectError, connect
from kvferry_proto import peer, worker
from kvferry_proto.chunk import ACCEPT_BYTES, HEADER_BYTES, pack_greeting
from kvferry_proto.states import Role
from live import BOOT_ID, LiveDaemon, RawPeer, RawWorker
from tcp.relay import PAYLOAD_BYTES, WAIT_S, Scene, straight

PAYLOAD = ACCEPT_BYTES + HEADER_BYTES  # where the first chunk's bytes begin in a connection


class Once:
    """Does something to the piece that holds byte ``at`` of a connection, the first time only."""

    def __init__(self, at: int, act: Callable[[bytes, int], Iterator[bytes]]) -> None:
        self.at, self.act, self.done = at, act, False

    def __call__(self, place: int, data: bytes) -> Iterator[bytes]:
        if self.done or not place <= self.at < place + len(data):
            yield data
            return
        self.done = True
        yield from self.act(data, self.at - place)


def flip(data: bytes, at: int) -> Iterator[bytes]:
    yield data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def cut(data: bytes, at: int) -> Iterator[bytes]:
    yield data[:at]
    raise ConnectionError


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        one = Scene(stack, tmp_path)
        yield one
        if not one.consumer.context.closed:
            one.consumer.close()
        one.check_clean()


@pytest.mark.parametrize(
    ("at", "act", "says"),
    [
        (PAYLOAD, flip, "chunk refused: the checksum of the payload is wrong"),
        (PAYLOAD + PAYLOAD_BYTES // 2 + 1, flip, "chunk refused: the checksum of the payload"),
        (PAYLOAD + PAYLOAD_BYTES, flip, "chunk refused: the checksum of the payload is wrong"),
        (PAYLOAD - 30, flip, None),
        (1, flip, "is no kvferry data port"),
        (ACCEPT_BYTES // 2, cut, "is no kvferry data port"),
        (ACCEPT_BYTES + HEADER_BYTES // 2, cut, None),
        (PAYLOAD, cut, None),
        (PAYLOAD + PAYLOAD_BYTES // 2, cut, None),
        (PAYLOAD + PAYLOAD_BYTES + 3, cut, None),
    ],
)
def test_a_bad_moment_of_the_line_costs_a_connection_and_no_byte(
    scene: Scene, at: int, act: Callable[[bytes, int], Iterator[bytes]], says: str | None
) -> None:
    scene.line.to_sink = once = Once(at, act)
    scene.send()
    scene.check_arrived()
    assert once.done
    assert scene.line.connections == 2
    counters = scene.sink.status().counters
    assert counters["streams_closed"] == 1
    assert counters["bytes_received"] == PAYLOAD_BYTES  # damaged ones do not count
    if says is not None:
        scene.sink.wait_for_log(says)


def test_a_line_that_is_bad_again_and_again_is_opened_again_and_again(scene: Scene) -> None:
    def worse(place: int, data: bytes) -> Iterator[bytes]:
        bad = scene.line.connections <= 3 and place + len(data) > PAYLOAD
        yield from flip(data, len(data) - 1) if bad else straight(place, data)

    scene.line.to_sink = worse
    scene.send()
    scene.check_arrived()
    assert scene.line.connections == 4


def until_shown(consumer: RawWorker, first_block: bytes) -> None:
    """Look until the first block of the window has these bytes."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        runs = consumer.poll(Role.SINK).runs
        if runs and consumer.block(runs[0][0]) == first_block:
            return
    raise AssertionError("they never came")


@pytest.mark.parametrize("end", ["abort", "death"])
def test_blocks_that_a_held_up_chunk_is_written_to_are_free_once_its_line_is_closed(
    scene: Scene, end: str
) -> None:
    """Half a chunk came; nothing proves that the other half does not, but the closed stream."""
    halfway, gate = threading.Event(), threading.Event()

    def hold(data: bytes, at: int) -> Iterator[bytes]:
        yield data[:at]
        halfway.set()
        gate.wait(WAIT_S)
        yield data[at:]

    scene.line.to_sink = Once(PAYLOAD + PAYLOAD_BYTES // 2, hold)
    scene.send()
    assert halfway.wait(WAIT_S)
    until_shown(scene.consumer, scene.consumer.content(0))
    if end == "abort":
        scene.consumer.snapshot(worker.Abort(transfer_id="t", role=Role.SINK))
        scene.consumer.snapshot(worker.Release(transfer_id="t", role=Role.SINK))
    else:
        scene.consumer.close()
    counters = scene.sink.wait_until_free().counters  # as they were when that was first seen
    assert counters["streams_closed"] == 1
    assert "chunks_received" not in counters
    gate.set()
    if end == "death":
        scene.consumer = RawWorker(scene.sink.directory)
    scene.send("next")
    scene.check_arrived("next")


# --- a sink's daemon that we play ---


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[tuple[LiveDaemon, RawPeer]]:
    """A source's daemon, and a peer that has said hello."""
    with LiveDaemon(tmp_path / "a") as live:
        one = RawPeer(live.address)
        one.source = one.say(peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)).boot_id
        yield live, one
        one.close()


def test_a_connection_number_is_one_connection(raw: tuple[LiveDaemon, RawPeer]) -> None:
    _, sink = raw
    ask = peer.OpenStream(stream=0, connection=1, **sink.boots())
    tickets = [sink.say(ask) for _ in range(2)]
    admitted = []
    with ExitStack() as stack:
        for ticket in tickets:
            with suppress(ConnectError):
                sock = connect("127.0.0.1", ticket.port, ticket.ticket, WAIT_S)
                admitted.append(stack.enter_context(sock))
        assert admitted
        ended = select.select(admitted, [], [], 0.5)[0]  # nothing is asked for, nothing else comes
        assert len(admitted) - len(ended) == 1


def test_sinks_that_vanish_in_their_greeting_cost_nothing(
    raw: tuple[LiveDaemon, RawPeer],
) -> None:
    live, sink = raw
    descriptors = Path(f"/proc/{live.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for number in range(60):
        ticket = sink.say(peer.OpenStream(stream=0, connection=number, **sink.boots()))
        with socket.create_connection(("127.0.0.1", ticket.port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(pack_greeting(ticket.ticket))
    sink.say(peer.Ping(**sink.boots()))
    assert "Traceback" not in live.log()
    until_s = time.monotonic() + WAIT_S
    while len(list(descriptors.iterdir())) >= before + 5:
        assert time.monotonic() < until_s, "they are kept"
        time.sleep(0.02)
