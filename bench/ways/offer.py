"""kvferry's nixl transport: OfferSender and OfferReceiver, over UCX's tcp as bare NIXL beside it.

Extents are of about 1 MiB, or of one piece where that is larger; a piece is a block.
"""

import os
import queue
import time
from typing import Any

os.environ["UCX_TLS"] = "tcp"  # before it is loaded

from bench.ways.end import STEP_BYTES, Mapped, serve
from bench.ways.raw import Accepting, Connecting
from kvferry_daemon.transports.nixl.agent import Memory
from kvferry_daemon.transports.nixl.poller import Poller
from kvferry_daemon.transports.nixl.receiver import OfferReceiver
from kvferry_daemon.transports.nixl.sender import OfferSender
from kvferry_daemon.transports.tcp.events import Received, Sent, StreamEvent
from kvferry_daemon.transports.tcp.sender import SendJob
from kvferry_daemon.transports.tcp.staging import Blocks

HANDLE = 1
Extent = tuple[list[memoryview], Blocks]


class _Registered:
    """The pool of an end, registered in blocks of the size in question."""

    def __init__(self, pool: Mapped) -> None:
        self.pool = pool
        self.poller = Poller()
        self.pool_id = ""

    def extents(self, offsets: list[int], piece_bytes: int) -> list[Extent]:
        """What travels together, piece after piece."""
        pool_id = f"in-{piece_bytes}"
        if pool_id != self.pool_id:
            self.poller.drop_pool(self.pool_id).result()
            blocks = len(self.pool.view) // piece_bytes
            memory = Memory(self.pool.address, piece_bytes, blocks, self.pool)
            self.poller.add_pool(pool_id, memory)
            self.poller.revoke(pool_id, 0).result()  # behind it: the pool is registered
            self.pool_id = pool_id
        step = max(1, STEP_BYTES // piece_bytes)
        return [
            self._extent(offsets[first : first + step], piece_bytes)
            for first in range(0, len(offsets), step)
        ]

    def _extent(self, offsets: list[int], piece_bytes: int) -> Extent:
        views = [self.pool.view[offset : offset + piece_bytes] for offset in offsets]
        runs = tuple((offset // piece_bytes, 1) for offset in offsets)
        return views, Blocks(self.pool_id, runs)


class Source(Connecting):
    """Offers extents."""

    def __init__(self, pool: Mapped) -> None:
        super().__init__(pool)
        self.events: queue.Queue[StreamEvent] = queue.Queue()
        self.registered = _Registered(pool)

    def meet(self, offer: Any) -> None:
        super().meet(offer)
        poller = self.registered.poller
        self.sender = OfferSender(self.sock, "bench", self.events.put, False, poller)

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        self.extents = self.registered.extents(mine, piece_bytes)

    def move(self) -> dict[str, float]:
        begun = time.monotonic()
        for index, (views, blocks) in enumerate(self.extents):
            self.sender.put(SendJob(None, HANDLE, index, 1, views, blocks))
        for _ in self.extents:
            event = self.events.get()
            assert isinstance(event, Sent), event
        return {"begun": begun}


class Sink(Accepting):
    """Reads what it has claimed."""

    def __init__(self, pool: Mapped) -> None:
        super().__init__(pool)
        self.events: queue.Queue[StreamEvent] = queue.Queue()
        self.registered = _Registered(pool)

    def meet(self, offer: Any) -> None:
        super().meet(offer)
        poller = self.registered.poller
        self.receiver = OfferReceiver(self.sock, "bench", self.events.put, poller)

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        self.extents = self.registered.extents(mine, piece_bytes)
        self.read_before = self.registered.poller.reads  # the source may begin before ``move`` does
        for index, (views, blocks) in enumerate(self.extents):
            self.receiver.claim(HANDLE, index, 1, views, blocks)

    def move(self) -> dict[str, float]:
        for _ in self.extents:
            event = self.events.get()
            assert isinstance(event, Received), event
        reads = self.registered.poller.reads - self.read_before
        assert reads == len(self.extents), "some went as chunks"
        return {"done": time.monotonic()}


if __name__ == "__main__":
    serve(Source, Sink)
