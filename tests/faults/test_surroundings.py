"""What is around the daemons fails: their memory, their peers, the network between them."""

import errno
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest

from faults.four import DAEMONS, Four
from faults.networks import ADDRESS, Network, network
from faults.processes import WAIT_S, FaultDaemon, until
from faults.strangers import FalseSource, Manner
from kvferry_daemon.transports.tcp.listener import connect
from kvferry_proto import peer, worker
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role, State
from live import BLOCK, BOOT_ID, LAYOUT, WINDOW, RawPeer, RawWorker

SMALL_BYTES = 8 << 20
LOST_S = 2.5

# --- memory ---


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that is soon full."""
    where = tmp_path / "small"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", str(where)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def fill(where: Path) -> Path:
    """Leave no byte in a file system."""
    filler = where / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
        with pytest.raises(OSError, match="No space") as caught:
            file.write(b"x")
        assert caught.value.errno == errno.ENOSPC
    return filler


class Cramped(Four):
    """The sink's daemon lives on a small tmpfs."""

    def __init__(self, directory: Path, small: Path) -> None:
        super().__init__(directory)
        self.small = small

    def flags(self, name: str) -> Mapping[str, object]:
        return {"lost_s": 15.0}

    def runtime_dir(self, daemon: str) -> Path:
        return (self.small if daemon == "sink" else self.directory) / daemon


@pytest.fixture
def cramped(tmp_path: Path, small: Path) -> Iterator[Cramped]:
    with Cramped(tmp_path, small) as four:
        four.start_all()
        four.move("warm-up")
        yield four


def test_a_ledger_that_finds_no_room_holds_everything_up_and_loses_nothing(
    cramped: Cramped,
) -> None:
    before = {name: cramped.quiet(name) for name in DAEMONS}
    cramped.begin("case", pause=True)
    filler = fill(cramped.small)
    cramped.go_on()
    until(lambda: "cannot be written" in cramped.daemons["sink"].log(), "it was written")
    filler.unlink()
    assert cramped.route("case") == 0
    for name in DAEMONS:
        cramped.same(name, before[name])
    cramped.leave()


def test_a_daemon_that_gave_its_ledger_up_goes_on_once_there_is_room(
    cramped: Cramped, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: cramped.quiet(name) for name in DAEMONS}
    cramped.daemons["sink"].process.kill()
    monkeypatch.setenv("FAULTS_GIVE_UP_S", "0.5")
    cramped.start("sink")
    cramped.await_daemon("sink")
    cramped.begin("case", pause=True)
    filler = fill(cramped.small)
    cramped.go_on()
    assert cramped.daemons["sink"].end(WAIT_S) == 7
    filler.unlink()
    cramped.start("sink")
    cramped.await_daemon("sink")
    assert cramped.route("case") == 0
    cramped.move("after")
    for name in DAEMONS:
        cramped.same(name, before[name])
    cramped.leave()


def test_a_pool_that_finds_no_room_is_refused_and_leaves_nothing(
    tmp_path: Path, small: Path
) -> None:
    daemon = FaultDaemon(small / "a", papers=tmp_path)
    try:
        daemon.wait_ready()
        before = daemon.settled_census()
        filler = fill(small)
        with suppress(OSError), filler.open("r+b") as file:  # the worker's lock file has no bytes
            file.truncate(SMALL_BYTES // 2)
        large = LAYOUT.model_copy(update={"planes": a_plane(SMALL_BYTES // WINDOW)})
        with RawWorker(daemon.directory, large, hello=False) as one:
            hello = worker.Hello(lock=one.lock_name, layout=large)
            assert one.code(hello) == "pool_refused"
            assert not list((daemon.directory / "pools").iterdir())
            filler.unlink()
        with RawWorker(daemon.directory) as one:
            one.snapshot(worker.Send(transfer_id="t"))
        daemon.wait_until_free()
        daemon.wait_for_workers(0)
        after = daemon.settled_census()
        for path in (daemon.directory / "pools").iterdir():  # a pool, and its status board
            assert after["descriptors"].pop(str(path)) == 1
        assert after == before
        assert "Traceback" not in daemon.log()
    finally:
        daemon.make_sure_that_it_is_gone()


def a_plane(token_bytes: int) -> tuple[Plane, ...]:
    return (Plane(name="kv", dtype=Dtype.INT32, shape=(token_bytes // 4,)),)


# --- peers ---


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FaultDaemon]:
    """One that has little patience."""
    one = FaultDaemon(tmp_path / "a", connect_s=2.0, stall_s=3.0, resend_max_s=0.2)
    try:
        one.wait_ready()
        yield one
        assert one.alive, one.log()
        one.wait_until_free()
        assert "Traceback" not in one.log()
    finally:
        one.make_sure_that_it_is_gone()


@pytest.mark.parametrize("manner", get_args(Manner))
def test_a_false_source_costs_the_same_once_and_often(daemon: FaultDaemon, manner: Manner) -> None:
    """Its link is kept a while, for it may come to its senses: one link, however often we try."""

    def meet(one: RawWorker, number: int) -> None:
        met, name = source.met, f"t{number}"
        one.snapshot(worker.Receive(transfer_id=name, source=source.address))
        end = one.wait_end(Role.SINK, name)
        assert end.state is State.FAILED
        assert source.met > met, "its manner did not come through"
        one.snapshot(worker.Release(role=Role.SINK, transfer_id=name))
        daemon.wait_until_free()

    with FalseSource(manner) as source, RawWorker(daemon.directory) as one:
        meet(one, 0)
        first, sockets, threads = steady(daemon)
        for number in range(1, 5):
            meet(one, number)

        def is_same() -> bool:
            now, found, foreign = steady(daemon)
            some = abs(found - sockets) <= 2  # a stream, and our own question
            return now == first and some and foreign <= threads

        until(is_same, lambda: (first, sockets, threads, daemon.census()), 10)


def steady(daemon: FaultDaemon) -> tuple[dict[str, Any], int, int]:
    """A census without what comes and goes while a link is tried again and again.

    Beside it its sockets, and its foreign threads: one of ours that ends just now counts as such,
    and was seen to do so in two censuses, so that later ones may have fewer.
    """
    before: dict[str, Any] = {}
    while True:
        found = daemon.census()
        found["threads"] = [one for one in found["threads"] if one != "kvferry-receive"]
        sockets = int(found["descriptors"].pop("socket"))
        if found == before:
            foreign = int(found.pop("foreign_threads"))
            return found, sockets, foreign
        before = found


def test_a_sink_of_garbage_leaves_nothing(daemon: FaultDaemon) -> None:
    before = daemon.settled_census()
    for connection in range(5):
        raw = greeted(daemon)
        for junk in (b"", b"garbage", b"\x91" * 3000):
            assert raw.raw(junk).error.code == "bad_message"
        port, ticket = ticket_of(raw, connection)
        with connect("127.0.0.1", port, ticket, 5) as sock:
            sock.sendall(b"sinks say nothing here" * 100)
            raw.close()
    until(lambda: daemon.settled_census() == before, lambda: (before, daemon.census()))


def test_a_sink_that_never_reads_holds_no_block_of_a_transfer_that_ended(tmp_path: Path) -> None:
    """The thread that sends to it stands still in a full socket, a view of the blocks in its hand."""
    large = Layout(planes=a_plane(1 << 18), block_size_tokens=BLOCK)
    daemon = FaultDaemon(tmp_path / "a", pool_tokens=2 * WINDOW, source_share=1.0, lost_s=20.0)
    try:
        daemon.wait_ready()
        with RawWorker(daemon.directory, large) as one:
            before = daemon.settled_census()
            raw = greeted(daemon)
            port, ticket = ticket_of(raw)
            with connect("127.0.0.1", port, ticket, 5) as sock:
                one.snapshot(worker.Send(transfer_id="t"))
                one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW)
                one.snapshot(worker.Ready(transfer_id="t", ready_tokens=WINDOW))
                want = peer.Want(first_token=0, tokens=WINDOW, stream=0, connection=0)
                raw.pull(want=[want], layout_digest=large.digest)
                assert sock.recv(1, socket.MSG_PEEK)
                assert "bytes_sent" not in daemon.status().counters, "all of it fits a socket"
                one.snapshot(worker.Abort(role=Role.SOURCE, transfer_id="t"))
                one.snapshot(worker.Release(role=Role.SOURCE, transfer_id="t"))
                daemon.wait_until_free()  # though nobody has read a byte, nor closed anything
            raw.close()
            until(lambda: daemon.settled_census() == before, lambda: (before, daemon.census()))
    finally:
        daemon.make_sure_that_it_is_gone()


def greeted(daemon: FaultDaemon) -> RawPeer:
    raw = RawPeer(daemon.address)
    welcome = raw.say(peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1))
    assert isinstance(welcome, peer.PeerWelcome)
    raw.source = welcome.boot_id
    return raw


def ticket_of(raw: RawPeer, connection: int = 0) -> tuple[int, bytes]:
    answer = raw.say(peer.OpenStream(stream=0, connection=connection, **raw.boots()))
    assert isinstance(answer, peer.Ticket)
    return answer.port, answer.ticket


# --- network ---


class Apart(Four):
    """Each daemon with its worker's directory in a network namespace of its own."""

    def __init__(self, directory: Path, wire: Network) -> None:
        super().__init__(directory)
        self.wire = wire

    def flags(self, name: str) -> Mapping[str, object]:
        return {"lost_s": LOST_S, "peer_host": ADDRESS[name], "insecure": True}

    def prefix(self, name: str) -> list[str]:
        return self.wire.prefix(name)


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Apart]:
    with network() as wire, Apart(tmp_path, wire) as four:
        four.start_all()
        four.move("warm-up")
        yield four


Break = Callable[[Network], None]


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        (Network.cut, Network.mend),
        (lambda wire: wire.lose_from("source"), lambda wire: wire.find_from("source")),
        (lambda wire: wire.lose_from("sink"), lambda wire: wire.find_from("sink")),
    ],
    ids=["partition", "what the source says is lost", "what the sink says is lost"],
)
def test_a_network_that_comes_back_costs_no_attempt(
    apart: Apart, broken: Break, mended: Break
) -> None:
    """The sink calls its source lost, and takes it up again where it was."""
    before = {name: apart.quiet(name) for name in DAEMONS}
    apart.begin("case", pause=True)
    broken(apart.wire)
    apart.go_on()

    def state() -> str:
        (one,) = apart.daemons["sink"].status().peers
        return one.state

    until(lambda: state() == "lost", state)
    mended(apart.wire)
    assert apart.route("case") == 0
    apart.move("after")
    for name in DAEMONS:
        apart.same(name, before[name])
    apart.leave()
