"""kvferry's tcp stream: StreamSender and StreamReceiver with headers, claims and events.

It goes plain, with checksums, or under TLS without them, where the sending end has the certificate
as it has between daemons.
"""

import queue
import time
from typing import Any

from bench.ways.end import Mapped, groups, serve
from bench.ways.raw import Accepting, Connecting
from kvferry_daemon.transports.tcp.events import Received, Sent, StreamEvent
from kvferry_daemon.transports.tcp.listener import HANDSHAKE_S
from kvferry_daemon.transports.tcp.receiver import StreamReceiver
from kvferry_daemon.transports.tcp.sender import SendJob, StreamSender
from kvferry_daemon.transports.tcp.tls import Certificate, connect_tls

HANDLE = 1


class Source(Connecting):
    """Sends chunks of about 1 MiB, or of one piece where that is larger."""

    def __init__(self, pool: Mapped, how: str) -> None:
        super().__init__(pool)
        self.checksum = how == "checksum"
        self.certificate = Certificate() if how == "tls" else None
        self.events: queue.SimpleQueue[StreamEvent] = queue.SimpleQueue()

    def offer(self) -> str | None:
        return None if self.certificate is None else self.certificate.sha256.hex()

    def meet(self, offer: Any) -> None:
        super().meet(offer)
        if self.certificate is not None:
            self.sock = self.certificate.accept(self.sock, time.monotonic() + HANDSHAKE_S)
        self.sender = StreamSender(self.sock, "bench", self.events.put, self.checksum)

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        self.groups = groups(self.pool.view, mine, piece_bytes)

    def move(self) -> dict[str, float]:
        begun = time.monotonic()
        for index, group in enumerate(self.groups):
            self.sender.put(SendJob(None, HANDLE, index, 1, group))
        for _ in self.groups:
            event = self.events.get()
            assert isinstance(event, Sent), event
        return {"begun": begun}


class Sink(Accepting):
    """Receives what it has claimed."""

    def __init__(self, pool: Mapped, _how: str) -> None:
        super().__init__(pool)
        self.events: queue.SimpleQueue[StreamEvent] = queue.SimpleQueue()

    def meet(self, offer: Any) -> None:
        super().meet(offer)
        if offer is not None:
            sha256, until_s = bytes.fromhex(offer), time.monotonic() + HANDSHAKE_S
            self.sock = connect_tls(self.sock, sha256, until_s)
        self.receiver = StreamReceiver(self.sock, "bench", self.events.put)

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        self.groups = groups(self.pool.view, mine, piece_bytes)
        for index, group in enumerate(self.groups):
            self.receiver.claim(HANDLE, index, 1, group)

    def move(self) -> dict[str, float]:
        for _ in self.groups:
            event = self.events.get()
            assert isinstance(event, Received), event
        return {"done": time.monotonic()}


if __name__ == "__main__":
    serve(Source, Sink)
