"""A worker's connection whose frames its user builds and reads, so that the client costs nothing."""

import fcntl
import mmap
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from kvferry_proto import worker
from kvferry_proto.layout import Layout

Words = NDArray[Any]


class Wire:
    """A DEALER socket that has said hello. Its lock goes with the process or with ``close``."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        name = secrets.token_hex(8)
        self._lock = os.open(directory / "workers" / name, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.connect(f"ipc://{directory / 'worker.sock'}")
        self.socket.send(worker.CALLS.encode(worker.Hello(lock=name, layout=layout)))
        assert self.socket.poll(60_000), "no welcome"
        welcome = worker.REPLIES.decode(self.socket.recv())
        assert isinstance(welcome, worker.Welcome), welcome
        self.pool = welcome.pool

    def close(self) -> None:
        """Vanish."""
        os.close(self._lock)
        self.socket.close(linger=0)
        self._context.term()

    def call(self, call: Any) -> Any:
        """One call and its reply."""
        self.socket.send(worker.CALLS.encode(call))
        reply = worker.REPLIES.decode(self.socket.recv())
        assert not isinstance(reply, worker.Failure), reply
        return reply

    def blocks(self) -> Words:
        """The pool, a row of 64-bit words a block."""
        return mapped(self.pool)


def mapped(pool: worker.PoolInfo) -> Words:
    """A pool's file, a row of 64-bit words a block."""
    with open(pool.path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), pool.blocks * pool.block_bytes)
    words: Words = np.frombuffer(memory, dtype=np.uint64)
    return words.reshape(pool.blocks, pool.block_bytes // 8)
