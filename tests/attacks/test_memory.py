"""Messages without an end, and answers that nobody takes: what libzmq would keep for ever."""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from bench.zmtp import MORE, frame, joined, shake_hands

from attacks.scene import ends, without
from http_daemon import metrics_of
from kvferry_client import connect
from kvferry_proto import control, peer, worker
from kvferry_proto.layout import Layout
from kvferry_proto.states import Role
from live import BLOCK, BOOT_ID, LAYOUT, LiveDaemon, RawPeer, RawWorker

MIB = 1 << 20
POURED_MIB = 1500
BOUND_MIB = 1000  # more than it had, at any time; busy cores let in 450, quiet ones 200
POLLS = 3000
UNREAD_MIB = 100  # the daemon looks from 64 on
WAIT_S = 20.0
CUT = 'kvferry_refused_total{reason="connections_cut_for_memory"}'
SHUT_S = 3.0  # a window that stays shut so long is one of a connection that was cut


def address_of(daemon: LiveDaemon, to: str) -> str:
    """Of one of its sockets."""
    return daemon.address if to == "peer" else f"ipc://{daemon.directory / to}.sock"


def counted(daemon: LiveDaemon, metric: str) -> float:
    """As it is told by HTTP: whoever was thrown out gets no answer from the sockets."""
    (found,) = re.findall(rf"^{re.escape(metric)} (\S+)$", metrics_of(daemon), re.MULTILINE)
    return float(found)


def memory_mib(daemon: LiveDaemon) -> float:
    """What the daemon has beside pools."""
    facts = Path(f"/proc/{daemon.process.pid}/statm").read_text().split()
    return (int(facts[1]) - int(facts[2])) * os.sysconf("SC_PAGE_SIZE") / MIB


def poured(one: socket.socket, data: bytes, times: int, look: Callable[[], float]) -> float:
    """Send until it is cut, and return what ``look`` saw at most."""
    most = look()
    try:
        for _ in range(times):
            one.sendall(data)
            most = max(most, look())
    except OSError:  # cut; with its window shut, the kernel does not even tell the sender
        pass
    return most


def is_cut(one: socket.socket) -> bool:
    """Whether the connection ends, after what was said on it before."""
    one.settimeout(WAIT_S)
    return ends(one)


@pytest.mark.parametrize("to", ["worker", "control", "peer"])
def test_a_message_without_an_end_is_cut(tmp_path: Path, to: str) -> None:
    endless = frame(bytes(MIB), MORE)
    for defence, is_bound in (("no_pressure", False), (None, True)):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            connect(daemon.directory, LAYOUT) as honest,
        ):
            at = address_of(daemon, to)
            before = memory_mib(daemon)
            with joined(at) as one:
                most = poured(one, endless, POURED_MIB, lambda: memory_mib(daemon))
                assert (most - before < BOUND_MIB) is is_bound
                if not is_bound:
                    continue
                assert is_cut(one)
            until_s = time.monotonic() + WAIT_S
            while memory_mib(daemon) - before > 64 or "memory grew by" not in daemon.log():
                assert time.monotonic() < until_s, memory_mib(daemon)
                time.sleep(0.05)
            assert honest.call(worker.Heartbeat()).kind == "snapshots"
            # On a busy machine it may pour too slowly to be told from one that is only idle.
            was_evident = (
                "cut 1 connections that brought no end of a message or took" in daemon.log()
            )
            assert not was_evident or stays_away(at)


def test_a_source_that_sends_a_message_without_an_end_is_cut(tmp_path: Path) -> None:
    endless = frame(bytes(MIB), MORE)
    for defence, is_bound in (("no_pressure", False), ("sources_pour_again", True), (None, True)):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            RawWorker(daemon.directory) as decode,
            socket.create_server(("127.0.0.1", 0)) as source,
        ):
            source.settimeout(WAIT_S)
            before = memory_mib(daemon)
            address = f"tcp://127.0.0.1:{source.getsockname()[1]}"
            decode.snapshot(worker.Receive(transfer_id="t", source=address))
            with source.accept()[0] as one:
                one.settimeout(SHUT_S)
                shake_hands(one, b"ROUTER")
                most = poured(one, endless, POURED_MIB, lambda: memory_mib(daemon))
                assert (is_bound and is_cut(one)) or not (is_bound or is_gone(one))
            assert (most - before < BOUND_MIB) is is_bound
            assert daemon.status().workers == 1
            if is_bound and "cut 1 connections that brought no end of a message" in daemon.log():
                assert is_asked_again(source) is (defence is not None)
                shunned = daemon.status().counters.get("sources_shunned", 0)
                assert shunned == (defence is None)


def is_asked_again(source: socket.socket) -> bool:
    """Whether the daemon connects anew, long before 10 s have passed, and stays."""
    source.settimeout(SHUT_S)
    try:
        while True:
            with source.accept()[0] as one:
                one.settimeout(SHUT_S)
                with suppress(OSError):
                    shake_hands(one, b"ROUTER")
                    return True
    except TimeoutError:
        return False


@pytest.mark.parametrize("to", ["worker", "control", "peer"])
def test_a_message_of_far_too_many_frames_ends_its_connection(tmp_path: Path, to: str) -> None:
    many = frame(b"x", MORE) * 20_000 + frame(b"x", 0)
    for defence, is_cut_off in (("any_number_of_frames", False), (None, True)):
        with without(defence)(tmp_path / str(defence), http_port=0) as daemon:
            at = address_of(daemon, to)
            with joined(at) as one:
                one.sendall(many)
                if is_cut_off:
                    assert is_cut(one)
                    assert stays_away(at)
                else:
                    assert b"bad_message" in one.recv(1 << 12)
                    one.sendall(frame(b"again", 0))
                    assert b"bad_message" in one.recv(1 << 12)
            assert counted(daemon, f'kvferry_drops_total{{reason="bad_messages_{to}"}}') >= 1


@pytest.mark.parametrize("to", ["worker", "control", "peer"])
def test_a_frame_that_is_far_too_long_is_not_taken_in(tmp_path: Path, to: str) -> None:
    """As many as there is memory for would be, from each who is let in."""
    long = frame(bytes(8 * MIB), 0)
    for defence, is_cut_off in (("frames_of_any_size", False), (None, True)):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            joined(address_of(daemon, to)) as one,
        ):
            poured(one, long, 1, lambda: 0.0)
            if is_cut_off:
                assert is_cut(one)
            else:
                assert b"bad_message" in one.recv(1 << 12)


@contextmanager
def with_large_answers(daemon: LiveDaemon, to: str) -> Iterator[list[bytes]]:
    """A hello, and a question about `t`, whose aux values make every answer large."""
    aux: dict[str, int | float | str | bytes] = {name: bytes(1 << 16) for name in "abc"}
    layout = Layout(planes=LAYOUT.planes, aux=tuple(aux), block_size_tokens=BLOCK)
    with RawWorker(daemon.directory, layout) as one:
        assert one.welcome is not None
        one.snapshot(worker.Send(transfer_id="t", total_tokens=BLOCK, aux=aux))
        if to == "worker":
            one.snapshot(worker.Receive(transfer_id="t"))
            one.wait_for(Role.SINK, lambda seen: seen.aux is not None)
            secret = one.welcome.session
            hello = worker.Hello(lock=one.lock_name, layout=layout, session=secret)
            watched = worker.Watched(role=Role.SINK, transfer_id="t")
            calls = (hello, worker.Poll(transfers=[watched]))
            yield [worker.CALLS.encode(call) for call in calls]
            return
        if to == "control":
            requests = (control.GetStatus(), control.GetTransfers())
            yield [control.REQUESTS.encode(request) for request in requests]
            return
        link = RawPeer(daemon.address)
        greeting = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
        link.source = link.say(greeting).boot_id
        pull = link.a_pull(layout_digest=layout.digest)
        pulls = peer.Pulls(pulls=[pull], **link.boots())
        try:
            yield [peer.MESSAGES.encode(message) for message in (greeting, pulls)]
        finally:
            link.close()


@pytest.mark.parametrize("to", ["worker", "control", "peer"])
def test_who_does_not_take_his_answers_is_cut(tmp_path: Path, to: str) -> None:
    # Without rates: an operator who asks so often is refused, and refusals are small, so on some
    # machines those alone would keep the memory.
    for defence, is_bound in (("no_pressure_and_no_rates", False), ("no_rates", True)):
        with (
            without(defence)(tmp_path / str(defence), lost_s=60, http_port=0) as daemon,
            with_large_answers(daemon, to) as (hello, question),
        ):
            before = memory_mib(daemon)
            with joined(address_of(daemon, to)) as one:
                one.sendall(frame(hello, 0))
                most = poured(one, frame(question, 0), POLLS, lambda: memory_mib(daemon))
                until_s = time.monotonic() + WAIT_S
                while not (is_gone(one) if is_bound else most - before >= UNREAD_MIB):
                    most = max(most, memory_mib(daemon))
                    assert time.monotonic() < until_s, most
                assert is_gone(one) is is_bound
            if is_bound:
                while memory_mib(daemon) - before > 64:
                    assert time.monotonic() < until_s, memory_mib(daemon)
                    time.sleep(0.05)
                while not (cut := counted(daemon, CUT)):  # we ourselves may have to stay away
                    assert time.monotonic() < until_s
                    time.sleep(0.05)
                assert cut == 1 or to != "worker", cut  # not the idle


def stays_away(address: str) -> bool:
    """Whether who comes again at once is cut, in his handshake or right behind it."""
    try:
        with joined(address) as again:
            return is_cut(again)
    except OSError:
        return True


def is_gone(one: socket.socket) -> bool:
    """Whether it was cut, though much of what was said on it is not read yet."""
    try:
        one.sendall(frame(b"", 0))
    except OSError:
        return True
    return False
