"""Who sends or connects too much, on the sockets of workers, peers and operators."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from bench.zmtp import GREETING, joined

from attacks.scene import started, without
from kvferry_daemon.core.crowd import BAR_S
from kvferry_daemon.inbound import FLOOD_S
from kvferry_daemon.keys import new_key
from kvferry_proto import control, peer, worker
from kvferry_proto.errors import Code
from kvferry_proto.states import Role
from live import BOOT_ID, LiveDaemon, RawPeer, RawWorker

MANY = 400
FEW_A_S = 50
QUIET_MS, WAIT_MS = 500, 20_000
DEAR = 80  # messages that take 30 ms each
WORK_S = 60.0
HANDSHAKE_S = 5.0
SOCKETS = ("worker", "control", "peer")


def answers(
    one: zmq.Socket[bytes],
    daemon: LiveDaemon,
    decode: Callable[[bytes], Any],
    refusal: type,
    counter: str,
) -> list[Any]:
    """All that come to MANY messages: each is answered, or counted and maybe refused."""
    found: list[Any] = []
    until_s = time.monotonic() + HANDSHAKE_S * 4
    while True:
        while one.poll(100):
            found.append(decode(one.recv()))
        answered = sum(not isinstance(reply, refusal) for reply in found)
        counted = daemon.status().counters.get(counter, 0)
        if answered + counted >= MANY and not one.poll(100):
            return found
        assert time.monotonic() < until_s, (answered, counted)


def test_a_worker_that_sends_too_much_is_told_when_to_try_again(tmp_path: Path) -> None:
    beat = worker.CALLS.encode(worker.Heartbeat(call=7))
    for defence, over in (("no_rates", False), (None, True)):
        with (
            without(defence)(tmp_path / str(defence), messages_a_s=FEW_A_S) as daemon,
            RawWorker(daemon.directory) as hog,
        ):
            for _ in range(MANY):
                hog.socket.send(beat)
            counter = "messages_over_rate_worker"
            replies = answers(hog.socket, daemon, worker.REPLIES.decode, worker.Failure, counter)
            refused = [one for one in replies if isinstance(one, worker.Failure)]
            counted = daemon.status().counters.get(counter, 0)
            if not over:
                assert (len(replies), refused, counted) == (MANY, [], 0)
                continue
            assert len(replies) < 3 * FEW_A_S  # and no answer to most of them
            assert counted > MANY / 2
            assert {one.error.code for one in refused} == {Code.RESOURCE_EXHAUSTED}
            assert {one.call for one in refused} == {7}
            assert 0 < (refused[0].error.retry_after_s or 0) <= 1 / FEW_A_S
            time.sleep(2 / FEW_A_S)  # what it was told to do
            assert hog.call(worker.Heartbeat()).kind == "snapshots"


def test_a_worker_whose_messages_take_long_to_read_has_a_part_of_the_loop(tmp_path: Path) -> None:
    """He is at once as good as new; what he has sent by then is not worth much."""
    watched = [worker.Watched(role=Role.SOURCE, transfer_id="t")] * 60
    batch = worker.CALLS.encode(worker.Batch(calls=[worker.Poll(transfers=watched)] * 200))
    for defence, over in (("work_is_free", False), (None, True)):
        with (
            without(defence)(tmp_path / str(defence), lost_s=60) as daemon,
            RawWorker(daemon.directory) as hog,
            started(f"{os.getuid()}:{os.getgid()}", "beat", daemon.directory) as other,
        ):
            assert other.stdout is not None
            assert other.stdout.readline() == "joined\n"
            for _ in range(DEAR):
                hog.socket.send(batch)
            hog.socket.send(worker.CALLS.encode(worker.Heartbeat(call=7)))  # is small
            replies = 0
            while hog.reply(WORK_S).call != 7:
                replies += 1
            counted = daemon.status().counters.get("messages_over_rate_worker", 0)
            assert replies + counted == DEAR
            assert (counted > 0) is over


def test_a_peer_that_sends_too_much_is_told_when_to_try_again(tmp_path: Path) -> None:
    for defence, over in (("no_rates", False), (None, True)):
        with without(defence)(tmp_path / str(defence), messages_a_s=FEW_A_S) as daemon:
            hog, other = RawPeer(daemon.address), RawPeer(daemon.address)
            hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
            hog.source = other.source = hog.say(hello).boot_id
            ping = peer.MESSAGES.encode(peer.Ping(**hog.boots()))
            for _ in range(MANY):
                hog.socket.send(ping)
            counter = "messages_over_rate_peer"
            told = answers(hog.socket, daemon, peer.MESSAGES.decode, peer.PeerRefused, counter)
            refused = [one for one in told if isinstance(one, peer.PeerRefused)]
            assert bool(refused) is over
            if over:
                assert {one.error.code for one in refused} == {Code.RESOURCE_EXHAUSTED}
                assert refused[0].error.retry_after_s is not None
                assert daemon.status().counters[counter] > MANY / 2
            assert other.say(peer.Ping(**hog.boots())).kind == "pong"
            hog.close()
            other.close()


def test_an_operator_that_asks_too_much_is_told_when_to_try_again(tmp_path: Path) -> None:
    for defence, over in (("no_rates", False), (None, True)):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            zmq.Context() as context,
            context.socket(zmq.DEALER) as socket,
        ):
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(f"ipc://{daemon.directory / 'control.sock'}")
            question = control.REQUESTS.encode(control.GetTransfers())
            for _ in range(8 * MANY):
                socket.send(question)
            refused = None
            while refused is None and socket.poll(QUIET_MS if not over else WAIT_MS):
                answer = control.ANSWERS.decode(socket.recv())
                refused = answer if isinstance(answer, control.ControlFailure) else None
            assert (refused is not None) is over
            if refused is not None:
                assert refused.error.code == Code.RESOURCE_EXHAUSTED
                assert refused.error.retry_after_s is not None


def test_a_daemon_has_so_many_transfers_of_all_workers_together(tmp_path: Path) -> None:
    for most, over in ((8, False), (4, True)):
        with (
            LiveDaemon(tmp_path / str(most), transfers_max=most) as daemon,
            RawWorker(daemon.directory) as hog,
            RawWorker(daemon.directory) as other,
        ):
            for number in range(2):
                hog.snapshot(worker.Send(transfer_id=f"t{number}"))
                other.snapshot(worker.Receive(transfer_id=f"t{number}"))
            for one, call in ((hog, worker.Send), (other, worker.Receive)):
                reply = one.call(call(transfer_id=f"one more {call.__name__}".replace(" ", "-")))
                assert isinstance(reply, worker.Failure) is over
                if over:
                    assert reply.error.code == Code.RESOURCE_EXHAUSTED
                    assert reply.error.retry_after_s == 1.0
            hog.snapshot(worker.Send(transfer_id="t0"))  # one that it has


def test_a_worker_has_so_many_transfers_and_others_still_open_theirs(tmp_path: Path) -> None:
    for few, over in ((8, False), (4, True)):
        with (
            LiveDaemon(tmp_path / str(few), worker_transfers_max=few) as daemon,
            RawWorker(daemon.directory) as hog,
            RawWorker(daemon.directory) as other,
        ):
            for number in range(4):
                hog.snapshot(worker.Send(transfer_id=f"t{number}"))
            reply = hog.call(worker.Send(transfer_id="one-more"))
            assert isinstance(reply, worker.Failure) is over
            if over:
                assert reply.error.code == Code.RESOURCE_EXHAUSTED
                assert reply.error.retry_after_s == 1.0
                hog.snapshot(worker.Send(transfer_id="t0"))  # one that it has
            other.snapshot(worker.Send(transfer_id="of-another"))


@contextmanager
def half_open(daemon: LiveDaemon, to: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections that never say a word."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            if to == "peer":
                host, _, port = daemon.address.removeprefix("tcp://").rpartition(":")
                one = socket.create_connection((host, int(port)))
            else:
                one = socket.socket(socket.AF_UNIX)
                one.connect(str(daemon.directory / f"{to}.sock"))
            found.append(stack.enter_context(one))
        yield found


def descriptors(daemon: LiveDaemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


@pytest.mark.parametrize(("to", "bound"), [("worker", 128), ("peer", 256), ("control", 64)])
def test_one_process_or_host_has_so_many_connections_and_no_more(
    tmp_path: Path, to: str, bound: int
) -> None:
    """Half-open ones count, too: they have not even begun their handshake."""
    for defence, is_bound in (("no_gate", False), (None, True)):
        with without(defence)(tmp_path / str(defence)) as daemon, ExitStack() as stack:
            most, ours = descriptors(daemon) + bound + 4, []
            until_s = time.monotonic() + HANDSHAKE_S  # so long they count
            for _ in range(3):  # slower than the bound on connections a second
                ours += stack.enter_context(half_open(daemon, to, bound // 2))
                time.sleep(0.7)
            cut: set[socket.socket] = set()
            while (descriptors(daemon) <= most) is not is_bound or (
                is_bound and len(cut) < bound // 2 - 4
            ):
                cut |= {one for one in ours if is_over(one)}
                assert time.monotonic() < until_s, (descriptors(daemon), most, len(cut))
            stack.close()  # or we ourselves could not ask
            counted = daemon.status().counters.get(f"connections_over_bound_{to}", 0)
            assert (counted >= bound // 2 - 4) is is_bound


def test_a_handshake_that_takes_too_long_is_cut_on_every_socket(tmp_path: Path) -> None:
    """Half-open, or one byte after the other: libzmq's own limit would be 30 s."""
    with (
        without("handshakes_last")(tmp_path / "weak") as weak,
        LiveDaemon(tmp_path / "whole") as whole,
        ExitStack() as stack,
    ):
        opened = {
            daemon: [one for to in SOCKETS for one in stack.enter_context(half_open(daemon, to, 2))]
            for daemon in (weak, whole)
        }
        slow = [one for both in opened.values() for one in both[::2]]
        open_now = {one for both in opened.values() for one in both}
        until_s = time.monotonic() + 4 * HANDSHAKE_S
        said = 0
        while not open_now.isdisjoint(opened[whole]):
            assert time.monotonic() < until_s
            for one in open_now.intersection(slow):
                with suppress(OSError):
                    one.sendall(GREETING[said : said + 1])
            said += 1
            time.sleep(HANDSHAKE_S / 20)  # until the next drop
            open_now = {one for one in open_now if not is_over(one)}
        assert open_now == set(opened[weak])


def is_over(one: socket.socket) -> bool:
    """Whether the connection has ended, behind what it brought."""
    try:
        return not one.recv(64, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_connections_that_the_door_refused_are_not_counted_for_ever(tmp_path: Path) -> None:
    """Whoever tries with a wrong key, or in clear, would shut others of his host out at last."""
    new_key(tmp_path / "keys")
    with LiveDaemon(tmp_path / "a", keys_dir=tmp_path / "keys") as daemon:
        for _ in range(300):
            with pytest.raises(OSError, match=r"cut|reset|Broken"):
                joined(daemon.address.partition("?")[0])
            time.sleep(1 / 150)  # slower than the bound on new ones
        counters = daemon.status().counters
        assert counters.get("connections_over_bound_peer", 0) == 0


def test_an_honest_worker_works_beside_a_flood_of_connections(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as daemon, RawWorker(daemon.directory) as honest:
        for _ in range(5):
            with half_open(daemon, "worker", 200):  # more than one process may have, at any speed
                assert honest.call(worker.Heartbeat()).kind == "snapshots"
        until_s = time.monotonic() + HANDSHAKE_S
        while not daemon.status().counters.get("connections_over_bound_worker"):
            assert time.monotonic() < until_s, "none was cut"


class FloodingSource:
    """A source's daemon that says welcome, and then what nobody asked for, without a pause."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"

    def welcome(self, wait_s: float) -> tuple[bytes, bytes]:
        """Wait for a hello; the route of who said it, and a message for it."""
        until_s = time.monotonic() + wait_s
        while self.socket.poll(max(1, int((until_s - time.monotonic()) * 1000))):
            route, frame = self.socket.recv_multipart()
            said = peer.MESSAGES.decode(frame)
            if isinstance(said, peer.PeerHello):
                answer = peer.PeerWelcome(version=1, boot_id=BOOT_ID, sink_boot_id=said.boot_id)
                self.socket.send_multipart([route, peer.MESSAGES.encode(answer)])
                pong = peer.Pong(news=0, source_boot_id=BOOT_ID, sink_boot_id=said.boot_id)
                return route, peer.MESSAGES.encode(pong)
        raise AssertionError("nobody has said hello")

    def flood(self, route: bytes, message: bytes, for_s: float) -> bool:
        """Send far more than one may a second; whether its link was dropped."""
        until_s = time.monotonic() + for_s
        while time.monotonic() < until_s:
            try:
                for _ in range(FEW_A_S):
                    self.socket.send_multipart([route, message], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno == zmq.EHOSTUNREACH:
                    return True
                if error.errno != zmq.EAGAIN:
                    raise
            while self.socket.poll(20):
                self.socket.recv_multipart()
        return False


def test_a_source_that_sends_too_much_is_not_read_and_then_dropped(tmp_path: Path) -> None:
    for defence, dropped in (("no_rates", False), (None, True)):
        with (
            without(defence)(tmp_path / str(defence), messages_a_s=4 * FEW_A_S) as daemon,
            RawWorker(daemon.directory) as honest,
            zmq.Context() as context,
            context.socket(zmq.ROUTER) as router,
        ):
            hog = FloodingSource(router)
            honest.snapshot(worker.Receive(transfer_id="t", source=hog.address))
            known = hog.welcome(HANDSHAKE_S)
            assert hog.flood(*known, for_s=4 * FLOOD_S) is dropped
            assert honest.call(worker.Heartbeat()).kind == "snapshots"
            counters = daemon.status().counters
            assert (counters.get("messages_over_rate_source", 0) > MANY) is dropped
            assert counters.get("sources_shunned", 0) == dropped
            if dropped:
                assert "too many messages a second" in daemon.log()
                hog.welcome(2 * BAR_S)  # it may try again
