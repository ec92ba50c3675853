"""Copies by one thread out of one mapping into another: the limit."""

import time
from typing import Any

from bench.ways.end import End, Mapped, serve


class Source(End):
    """Only shows its pool."""

    def offer(self) -> str:
        return self.pool.path

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        pass

    def move(self) -> dict[str, float]:
        return {}


class Sink(End):
    """Copies."""

    def meet(self, offer: Any) -> None:
        self.source = Mapped(offer)

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        self.pieces = [
            (self.pool.view[to : to + piece_bytes], self.source.view[at : at + piece_bytes])
            for to, at in zip(mine, theirs, strict=True)
        ]

    def move(self) -> dict[str, float]:
        begun = time.monotonic()
        for to, at in self.pieces:
            to[:] = at
        return {"begun": begun, "done": time.monotonic()}


if __name__ == "__main__":
    serve(Source, Sink)
