"""Chunks between two pools in device memory, the CPU in a GPU's place, over a real line."""

import queue
import socket
from collections.abc import Iterator

import pytest

from kvferry_daemon.memory.device import Device
from kvferry_daemon.memory.device_pool import DevicePool
from kvferry_daemon.memory.places import SlicePlans, whole
from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp.receiver import StreamReceiver
from kvferry_daemon.transports.tcp.sender import SendJob, StreamSender
from kvferry_daemon.transports.tcp.staging import Place
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.parts import SideSlice

WAIT_S = 10.0
BLOCKS = 8
LAYOUT = Layout(
    planes=(
        Plane(name="k", dtype=Dtype.BFLOAT16, shape=(4, 8), order=Order.HND),
        Plane(name="v", dtype=Dtype.BFLOAT16, shape=(4, 8), order=Order.HND),
        Plane(name="ids", dtype=Dtype.INT64),
    ),
    block_size_tokens=4,
)
SOURCE_RUNS, SINK_RUNS = ((5, 2), (0, 1)), ((1, 1), (6, 2))
EXTENTS = [(0, 4), (4, 8)]
HALF = ((SideSlice(0, 2, 2), SideSlice(1, 2, 2)), 4)  # the last two heads of four


class Line:
    """A source's and a sink's pool, and what copies between them."""

    def __init__(self, checksum: bool) -> None:
        self.one, self.two = socket.socketpair()
        self.sent: queue.Queue[te.StreamEvent] = queue.Queue()
        self.received: queue.Queue[te.StreamEvent] = queue.Queue()
        self.broken: list[tuple[str, bool]] = []
        device = Device("cpu")
        self.buffers: list[int] = []

        def new_buffer(size_bytes: int) -> memoryview:
            self.buffers.append(size_bytes)
            return device.buffer(size_bytes)

        self.source, self.sink = (
            DevicePool.create(device, LAYOUT.block_bytes, BLOCKS, self._on_broken) for _ in "ab"
        )
        for block in range(BLOCKS):
            size = LAYOUT.block_bytes
            self.source.arena[block * size : (block + 1) * size].random_(0, 256)
        self.receiver = StreamReceiver(self.two, "key", self.received.put, new_buffer=new_buffer)
        self.sender = StreamSender(self.one, "key", self.sent.put, checksum, new_buffer=new_buffer)

    def _on_broken(self, message: str, usable: bool) -> None:
        self.broken.append((message, usable))

    def place(self, pool: DevicePool, first: int, tokens: int, sliced: bool) -> Place:
        runs = SOURCE_RUNS if pool is self.source else SINK_RUNS
        if sliced:
            return SlicePlans().sliced(pool, LAYOUT, HALF, runs, 0, first, tokens)
        return whole(pool, LAYOUT, runs, 0, first, tokens)

    def move(self, first: int, tokens: int, sliced: bool) -> None:
        self.receiver.claim(1, first, tokens, self.place(self.sink, first, tokens, sliced))
        place = self.place(self.source, first, tokens, sliced)
        self.sender.put(SendJob("owner", 1, first, tokens, place))

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest.fixture(params=[True, False], ids=["checksum", "plain"])
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    one = Line(request.param)
    yield one
    one.close()


def content(pool: DevicePool, runs: tuple[tuple[int, int], ...]) -> list[bytes]:
    size = LAYOUT.block_bytes
    blocks = [block for first, count in runs for block in range(first, first + count)]
    return [pool.arena[b * size : (b + 1) * size].numpy().tobytes() for b in blocks]


def test_whole_blocks_arrive_and_nothing_else_is_written(line: Line) -> None:
    for first, tokens in EXTENTS:
        line.move(first, tokens, sliced=False)
    for _ in EXTENTS:
        assert isinstance(line.received.get(timeout=WAIT_S), te.Received)
        assert isinstance(line.sent.get(timeout=WAIT_S), te.Sent)
    assert content(line.sink, SINK_RUNS) == content(line.source, SOURCE_RUNS)
    assert not any(b"".join(content(line.sink, ((0, 1), (2, 4)))))
    assert line.buffers, "copies went through what the device had to give"


def test_some_heads_arrive_and_the_others_stay(line: Line) -> None:
    for first, tokens in EXTENTS:
        line.move(first, tokens, sliced=True)
    for _ in EXTENTS:
        assert isinstance(line.received.get(timeout=WAIT_S), te.Received)
    heads_bytes = LAYOUT.places[0].token_bytes // 4 * LAYOUT.block_size_tokens  # of one head
    sink, source = content(line.sink, SINK_RUNS), content(line.source, SOURCE_RUNS)
    for got, expected in zip(sink, source, strict=True):
        assert not any(got[: 2 * heads_bytes])
        assert got[2 * heads_bytes : 4 * heads_bytes] == expected[2 * heads_bytes : 4 * heads_bytes]
        assert not any(got[LAYOUT.places[2].offset_bytes :])


@pytest.mark.parametrize("side", ["source", "sink"])
def test_a_device_that_fails_ends_the_stream_and_is_told(line: Line, side: str) -> None:
    pool: DevicePool = getattr(line, side)
    pool.arena.untyped_storage().resize_(0)
    line.move(0, 4, sliced=False)
    events = line.sent if side == "source" else line.received
    down = events.get(timeout=WAIT_S)
    assert isinstance(down, te.StreamDown), "no chunk is sent or received that was not copied"
    assert down.reason.startswith("a copy on cpu failed"), "and it is no mistake of ours"
    [(message, usable)] = line.broken
    assert "a copy on cpu failed" in message
    assert usable
