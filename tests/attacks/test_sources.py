"""Sources that a sink's daemon trusts, and that would reach into what it receives from another one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_server, socket
from typing import Any

import zmq

from attacks.scene import without
from kvferry_proto import peer, worker
from kvferry_proto.chunk import GREETING_BYTES, ChunkHeader, pack_accept, read_greeting
from kvferry_proto.states import TERMINAL, Role, State
from live import BLOCK, LAYOUT, LiveDaemon, RawWorker

WAIT_S = 10.0
SIZE = LAYOUT.block_bytes
GOOD, EVIL = b"good" * (SIZE // 4), b"evil" * (SIZE // 4)


class Source:
    """A source's daemon, played: it has a block of one transfer, and sends it when it is told to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], number: int) -> None:
        self.boot_id = f"{number:032x}"
        self.links = context.socket(zmq.ROUTER)
        self.links.setsockopt(zmq.LINGER, 0)
        port = self.links.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self.server = create_server(("127.0.0.1", 0))
        self.server.settimeout(WAIT_S)
        self.data: socket | None = None
        self.pull: peer.Pull | None = None  # by which the block was asked for
        self.told = 0
        self.route = b""
        self.boots: dict[str, Any] = {}

    def close(self) -> None:
        for one in (self.links, self.server, self.data):
            if one is not None:
                one.close()

    def say(self, message: Any) -> None:
        self.links.send_multipart([self.route, peer.MESSAGES.encode(message)])

    def tell(self, pull: peer.Pull, **more: Any) -> None:
        """Progress of a transfer, whosever it is."""
        known: dict[str, Any] = {"available_tokens": BLOCK, "total_tokens": BLOCK}
        known |= {"transfer_id": pull.transfer_id, "attempt": pull.attempt, "number": pull.number}
        progress = peer.Progress(**{"state": State.TRANSFERRING, **known, **more})
        self.say(peer.Progresses(before=self.told, progresses=[progress], **self.boots))
        self.told += 1

    def send(self, handle: int, payload: bytes) -> None:
        """The block that some handle names."""
        assert self.data is not None
        self.data.sendall(ChunkHeader(handle, 0, BLOCK, SIZE, False).pack() + payload)

    def serve(self) -> None:
        """Answer what has been said by now."""
        while self.links.poll(10):
            self.route, frame = self.links.recv_multipart()
            said: Any = peer.MESSAGES.decode(frame)
            match said:
                case peer.PeerHello():
                    self.boots = {"source_boot_id": self.boot_id, "sink_boot_id": said.boot_id}
                    ours, theirs = self.boot_id, said.boot_id
                    self.say(peer.PeerWelcome(version=1, boot_id=ours, sink_boot_id=theirs))
                case peer.Ping():
                    self.say(peer.Pong(news=self.told, **self.boots))
                case peer.OpenStream():
                    self.open(said)
                case peer.Pulls():
                    for pull in said.pulls:
                        self.pull = pull if pull.want else self.pull
                        self.tell(pull)
                case peer.Done():
                    which, attempt = said.transfer_id, said.attempt
                    noted = peer.DoneNoted(transfer_id=which, attempt=attempt, **self.boots)
                    self.say(noted)

    def open(self, said: peer.OpenStream) -> None:
        named: dict[str, Any] = {"stream": said.stream, "connection": said.connection}
        port = self.server.getsockname()[1]
        self.say(peer.Ticket(port=port, ticket=bytes(32), **named, **self.boots))
        self.data, _ = self.server.accept()
        assert read_greeting(self.data.recv(GREETING_BYTES)) == bytes(32)
        self.data.sendall(pack_accept(True))


class Scene:
    """Two sources, each of them asked for the block of its transfer; neither has sent it."""

    def __init__(self, daemon: LiveDaemon, decode: RawWorker, sources: list[Source]) -> None:
        self.daemon, self.decode, self.sources = daemon, decode, sources
        self.honest, self.evil = sources
        decode.snapshot(worker.Receive(transfer_id="t", source=self.honest.address))
        decode.snapshot(worker.Receive(transfer_id="bait", source=self.evil.address))
        self.until(lambda: all(one.pull is not None for one in sources))

    def until(self, condition: Callable[[], bool]) -> None:
        until_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < until_s
            for one in self.sources:
                one.serve()

    def seen(self) -> worker.Snapshot:
        return self.decode.poll(Role.SINK, "t")

    def arrives(self) -> None:
        """The honest one sends, and that is what has come."""
        assert self.honest.pull is not None
        self.honest.send(self.honest.pull.handle, GOOD)
        self.until(lambda: self.seen().state is State.SUCCESS)
        assert self.decode.block(self.seen().runs[0][0]) == GOOD


@contextmanager
def scene(defence: str | None, directory: Path) -> Iterator[Scene]:
    with (
        without(defence)(directory / str(defence)) as daemon,
        RawWorker(daemon.directory) as decode,
        zmq.Context() as context,
    ):
        sources = [Source(context, number) for number in (1, 2)]
        try:
            yield Scene(daemon, decode, sources)
        finally:
            for one in sources:
                one.close()


def test_a_source_writes_into_no_transfer_of_another_one(tmp_path: Path) -> None:
    """Handles are easily guessed: a chunk counts only on the stream that it was claimed on."""
    for defence in ("claims_are_everybodys", None):
        with scene(defence, tmp_path) as found:
            assert found.honest.pull is not None
            found.evil.send(found.honest.pull.handle, EVIL)
            if defence is not None:
                found.until(lambda: found.seen().sent_tokens == BLOCK)
                assert found.decode.block(found.seen().runs[0][0]) == EVIL
                continue
            found.until(lambda: found.daemon.status().counters.get("chunks_drained", 0) == 1)
            assert found.seen().sent_tokens == 0
            found.arrives()


def test_a_source_ends_no_transfer_of_another_one(tmp_path: Path) -> None:
    for defence in ("any_source_tells", None):
        with scene(defence, tmp_path) as found:
            honest, bait = found.honest.pull, found.evil.pull
            assert honest is not None
            assert bait is not None
            found.evil.tell(honest, state=State.FAILED)
            if defence is not None:
                found.until(lambda: found.seen().state in TERMINAL)
                continue
            found.evil.tell(bait, state=State.FAILED)  # after it, on the same link
            found.until(lambda: found.decode.poll(Role.SINK, "bait").state in TERMINAL)
            assert found.seen().state not in TERMINAL
            found.arrives()
