"""A TCP relay in front of a source's daemon, to see and to spoil what goes through it.

The daemon listens on 127.0.0.1 and tells its peers 127.0.0.2, where the relay listens on the same
port numbers.
"""

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from kvferry_proto import worker
from kvferry_proto.states import Role, State
from live import BLOCK, LAYOUT, WINDOW, LiveDaemon, RawWorker

RELAY_HOST = "127.0.0.2"
WAIT_S = 10.0
PAYLOAD_BYTES = WINDOW // BLOCK * LAYOUT.block_bytes
Pass = Callable[[int, bytes], Iterator[bytes]]


def straight(_place: int, data: bytes) -> Iterator[bytes]:
    yield data


def server_beside() -> socket.socket:
    """Listen on a port that is free on both addresses, below those that the kernel gives out."""
    for port in random.sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return socket.create_server((RELAY_HOST, port))
    raise AssertionError("no port is free on both addresses")


class Relay:
    """A line to one port. ``to_sink`` gets each piece and its place in the connection."""

    def __init__(self) -> None:
        self.server = server_beside()
        self.port = int(self.server.getsockname()[1])
        self.to_sink: Pass = straight
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self.server.accept()
                self.connections += 1
                far = socket.create_connection(("127.0.0.1", self.port))
                self._sockets += [near, far]
                self._start(self._pump, near, far, straight)
                self._start(self._pump, far, near, self.to_sink)

    def _pump(self, one: socket.socket, two: socket.socket, passed: Pass) -> None:
        place = 0
        with suppress(OSError):
            while data := one.recv(1 << 16):
                for piece in passed(place, data):
                    two.sendall(piece)
                place += len(data)
        for sock in (one, two):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_S)
        for sock in (self.server, *self._sockets):
            sock.close()


class Scene:
    """Two daemons, the line between them, and a worker at each."""

    def __init__(self, stack: ExitStack, directory: Path, **flags: object) -> None:
        self.messages, self.line = Relay(), Relay()
        stack.callback(self.messages.close)
        stack.callback(self.line.close)
        self.daemon = LiveDaemon(
            directory / "a",
            peer_port=self.messages.port,
            data_port=self.line.port,
            advertise_host=RELAY_HOST,
            **flags,
        )
        stack.enter_context(self.daemon)
        self.sink = LiveDaemon(directory / "b", drain_s=0.3, **flags)
        stack.enter_context(self.sink)
        self.source = RawWorker(self.daemon.directory)
        stack.enter_context(self.source)
        self.consumer = RawWorker(self.sink.directory)

    def send(self, transfer_id: str = "t") -> None:
        """A window full, all of it ready before the sink asks."""
        self.source.snapshot(worker.Send(transfer_id=transfer_id))
        fits = lambda seen: seen.allocated_tokens == WINDOW
        self.source.fill(self.source.wait_for(Role.SOURCE, fits, transfer_id), WINDOW)
        self.source.snapshot(
            worker.Ready(transfer_id=transfer_id, ready_tokens=WINDOW, total_tokens=WINDOW)
        )
        self.consumer.snapshot(worker.Receive(transfer_id=transfer_id, source=self.daemon.address))

    def check_arrived(self, transfer_id: str = "t") -> None:
        """Both sides ended well, with every byte."""
        end = self.consumer.wait_end(Role.SINK, transfer_id)
        assert (end.state, end.sent_tokens, end.base_tokens) == (State.SUCCESS, WINDOW, 0)
        self.consumer.check(end)
        assert self.source.wait_end(Role.SOURCE, transfer_id).state is State.SUCCESS
        self.consumer.snapshot(worker.Release(transfer_id=transfer_id, role=Role.SINK))

    def check_clean(self) -> None:
        for daemon in (self.daemon, self.sink):
            assert daemon.process.poll() is None
            daemon.wait_until_free()
            assert "Traceback" not in daemon.log(), daemon.log()
