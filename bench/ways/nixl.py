"""NIXL over UCX's tcp: one READ by the sink, or one WRITE by the source, of all pieces.

Without progress threads, which halve its throughput on two cores; so the other end keeps polling.
The handle is made before the clock starts: what is timed is `transfer` until DONE.
"""

import base64
import os
import time
from typing import Any

os.environ["UCX_TLS"] = "tcp"  # before it is loaded

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config

from bench.ways.end import End, Mapped, serve


class Idle(End):
    """The end whose memory is read or written."""

    def __init__(self, pool: Mapped, operation: str) -> None:
        super().__init__(pool)
        self.operation = operation
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent = nixl_agent(f"bench-{os.getpid()}", config)
        self.agent.register_memory([(pool.address, len(pool.view), 0, "pool")], "DRAM")

    def offer(self) -> Any:
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "address": self.pool.address}

    def meet(self, offer: Any) -> None:
        self.address = offer["address"]
        self.peer = self.agent.add_remote_agent(base64.b64decode(offer["metadata"])).decode()

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        pass

    def move(self) -> dict[str, float]:
        while not self.agent.get_new_notifs():
            pass
        return {}


class Active(Idle):
    """The end that reads or writes."""

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        local = self._pieces("", self.pool.address, mine, piece_bytes)
        remote = self._pieces(self.peer, self.address, theirs, piece_bytes)
        every = np.arange(len(mine))
        self.handle = self.agent.make_prepped_xfer(
            self.operation, local, every, remote, every, b"done"
        )

    def _pieces(self, peer: str, address: int, offsets: list[int], piece_bytes: int) -> Any:
        rows = np.array([(address + o, piece_bytes, 0) for o in offsets], dtype=np.uint64)
        return self.agent.prep_xfer_dlist(peer, rows, "DRAM")

    def move(self) -> dict[str, float]:
        begun = time.monotonic()
        state = self.agent.transfer(self.handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(self.handle)
        done = time.monotonic()
        assert state == "DONE", state
        self.handle.release()
        return {"begun": begun, "done": done}


def source(pool: Mapped, operation: str) -> End:
    """The end that has the bytes."""
    return (Active if operation == "WRITE" else Idle)(pool, operation)


def sink(pool: Mapped, operation: str) -> End:
    """The end that wants them."""
    return (Active if operation == "READ" else Idle)(pool, operation)


if __name__ == "__main__":
    serve(source, sink)
