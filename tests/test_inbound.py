"""Whoever holds the loop up for long with a message is read the less afterwards."""

import asyncio
import time
from typing import Any, cast

import pytest

from kvferry_daemon import inbound
from kvferry_daemon.core import outside as out
from kvferry_daemon.inbound import Inbound
from kvferry_proto import peer
from world import World

A_S = 50.0
HELLO = peer.MESSAGES.encode(peer.PeerHello(boot_id="c" * 16, daemon_id="c" * 16, life=1))
ADDRESS = "tcp://a:1"


class Told:
    """What goes out."""

    def __init__(self) -> None:
        self.refused = 0

    def to_worker(self, route: bytes, reply: out.WorkerReply) -> None: ...

    def to_sink(self, effect: out.ToSink) -> None:
        self.refused += isinstance(effect.message, peer.PeerRefused)

    def shun_peer(self, address: str) -> None: ...


def read(long_s: float, first_s: float, *, source: bool) -> int:
    """How many of ten messages are read, if the first takes so much of the loop's time."""

    async def run() -> int:
        events: list[out.NodeEvent] = []

        def feed(event: out.NodeEvent) -> None:
            events.append(event)
            until_s = time.thread_time() + (first_s if len(events) == 1 else 0)
            while time.thread_time() < until_s:
                pass

        node = World().machines["a"].node
        reader = Inbound(node, feed, Told(), cast(Any, None), None, A_S)
        reader._now_s = lambda: 0.0  # the loop's clock goes on meanwhile, by who knows how much
        for _ in range(10):
            reader.on_source(ADDRESS, [HELLO]) if source else reader.on_peer([b"r", HELLO], "")
        return len(events)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbound, "LONG_S", long_s)
        return asyncio.run(run())


def test_who_holds_the_loop_up_is_not_read_for_a_while() -> None:
    assert read(1e9, 0.5, source=False) == 10  # nobody looks
    assert read(inbound.LONG_S, 0.5, source=False) == 1
    assert read(inbound.LONG_S, inbound.LONG_S / 2, source=False) == 10


def test_a_source_is_read_on_whatever_its_news_are_for_all_of_its_sinks() -> None:
    assert read(inbound.LONG_S, 0.5, source=True) == 10
