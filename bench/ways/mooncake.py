"""Mooncake's Transfer Engine over tcp: the source writes, as in the engines that use it."""

import time
from typing import Any

from mooncake.engine import TransferEngine

from bench.ways.end import End, Mapped, serve

BATCH_PIECES = 512  # larger batches fail


class Sink(End):
    """The end that is written to."""

    def __init__(self, pool: Mapped) -> None:
        super().__init__(pool)
        self.engine = TransferEngine()
        assert self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        assert self.engine.register_memory(pool.address, len(pool.view)) == 0

    def offer(self) -> Any:
        return {"at": f"127.0.0.1:{self.engine.get_rpc_port()}", "address": self.pool.address}

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        pass

    def move(self) -> dict[str, float]:
        return {}


class Source(Sink):
    """The end that writes."""

    def meet(self, offer: Any) -> None:
        self.at, self.address = offer["at"], offer["address"]

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        local = [self.pool.address + offset for offset in mine]
        remote = [self.address + offset for offset in theirs]
        self.batches = [
            (local[first : first + BATCH_PIECES], remote[first : first + BATCH_PIECES])
            for first in range(0, len(local), BATCH_PIECES)
        ]
        self.piece_bytes = piece_bytes

    def move(self) -> dict[str, float]:
        begun = time.monotonic()
        for local, remote in self.batches:
            sizes = [self.piece_bytes] * len(local)
            assert self.engine.batch_transfer_sync_write(self.at, local, remote, sizes) == 0
        return {"begun": begun, "done": time.monotonic()}


if __name__ == "__main__":
    serve(Source, Sink)
