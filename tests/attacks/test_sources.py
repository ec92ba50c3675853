"""Sources that a sink's daemon trusts, and that would reach into what it receives from another one."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from socket import create_server, socket
from typing import Any

import zmq

from attacks.scene import without
from kvferry_daemon.core.plans import NEW_MAX
from kvferry_proto import peer, worker
from kvferry_proto.chunk import GREETING_BYTES, ChunkHeader, pack_accept, read_greeting
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import TERMINAL, Role, State
from live import BLOCK, LAYOUT, LiveDaemon, RawWorker

WAIT_S = 10.0
SINKS = 4 * NEW_MAX
ADDRESSES, LAYOUTS = 5, 10  # each may have 8 at once, and all of them together 16
REFUSED = 24  # more than 2 of each; 34 if all are heard at once
NOTHING_YET = {"state": State.BOOTSTRAPPING, "available_tokens": 0, "total_tokens": None}
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
        self.heard: peer.Pull | None = None  # the newest one
        self.news: dict[str, Any] = {}  # beside those of a block that is there
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
                        self.heard = pull
                        self.tell(pull, **self.news)
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


class Strange(Source):
    """One whose layouts nobody has seen, nor fit any."""

    def tell(self, pull: peer.Pull, **more: Any) -> None:
        plane = Plane(name=f"p{self.told}", dtype=Dtype.UINT8)
        kind = Layout(planes=(plane,), block_size_tokens=BLOCK)
        super().tell(pull, layout=kind, state=State.BOOTSTRAPPING, **more)


class Scene:
    """Two sources, each of them asked for the block of its transfer; neither has sent it."""

    def __init__(self, daemon: LiveDaemon, decode: RawWorker, sources: list[Source]) -> None:
        self.daemon, self.decode, self.sources = daemon, decode, sources
        self.honest, self.evil = sources
        decode.snapshot(worker.Receive(transfer_id="t", source=self.honest.address))
        decode.snapshot(worker.Receive(transfer_id="bait", source=self.evil.address))
        self.until(lambda: all(one.pull is not None for one in sources))

    def until(self, condition: Callable[[], bool]) -> None:
        until(self.sources, condition)

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


def test_a_source_has_so_many_new_layouts_worked_out_and_no_more(tmp_path: Path) -> None:
    """Each may take a second: what more of them come is not looked at, and asked for again."""
    for defence in ("every_layout_is_worked_out", None):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            RawWorker(daemon.directory) as decode,
            zmq.Context() as context,
            closing(Strange(context, 1)) as source,
        ):
            for number in range(SINKS):
                decode.snapshot(worker.Receive(transfer_id=f"t{number}", source=source.address))
            until_s = time.monotonic() + WAIT_S
            failed = refused = 0
            while failed + refused < SINKS:
                assert time.monotonic() < until_s
                source.serve()
                counters = daemon.status().counters
                failed, refused = (counters.get(one, 0) for one in ("sink_failed", "plans_refused"))
            if defence is not None:
                assert (failed, refused) == (SINKS, 0)
            else:
                assert NEW_MAX <= failed < SINKS / 2  # one more each four seconds
            seen = [decode.poll(Role.SINK, f"t{number}") for number in range(SINKS)]
            assert {one.error.code for one in seen if one.error} == {"layout_mismatch"}


def test_a_worker_has_so_many_new_plans_of_all_the_sources_that_it_names(tmp_path: Path) -> None:
    """He listens there himself, and each tells layouts that nobody has seen."""
    for defence in ("each_name_has_plans", None):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            RawWorker(daemon.directory) as decode,
            zmq.Context() as context,
            ExitStack() as stack,
        ):
            sources = [Source(context, number) for number in range(ADDRESSES)]
            for number, one in enumerate(sources):
                stack.callback(one.close)
                one.news = NOTHING_YET
                decode.snapshot(worker.Receive(transfer_id=f"t{number}", source=one.address))
            until(sources, partial(all_heard, sources))
            for number, one in enumerate(sources):
                assert one.heard is not None
                for new in range(LAYOUTS):
                    block = BLOCK * (2 + number * LAYOUTS + new)
                    layout = Layout(planes=LAYOUT.planes, block_size_tokens=block)
                    one.tell(one.heard, layout=layout, **NOTHING_YET)
            until(sources, partial(has_refused, daemon, 1 if defence else REFUSED))
            assert (plans_refused(daemon) >= REFUSED) is (defence is None)


def all_heard(sources: list[Source]) -> bool:
    return all(one.heard is not None for one in sources)


def has_refused(daemon: LiveDaemon, plans: int) -> bool:
    return plans_refused(daemon) >= plans


def plans_refused(daemon: LiveDaemon) -> int:
    return daemon.status().counters.get("plans_refused", 0)


def until(sources: list[Source], condition: Callable[[], bool]) -> None:
    """The sources serve meanwhile."""
    until_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until_s
        for one in sources:
            one.serve()
