"""Who connects to the data port without a ticket, with another one's, or without an end."""

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from attacks.scene import ends, without
from kvferry_daemon.transports.tcp.listener import (
    HANDSHAKES_MAX,
    HANDSHAKES_OF_ONE,
    ConnectError,
    connect,
)
from kvferry_daemon.transports.tcp.tls import Certificate
from kvferry_proto import peer, worker
from kvferry_proto.chunk import ACCEPT_BYTES, pack_greeting, read_accept, read_greeting
from kvferry_proto.states import Role
from live import BLOCK, BOOT_ID, WINDOW, LiveDaemon, RawPeer, RawWorker
from tcp.door import client_hello
from tcp.relay import RELAY_HOST, Relay, server_beside

HOST = "127.0.0.1"
WAIT_S = 10.0
MADE_UP = bytes(range(32))
SECRET = b"what a user has written, as it lies in the cache"
DROP_S, DROPS = 0.1, 30
OTHER_ID = "cd" * 16
MANY = 40


class Victim:
    """A sink's daemon that is to be sent a block with the secret, on stream 0."""

    def __init__(self, daemon: LiveDaemon, prefill: RawWorker) -> None:
        prefill.snapshot(worker.Send(transfer_id="t"))
        seen = prefill.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == WINDOW)
        size = prefill.layout.block_bytes
        prefill.write_block(seen.runs[0][0], (SECRET * (size // len(SECRET) + 1))[:size])
        prefill.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK))
        self.link = RawPeer(daemon.address)
        hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
        self.link.source = self.link.say(hello).boot_id

    def ticket(self) -> peer.Ticket:
        """A ticket for connection 0 of the stream."""
        found = self.link.say(peer.OpenStream(stream=0, connection=0, **self.link.boots()))
        assert isinstance(found, peer.Ticket)
        return found

    def ask(self) -> None:
        """For the block, on that connection; the daemon has heard of it before it answers."""
        want = peer.Want(first_token=0, tokens=BLOCK, stream=0, connection=0)
        self.link.pull(want=[want])


@contextmanager
def scene(defence: str | None, directory: Path) -> Iterator[Victim]:
    with (
        without(defence)(directory / str(defence), lost_s=60) as daemon,
        RawWorker(daemon.directory) as prefill,
    ):
        victim = Victim(daemon, prefill)
        try:
            yield victim
        finally:
            victim.link.close()


def shown(port: int, ticket: bytes) -> socket.socket | None:
    """A data connection, if this ticket opens one."""
    try:
        one = connect(HOST, port, ticket, WAIT_S)
    except ConnectError:
        return None
    one.settimeout(WAIT_S)
    return one


def comes(one: socket.socket) -> bool:
    """Whether the secret does."""
    found = b""
    while SECRET not in found:
        part = one.recv(1 << 12)
        if not part:
            return False
        found += part
    return True


def test_who_has_no_ticket_is_sent_nothing(tmp_path: Path) -> None:
    for defence in ("any_ticket_will_do", None):
        with scene(defence, tmp_path) as victim:
            good = victim.ticket()
            thief, own = shown(good.port, MADE_UP), shown(good.port, good.ticket)
            assert (thief is None, own is None) == (defence is None, defence is not None)
            victim.ask()
            one = thief or own
            assert one is not None
            assert comes(one)
            one.close()


def test_a_ticket_that_was_shown_gives_nobody_the_stream(tmp_path: Path) -> None:
    for defence in ("tickets_last", None):
        with scene(defence, tmp_path) as victim:
            good = victim.ticket()
            own, thief = shown(good.port, good.ticket), shown(good.port, good.ticket)
            assert own is not None
            assert (thief is None) is (defence is None)
            victim.ask()
            assert comes(thief or own)
            for one in (own, thief):
                if one is not None:
                    one.close()


def test_a_ticket_is_worth_nothing_once_there_is_a_newer_one(tmp_path: Path) -> None:
    for defence in ("older_tickets_stay", None):
        with scene(defence, tmp_path) as victim:
            old, good = victim.ticket(), victim.ticket()
            thief = shown(old.port, old.ticket)
            assert (thief is None) is (defence is None)
            own = thief or shown(good.port, good.ticket)
            assert own is not None
            victim.ask()
            assert comes(own)
            own.close()


def test_a_connection_is_sent_nothing_that_was_asked_for_on_another(tmp_path: Path) -> None:
    """A ticket names a link, a stream and a connection number: for these alone it is good."""
    for defence in ("any_connection_will_do", None):
        with scene(defence, tmp_path) as victim:
            thief = RawPeer(victim.link.address)
            hello = peer.PeerHello(boot_id=OTHER_ID, daemon_id=OTHER_ID, life=1)
            boots = {"source_boot_id": thief.say(hello).boot_id, "sink_boot_id": OTHER_ID}
            ticket = thief.say(peer.OpenStream(stream=0, connection=0, **boots))
            one = shown(ticket.port, ticket.ticket)
            assert one is not None
            victim.ask()  # on a connection of its own, of that number, which is not open yet
            later = None
            if defence is None:  # by a later one, the first one ends with all that was asked for
                ticket = thief.say(peer.OpenStream(stream=0, connection=1, **boots))
                later = shown(ticket.port, ticket.ticket)
            assert comes(one) is (defence is not None)
            if later is not None:
                later.close()
            one.close()
            thief.close()


def port_of(daemon: LiveDaemon) -> tuple[int, bytes]:
    """The data port, and a ticket for it."""
    link = RawPeer(daemon.address)
    link.source = link.say(peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)).boot_id
    security = daemon.status().security
    assert security is not None
    ways = peer.Ways(payload_encryption="tls" if security.payload == "tls" else "off")
    found = link.say(peer.OpenStream(stream=0, connection=0, ways=ways, **link.boots()))
    assert isinstance(found, peer.Ticket)
    link.close()
    return found.port, found.ticket


@pytest.mark.parametrize("encryption", ["off", "tls"])
def test_a_handshake_in_drops_has_one_deadline_for_all_of_it(
    tmp_path: Path, encryption: str
) -> None:
    said = pack_greeting(MADE_UP) if encryption == "off" else client_hello()
    for defence in ("drops_have_time", "short_data_handshakes"):
        with (
            without(defence)(tmp_path / defence, payload_encryption=encryption) as daemon,
            socket.create_connection((HOST, port_of(daemon)[0]), WAIT_S) as one,
        ):
            cut = False
            for number in range(DROPS):  # three times as long as a handshake has
                one.sendall(said[number : number + 1])
                if cut := bool(select.select([one], [], [], DROP_S)[0]):
                    break
            assert cut is (defence == "short_data_handshakes")


def threads(daemon: LiveDaemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir()))


def test_half_open_data_connections_are_bounded(tmp_path: Path) -> None:
    """Each is a thread."""
    for defence in ("no_bound_on_handshakes", None):
        with without(defence)(tmp_path / str(defence)) as daemon, ExitStack() as stack:
            port, _ = port_of(daemon)
            before = threads(daemon)
            idle = [
                stack.enter_context(socket.create_connection((HOST, port), WAIT_S))
                for _ in range(MANY)
            ]
            if defence is None:  # one more ends the oldest
                assert all(map(ends, idle[:-HANDSHAKES_OF_ONE]))
            until_s = time.monotonic() + WAIT_S
            while not is_as_many(threads(daemon) - before, is_bound=defence is None):
                assert time.monotonic() < until_s
                time.sleep(0.01)


def is_as_many(more: int, *, is_bound: bool) -> bool:
    return more <= HANDSHAKES_OF_ONE if is_bound else more >= MANY


def test_half_open_data_connections_of_one_host_end_nobody_elses(tmp_path: Path) -> None:
    """One more than there may be ends the oldest one: of the same host, if it has its share."""
    for defence in ("one_host_has_all", None):
        with without(defence)(tmp_path / str(defence)) as daemon, ExitStack() as stack:
            port, ticket = port_of(daemon)
            other = stack.enter_context(
                socket.create_connection((HOST, port), WAIT_S, source_address=("127.0.0.2", 0))
            )
            many = [
                stack.enter_context(socket.create_connection((HOST, port), WAIT_S))
                for _ in range(HANDSHAKES_MAX + 1)
            ]
            last_over = HANDSHAKES_MAX - HANDSHAKES_OF_ONE if defence is None else 0
            assert ends(many[last_over])  # they came in order, so all have come
            try:
                other.sendall(pack_greeting(ticket))
                answer = other.recv(ACCEPT_BYTES, socket.MSG_WAITALL)
            except ConnectionError:
                answer = b""
            assert bool(answer) is (defence is None)
            assert not answer or read_accept(answer)


def test_who_answers_on_the_way_with_a_certificate_of_his_own_is_shown_no_ticket(
    tmp_path: Path,
) -> None:
    """He would take the connection over: the ticket opens it."""
    for defence in ("any_certificate_will_do", None):
        with ExitStack() as stack:
            messages, on_the_way = Relay(), stack.enter_context(server_beside())
            stack.callback(messages.close)
            on_the_way.settimeout(WAIT_S)
            at = {"peer_port": messages.port, "data_port": on_the_way.getsockname()[1]}
            tls = {"payload_encryption": "tls"}
            source = stack.enter_context(
                LiveDaemon(tmp_path / f"a {defence}", advertise_host=RELAY_HOST, **at, **tls)
            )
            sink = stack.enter_context(without(defence)(tmp_path / f"b {defence}", **tls))
            decode = stack.enter_context(RawWorker(sink.directory))
            decode.snapshot(worker.Receive(transfer_id="t", source=source.address))
            near, _ = on_the_way.accept()
            with near, Certificate().accept(near, time.monotonic() + WAIT_S) as one:
                one.settimeout(WAIT_S)
                try:
                    said = one.recv(64)
                except OSError:
                    said = b""
            assert bool(said) is (defence is not None)
            assert not said or len(read_greeting(said)) == 32
