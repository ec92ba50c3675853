"""Real daemons in processes of their own, and a worker that speaks the wire by hand."""

import fcntl
import itertools
import json
import mmap
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import msgpack
import zmq

from kvferry_daemon.links.curve import prove_peer
from kvferry_daemon.operator import ask
from kvferry_daemon.probe import endpoint_of, key_of
from kvferry_proto import control, peer, worker
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import TERMINAL, Role

BLOCK = 16
WINDOW = 64
LAYOUT = Layout(
    planes=(
        Plane(name="kv", dtype=Dtype.INT32, shape=(8,)),
        Plane(name="ids", dtype=Dtype.INT64),
    ),
    block_size_tokens=BLOCK,
)
WAIT_S = 20.0
PATIENCE_S = 15.0  # with workers that a test plays, who do not beat; theirs too where all is slow
BOOT_ID = "ab" * 16  # of a peer that we play


class LiveDaemon:
    """A `kvferry serve` process. Leaves no process behind, whatever happens."""

    program: tuple[str, ...] = ("-m", "kvferry_daemon")
    environment: Mapping[str, str] = MappingProxyType({})  # beside ours

    def __init__(self, directory: Path, **flags: object) -> None:
        self.directory = directory
        self.flags = {
            "window_tokens": WINDOW,
            "pool_tokens": 4 * WINDOW,
            "heartbeat_s": 0.2,
            "lost_s": PATIENCE_S,
            **flags,
        }
        args = [f"--{name.replace('_', '-')}={value}" for name, value in self.flags.items()]
        command = [sys.executable, *self.program, "serve", "--runtime-dir", str(directory)]
        with (directory.parent / f"{directory.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *args],
                env={**os.environ, **self.environment},
                stdout=subprocess.PIPE,
                stderr=log,
                # A session has its own share of the cores: else ours, who looks and looks, takes its.
                start_new_session=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        told = json.loads(line)
        self.address: str = told["peer_address"]
        self.http: str = told.get("http", "")  # if there is `http_port`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def pause(self) -> None:
        """Let it stand still."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it without ceremony."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def log(self) -> str:
        """What it wrote to stderr. A thread of it writes, so the last lines may be a moment late."""
        return (self.directory.parent / f"{self.directory.name}.log").read_text()

    def wait_for_log(self, words: str) -> None:
        """Until it has written this."""
        until_s = time.monotonic() + WAIT_S
        while words not in self.log():
            assert time.monotonic() < until_s, self.log()
            time.sleep(0.01)

    def again(self) -> "LiveDaemon":
        """Wait for its end, and start it again in the same directory with the same flags."""
        self.process.wait()
        self.stop()
        return type(self)(self.directory, **self.flags)

    def stop_and_forget(self) -> None:
        """End it, and take away what a next life would go on with."""
        self.stop()
        for path in self.directory.glob("ledger.db*"):
            path.unlink()

    def wait_for_workers(self, workers: int) -> None:
        """Wait until so many workers are known."""
        until = time.monotonic() + WAIT_S
        while self.status().workers != workers:
            assert time.monotonic() < until, self.status()
            time.sleep(0.02)

    def status(self) -> control.Status:
        """What `kvferry status` shows."""
        answer = ask(self.directory, control.GetStatus())
        assert isinstance(answer, control.Status)
        return answer

    def wait_until_free(self, wait_s: float = WAIT_S) -> control.Status:
        """Wait until every block of every pool is free."""
        until = time.monotonic() + wait_s
        while True:
            status = self.status()
            if status.blocks_free == status.blocks_total:
                return status
            assert time.monotonic() < until, status
            time.sleep(0.02)

    def transfers(self, transfer_id: str | None = None) -> list[control.TransferStatus]:
        """What `kvferry transfers ID` shows; without an id, all."""
        answer = ask(self.directory, control.GetTransfers(transfer_id=transfer_id))
        assert isinstance(answer, control.Transfers)
        return answer.transfers

    def wait_for_transfer(
        self,
        transfer_id: str,
        condition: Callable[[control.TransferStatus], bool],
        wait_s: float = WAIT_S,
    ) -> control.TransferStatus:
        """Look until a transfer fits."""
        until = time.monotonic() + wait_s
        while True:
            rows = self.transfers(transfer_id)
            for row in rows:
                if condition(row):
                    return row
            assert time.monotonic() < until, rows
            time.sleep(0.02)


class RawWorker:
    """A worker that builds every frame itself, so that it can also build wrong ones."""

    def __init__(self, directory: Path, layout: Layout = LAYOUT, *, hello: bool = True) -> None:
        self.directory = directory
        self.layout = layout
        self.calls = itertools.count(1)
        self.lock_name = secrets.token_hex(8)
        self.lock = os.open(directory / "workers" / self.lock_name, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets: list[zmq.Socket[bytes]] = []
        self.socket = self.connect()
        self.welcome: worker.Welcome | None = None
        if hello:
            reply = self.call(worker.Hello(lock=self.lock_name, layout=layout))
            assert isinstance(reply, worker.Welcome), reply
            self.welcome = reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def connect(self) -> zmq.Socket[bytes]:
        """A new connection, which has not said hello."""
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{self.directory / 'worker.sock'}")
        self.sockets.append(socket)
        return socket

    def close(self) -> None:
        """Vanish: the flock goes, which proves that no block is touched any more."""
        os.close(self.lock)
        for socket in self.sockets:
            socket.close(linger=0)
        self.context.term()

    def raw(self, *frames: bytes) -> Any:
        """Send frames as they are and return the reply."""
        self.socket.send_multipart(frames)
        return self.reply()

    def fields(self, **fields: object) -> Any:
        """Send a map that need not be a message."""
        return self.raw(msgpack.packb(fields))

    def reply(self, wait_s: float = WAIT_S) -> Any:
        """The next reply."""
        assert self.socket.poll(int(wait_s * 1000)), "no reply"
        return worker.REPLIES.decode(self.socket.recv())

    def call(self, call: Any) -> Any:
        """Make a call and return its reply."""
        numbered = call.model_copy(update={"call": next(self.calls)})
        reply = self.raw(worker.CALLS.encode(numbered))
        assert reply.call == numbered.call, reply
        return reply

    def snapshot(self, call: Any) -> worker.Snapshot:
        """Make a call that succeeds, and return its one snapshot."""
        reply = self.call(call)
        assert isinstance(reply, worker.Snapshots), reply
        return reply.transfers[0]

    def code(self, call: Any) -> str:
        """Make a call that is refused, and return the error's code."""
        reply = self.call(call)
        assert isinstance(reply, worker.Failure), reply
        return reply.error.code

    def poll(self, role: Role, transfer_id: str = "t", attempt: int = 0) -> worker.Snapshot:
        """The snapshot now."""
        watched = worker.Watched(role=role, transfer_id=transfer_id, attempt=attempt)
        return self.snapshot(worker.Poll(transfers=[watched]))

    def wait_for(self, role: Role, condition: Any, transfer_id: str = "t") -> worker.Snapshot:
        """Poll, letting the daemon wait for changes, until a snapshot fits."""
        after = -1
        until = time.monotonic() + WAIT_S
        seen = None
        while time.monotonic() < until:
            watched = worker.Watched(role=role, transfer_id=transfer_id, after=after)
            reply = self.call(worker.Poll(transfers=[watched], wait_s=0.5))
            assert isinstance(reply, worker.Snapshots), reply
            for seen in reply.transfers:
                after = seen.snapshot
                if condition(seen):
                    return seen
            self.call(worker.Heartbeat())
        raise AssertionError(f"never came: {seen}")

    def wait_end(self, role: Role, transfer_id: str = "t") -> worker.Snapshot:
        """Wait for a terminal state."""
        return self.wait_for(role, lambda s: s.state in TERMINAL, transfer_id)

    def block(self, block: int) -> bytes:
        """The bytes of one block of the pool."""
        assert self.welcome is not None
        size = self.welcome.pool.block_bytes
        with open(self.welcome.pool.path, "rb") as file:
            return os.pread(file.fileno(), size, block * size)

    def fill(self, snapshot: worker.Snapshot, end: int, seed: int = 0) -> None:
        """Fill the source's window up to token ``end`` with bytes that only depend on the token."""
        first = snapshot.available_tokens // BLOCK * BLOCK
        for token, block in self.window(snapshot):
            if first <= token < end:
                self.write_block(block, self.content(token, seed))

    def content(self, token: int, seed: int = 0) -> bytes:
        """What ``fill`` writes into the block that starts at a token."""
        return random.Random(f"{seed} {token}").randbytes(self.layout.block_bytes)

    def check(self, snapshot: worker.Snapshot, seed: int = 0) -> None:
        """Assert that the sink's window holds exactly what ``fill`` wrote, committed tokens only."""
        size = self.layout.block_bytes
        for token, block in self.window(snapshot):
            tokens = min(BLOCK, snapshot.sent_tokens - token)
            if tokens <= 0 or token < snapshot.partial_sent_tokens // BLOCK * BLOCK:
                continue
            got, expected = self.block(block), self.content(token, seed)
            for place in self.layout.places:
                end = place.offset_bytes + tokens * place.token_bytes
                assert got[place.offset_bytes : end] == expected[place.offset_bytes : end], token
            assert len(got) == size

    def window(self, snapshot: worker.Snapshot) -> list[tuple[int, int]]:
        """(first token, block) of every block of a window."""
        blocks = [b for first, count in snapshot.runs for b in range(first, first + count)]
        return [(snapshot.base_tokens + i * BLOCK, block) for i, block in enumerate(blocks)]

    def write_block(self, block: int, data: bytes) -> None:
        """Fill one block of the pool."""
        assert self.welcome is not None
        size = self.welcome.pool.block_bytes
        assert len(data) == size
        with open(self.welcome.pool.path, "r+b") as file, mmap.mmap(file.fileno(), 0) as pool:
            pool[block * size : (block + 1) * size] = data


class RawPeer:
    """A sink's daemon that builds every frame itself."""

    def __init__(self, address: str, secret: bytes = b"") -> None:
        """``secret``: the key that it shows, if the address bears one."""
        self.address = address
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if secret:
            prove_peer(self.socket, key_of(address), secret)
        self.socket.connect(endpoint_of(address))
        self.source = ""

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()

    def raw(self, *frames: bytes) -> Any:
        """Send frames and return the answer."""
        self.socket.send_multipart(frames)
        return self.next()

    def next(self) -> Any:
        """The next message."""
        assert self.socket.poll(10_000), "no answer"
        return peer.MESSAGES.decode(self.socket.recv())

    def say(self, message: Any) -> Any:
        """Send a message and return the answer."""
        return self.raw(peer.MESSAGES.encode(message))

    def boots(self) -> dict[str, Any]:
        """The fields that every message after the hello has."""
        return {"source_boot_id": self.source, "sink_boot_id": BOOT_ID}

    def a_pull(self, **fields: Any) -> peer.Pull:
        """A pull for transfer `t`, with other fields as given."""
        given = {
            "transfer_id": "t",
            "attempt": 0,
            "number": 1,
            "handle": 1,
            "layout_digest": LAYOUT.digest,
            "start_tokens": 0,
            "acked_tokens": 0,
        }
        return peer.Pull(**{**given, **fields})

    def pull(self, **fields: Any) -> Any:
        """Send one pull, and return its progress."""
        answer = self.say(peer.Pulls(pulls=[self.a_pull(**fields)], **self.boots()))
        assert isinstance(answer, peer.Progresses), answer
        return answer.progresses[0]
