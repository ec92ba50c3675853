"""ZeroMQ over tcp: a message a piece, sent without a copy, received and copied into the pool."""

import time
from typing import Any

import zmq

from bench.ways.end import End, Mapped, serve


class Source(End):
    """Sends."""

    def meet(self, offer: Any) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PUSH)
        self.socket.connect(offer)

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        self.pieces = [self.pool.view[offset : offset + piece_bytes] for offset in mine]

    def move(self) -> dict[str, float]:
        begun = time.monotonic()
        for piece in self.pieces:
            self.socket.send(piece, copy=False)
        return {"begun": begun}


class Sink(End):
    """Receives and copies."""

    def __init__(self, pool: Mapped) -> None:
        super().__init__(pool)
        self.socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PULL)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")

    def offer(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        self.pieces = [self.pool.view[offset : offset + piece_bytes] for offset in mine]

    def move(self) -> dict[str, float]:
        for piece in self.pieces:
            piece[:] = self.socket.recv(copy=False).buffer
        return {"done": time.monotonic()}


if __name__ == "__main__":
    serve(Source, Sink)
