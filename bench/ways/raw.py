"""Raw TCP: sendmsg of about 1 MiB, recvmsg_into with MSG_WAITALL, and nothing else.

Its sockets have the options that kvferry's have.
"""

import socket
import time
from typing import Any

from bench.ways.end import STEP_BYTES, End, Mapped, groups, serve
from kvferry_daemon.transports.tcp.listener import tune


class Connecting(End):
    """A source that connects to its sink."""

    def meet(self, offer: Any) -> None:
        self.sock = socket.create_connection(("127.0.0.1", offer))
        tune(self.sock)


class Accepting(End):
    """A sink that lets its source connect."""

    def __init__(self, pool: Mapped) -> None:
        super().__init__(pool)
        self.listener = socket.create_server(("127.0.0.1", 0))

    def offer(self) -> int:
        return int(self.listener.getsockname()[1])

    def meet(self, offer: Any) -> None:
        self.sock, _ = self.listener.accept()
        tune(self.sock)


def steps(view: memoryview, offsets: list[int], piece_bytes: int) -> list[list[memoryview]]:
    """What one call takes: several small pieces, or a part of a large one."""
    parts = [
        offset + part
        for offset in offsets
        for part in range(0, piece_bytes, min(STEP_BYTES, piece_bytes))
    ]
    return groups(view, parts, min(STEP_BYTES, piece_bytes))


class Source(Connecting):
    """Sends."""

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        self.steps = steps(self.pool.view, mine, piece_bytes)

    def move(self) -> dict[str, float]:
        begun = time.monotonic()
        for step in self.steps:
            assert self.sock.sendmsg(step) == sum(map(len, step))
        return {"begun": begun}


class Sink(Accepting):
    """Receives straight into its pool."""

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        self.steps = steps(self.pool.view, mine, piece_bytes)

    def move(self) -> dict[str, float]:
        for step in self.steps:
            got = self.sock.recvmsg_into(step, 0, socket.MSG_WAITALL)[0]
            assert got == sum(map(len, step))
        return {"done": time.monotonic()}


if __name__ == "__main__":
    serve(Source, Sink)
