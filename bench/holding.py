"""Transfers between two daemons that are live and quiet: each holds blocks at both ends.

A source has two blocks of payload and gives the first one; its sink's window is one block, so it is
full, and nobody takes it over.
"""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.payload import Payload
from bench.probe import LAYOUT
from bench.served import ServedDaemon
from bench.source_worker import batched, offer, wait_all
from bench.watched import wait_until
from kvferry_client import Client, connect
from kvferry_proto import worker
from kvferry_proto.errors import FerryError

SIZE = LAYOUT.block_size_tokens
SETTLE_S = 120.0
SETTLE_LOOK_S = 0.5
SLICE = 500  # transfers begun at once
PATIENCE_S = 1800  # no deadline may end what only holds


class Holding:
    """Two daemons, a worker at either, and so many such transfers as ``hold`` has made."""

    def __init__(self, stack: ExitStack, most: int, spare_blocks: int = 0) -> None:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        self.source, self.sink = (
            stack.enter_context(
                ServedDaemon(
                    root / name,
                    stall_s=PATIENCE_S,
                    lease_s=PATIENCE_S,
                    chunk_bytes=LAYOUT.block_bytes,
                    source_share=share,
                    window_tokens=SIZE,
                    pool_tokens=(2 * most + spare_blocks) * SIZE,
                )
            )
            for name, share in (("source", 1), ("sink", 0))
        )
        self.sends: Client = stack.enter_context(connect(self.source.directory, LAYOUT, "sends"))
        self.takes: Client = stack.enter_context(connect(self.sink.directory, LAYOUT, "takes"))
        self.payload = Payload(self.sends.pool.info, LAYOUT)
        self.held = 0

    @property
    def daemons(self) -> dict[str, ServedDaemon]:
        """By the name of their side."""
        return {"source": self.source, "sink": self.sink}

    def hold(self, count: int) -> None:
        """Let there be so many in all; TimeoutError if they do not come to rest."""
        ids = [f"held-{number}" for number in range(self.held, count)]
        for first in range(0, len(ids), SLICE):
            self._begin(ids[first : first + SLICE])
        self.held = count
        wait_until(self._are_held, f"{count} transfers hold a window", SETTLE_S)

    def _begin(self, ids: list[str]) -> None:
        offer(self.sends, self.payload, LAYOUT, ids, 2 * SIZE)
        calls = [
            worker.Receive(transfer_id=i, source=self.source.address, window_tokens=SIZE)
            for i in ids
        ]
        wait_all(self.takes, batched(self.takes, calls), lambda seen: seen.sent_tokens == SIZE)

    def _are_held(self) -> bool:
        """Seldom asked: a daemon that is busy with all of them answers late."""
        time.sleep(SETTLE_LOOK_S)
        try:
            told = [one.status() for one in self.daemons.values()]
        except FerryError:  # it has no time for operators now
            return False
        return all(
            status.blocks_total - status.blocks_free == self.held
            and status.stalls == {"waiting_for_resume": self.held}
            for status in told
        )


def cpu_s(daemon: ServedDaemon) -> float:
    """CPU of its process so far, to the nanosecond."""
    return time.clock_gettime(~daemon.process.pid << 3 | 2)  # the kernel's number of that clock
