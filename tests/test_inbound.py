"""Whoever holds the loop up for long with a message is read the less afterwards."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvferry_daemon import inbound
from kvferry_daemon.core import outside as out
from kvferry_daemon.inbound import Inbound
from kvferry_proto import peer, worker
from kvferry_proto.states import Role
from world import World

A_S = 50.0
HELLO = peer.MESSAGES.encode(peer.PeerHello(boot_id="c" * 16, daemon_id="c" * 16, life=1))
BEAT = worker.CALLS.encode(worker.Heartbeat())
BATCH = worker.CALLS.encode(
    worker.Batch(calls=[worker.Release(transfer_id="t" * 40, role=Role.SINK)] * 20)
)
ADDRESS, USER = "tcp://a:1", "0:0:1"


class Told:
    """What goes out."""

    def __init__(self) -> None:
        self.refused = 0

    def to_worker(self, route: bytes, reply: out.WorkerReply) -> None: ...

    def to_sink(self, effect: out.ToSink) -> None:
        self.refused += isinstance(effect.message, peer.PeerRefused)

    def shun_peer(self, address: str) -> None: ...


class Slow:
    """Decodes, the first time slowly."""

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s

    def decode(self, frame: bytes) -> peer.PeerMessage:
        take(self._first_s)
        self._first_s = 0.0
        return peer.MESSAGES.decode(frame)


def take(seconds: float) -> None:
    """So much of the loop's time."""
    until_s = time.thread_time() + seconds
    while time.thread_time() < until_s:
        pass


def read(long_s: float, first_s: float, *, source: bool, decode_s: float = 0.0) -> int:
    """How many of ten messages are read, if the first takes so much of the loop's time.

    ``decode_s``: what it takes to decode it, beside that.
    """

    def run(reader: Inbound, events: list[out.NodeEvent]) -> int:
        for _ in range(10):
            reader.on_source(ADDRESS, [HELLO]) if source else reader.on_peer([b"r", HELLO], "")
        return len(events)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbound, "LONG_S", long_s)
        decoder = SimpleNamespace(**{**vars(peer), "MESSAGES": Slow(decode_s)})
        patch.setattr(inbound, "peer", decoder)
        return with_reader(first_s, run)


def with_reader(first_s: float, act: Callable[[Inbound, list[out.NodeEvent]], int]) -> int:
    """Do something with a reader whose clock stands still, and with what it has read."""

    async def run() -> int:
        events: list[out.NodeEvent] = []

        def feed(event: out.NodeEvent) -> None:
            events.append(event)
            take(first_s if len(events) == 1 else 0)

        node = World().machines["a"].node
        reader = Inbound(node, feed, Told(), cast(Any, None), None, A_S)
        reader._now_s = lambda: 0.0  # the loop's clock goes on meanwhile, by who knows how much
        return act(reader, events)

    return asyncio.run(run())


def test_who_holds_the_loop_up_is_not_read_for_a_while() -> None:
    assert read(1e9, 0.5, source=False) == 10  # nobody looks
    assert read(inbound.LONG_S, 0.5, source=False) == 1
    assert read(inbound.LONG_S, inbound.LONG_S / 2, source=False) == 10


def test_a_source_is_read_on_whatever_its_news_are_for_all_of_its_sinks() -> None:
    assert read(inbound.LONG_S, 0.5, source=True) == 10


def test_a_source_pays_for_what_takes_long_to_decode() -> None:
    """Dozens of layouts of a thousand planes fit a frame, and a worker may name many sources."""
    assert read(inbound.LONG_S, 0.0, source=True, decode_s=0.5) == 1
    assert read(inbound.LONG_S, 0.0, source=True, decode_s=inbound.LONG_S / 2) == 10


def wanted(long_s: float, first: bytes, first_s: float, other: str = "0:0:2") -> int:
    """How many of ten large messages of a worker are, if the first message takes so long.

    ``other``: who has spoken just before.
    """

    def run(reader: Inbound, events: list[out.NodeEvent]) -> int:
        reader._read_worker = lambda *_: None  # type: ignore[method-assign]
        reader.on_worker([b"o", BEAT], other)
        del reader._read_worker
        reader.on_worker([b"r", first], USER)
        assert not reader.is_unwanted_of_worker(b"r", "0:0:2")
        left = [reader.is_unwanted_of_worker(b"r", USER) for _ in range(10)]
        before = len(events)
        reader.on_worker([b"r", BEAT], USER)
        assert len(events) == before + 1  # a small one always is
        return left.count(False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbound, "WORK_LONG_S", long_s)
        return with_reader(first_s, run)


def test_large_messages_of_a_worker_that_holds_the_loop_up_are_dropped_for_a_while() -> None:
    assert wanted(1e9, BATCH, 0.5) == 10  # nobody looks
    assert wanted(inbound.WORK_LONG_S, BATCH, 0.5) == 0
    assert wanted(inbound.WORK_LONG_S, BATCH, 0.0) == 10
    assert wanted(inbound.WORK_LONG_S, BEAT, 0.5) == 10  # small ones are not even looked at


def test_a_worker_that_is_alone_holds_nobody_up() -> None:
    """It may have all of the loop: who polls thousands of transfers by message does."""
    assert wanted(inbound.WORK_LONG_S, BATCH, 0.5, other=USER) == 10


def test_a_large_message_of_who_is_over_is_not_even_copied() -> None:
    def run(reader: Inbound, events: list[out.NodeEvent]) -> int:
        assert not reader.is_unwanted_of_worker(b"r", USER)  # nobody has heard of it
        assert not reader.is_unwanted_of_peer(b"r", "")
        for _ in range(int(A_S)):
            assert not reader.is_unwanted_of_worker(b"r", USER)
            assert not reader.is_unwanted_of_peer(b"r", "")
            reader.on_worker([b"r", BEAT], USER)
            reader.on_peer([b"r", HELLO], "")
        assert reader.is_unwanted_of_worker(b"s", USER)  # a process is one, whatever its routes
        assert reader.is_unwanted_of_peer(b"r", "")
        assert not reader.is_unwanted_of_worker(b"r", "0:0:2")
        assert not reader.is_unwanted_of_peer(b"s", "")
        counters = reader._node.counters
        assert counters["messages_over_rate_worker"] == counters["messages_over_rate_peer"]
        return counters["messages_over_rate_worker"]

    assert with_reader(0, run) == 1
