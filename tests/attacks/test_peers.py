"""Strangers and faithless peers, against the peer socket of a daemon with keys."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils import z85

from attacks.scene import NOBODY, ends, stranger, without
from cli.processes import kvferry
from kvferry_daemon.core.sink_daemons import SINKS_MAX
from kvferry_daemon.keys import SECRET, TRUSTED, new_key, trust
from kvferry_daemon.links.curve import prove_ourselves
from kvferry_daemon.output import Exit
from kvferry_daemon.probe import key_of
from kvferry_daemon.transports.tcp.listener import connect as connect_data
from kvferry_proto import peer, worker
from kvferry_proto.states import Role, State
from live import BLOCK, BOOT_ID, LiveDaemon, RawPeer, RawWorker

SILENT_MS = 1500
REPEATED = 900
WAIT_S = 10.0
OTHER_ID = "cd" * 16


def off_loopback() -> str:
    """An address of this machine that others reach, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return "127.0.0.2"
        return str(one.getsockname()[0])


def a_key() -> tuple[str, bytes]:
    """A key pair: the public one as it is trusted, the secret one as it is used."""
    public, secret = zmq.curve_keypair()
    return z85.decode(public).hex(), z85.decode(secret)


def keys_of(directory: Path, **peers: str) -> str:
    """Make a daemon's keys, and trust these peers; return its public key."""
    own = new_key(directory)
    for name, key in peers.items():
        trust(directory, name, key)
    return own


def greet(daemon: LiveDaemon, secret: bytes, boot_id: str = BOOT_ID) -> Any:
    """Say hello with a key; the answer's kind, or nothing."""
    one = RawPeer(daemon.address, secret)
    try:
        hello = peer.PeerHello(boot_id=boot_id, daemon_id=boot_id, life=1)
        one.socket.send(peer.MESSAGES.encode(hello))
        return one.next().kind if one.socket.poll(SILENT_MS) else "nothing"
    finally:
        one.close()


@pytest.mark.parametrize("who", ["a stranger with a key", "in clear"])
def test_who_is_not_trusted_gets_no_answer(tmp_path: Path, who: str) -> None:
    friend, friends_secret = a_key()
    _, strangers_secret = a_key()
    secret = strangers_secret if "key" in who else b""
    for defence in ("any_key_will_do", None):
        keys = tmp_path / f"keys of {defence}"
        keys_of(keys, friend=friend)
        with without(defence)(tmp_path / str(defence), keys_dir=keys) as daemon:
            open_door = defence is not None and bool(secret)  # CURVE itself keeps clear text out
            assert greet(daemon, secret) == ("peer_welcome" if open_door else "nothing")
            assert greet(daemon, friends_secret) == "peer_welcome"


def test_a_key_that_is_not_trusted_any_more_is_served_no_more(tmp_path: Path) -> None:
    friend, secret = a_key()
    for defence, told in (("trust_lasts", "pong"), (None, "peer_refused")):
        keys = tmp_path / f"keys of {defence}"
        keys_of(keys, friend=friend)
        with without(defence)(tmp_path / str(defence), keys_dir=keys) as daemon:
            one = RawPeer(daemon.address, secret)
            hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
            one.source = one.say(hello).boot_id
            assert one.say(peer.Ping(**one.boots())).kind == "pong"
            (keys / TRUSTED).write_text("")
            wait_for_keys(daemon, 0)
            answer = one.say(peer.Ping(**one.boots()))
            assert answer.kind == told
            answers = 0
            for _ in range(REPEATED if defence is None else 0):
                one.socket.send(peer.MESSAGES.encode(peer.Ping(**one.boots())))
            while defence is None and one.socket.poll(SILENT_MS):
                one.next()
                answers += 1
            assert answers < REPEATED / 5  # ten a second
            one.close()
            if defence is None:
                assert answer.error.code == "not_trusted"
                assert greet(daemon, secret) == "nothing"


@pytest.mark.parametrize("kept", [False, True], ids=["the peer goes", "it has a new key"])
def test_a_key_that_is_not_trusted_any_more_has_no_data_connection(
    tmp_path: Path, kept: bool
) -> None:
    """What was asked for on it went out for as long as it lasted, to whoever had got the key."""
    (friend, secret), (newer, _) = a_key(), a_key()
    for defence, is_closed in (("connections_outlive_trust", False), (None, True)):
        keys = tmp_path / f"keys of {defence}"
        keys_of(keys, friend=friend)
        with without(defence)(tmp_path / str(defence), keys_dir=keys) as daemon:
            one = RawPeer(daemon.address, secret)
            hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
            one.source = one.say(hello).boot_id
            ticket = one.say(peer.OpenStream(stream=0, connection=0, **one.boots()))
            data = connect_data("127.0.0.1", ticket.port, ticket.ticket, WAIT_S)
            (keys / TRUSTED).write_text(f"friend {newer}\n" if kept else "")
            data.settimeout(WAIT_S if is_closed else SILENT_MS / 1000)
            assert ends(data) is is_closed
            data.close()
            one.close()


def test_a_key_that_comes_to_be_trusted_needs_no_restart(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys_of(keys)
    friend, secret = a_key()
    with LiveDaemon(tmp_path / "a", keys_dir=keys) as daemon:
        one = RawPeer(daemon.address, secret)
        hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
        one.socket.send(peer.MESSAGES.encode(hello))
        assert not one.socket.poll(SILENT_MS)
        trust(keys, "friend", friend)
        assert one.next().kind == "peer_welcome"  # libzmq went on trying
        one.close()


def test_a_trusted_peer_cannot_go_by_the_name_of_another(tmp_path: Path) -> None:
    """It could end the other one's links, and have its answers sent to itself."""
    victim, victims_secret = a_key()
    thief, thiefs_secret = a_key()
    for defence, told in (("peers_say_who_they_are", "pong"), (None, "peer_refused")):
        keys = tmp_path / f"keys of {defence}"
        keys_of(keys, victim=victim, thief=thief)
        with without(defence)(tmp_path / str(defence), keys_dir=keys) as daemon:
            one, other = (
                RawPeer(daemon.address, victims_secret),
                RawPeer(daemon.address, thiefs_secret),
            )
            hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
            other.source = one.source = one.say(hello).boot_id
            assert other.say(peer.Ping(**one.boots())).kind == told
            later = peer.PeerHello(boot_id=OTHER_ID, daemon_id=BOOT_ID, life=2)
            assert other.say(later).kind == "peer_welcome"
            assert one.say(peer.Ping(**one.boots())).kind == ("peer_refused" if defence else "pong")
            one.close()
            other.close()


def test_daemons_that_trust_each_other_move_a_payload(tmp_path: Path) -> None:
    a, b = tmp_path / "keys a", tmp_path / "keys b"
    key_a, key_b = keys_of(a), keys_of(b)
    trust(a, "b", key_b)
    trust(b, "a", key_a)
    with (
        LiveDaemon(tmp_path / "a", keys_dir=a) as source,
        LiveDaemon(tmp_path / "b", keys_dir=b) as sink,
    ):
        assert source.address.endswith(f"?key={key_a}")
        with RawWorker(source.directory) as prefill, RawWorker(sink.directory) as decode:
            assert move(prefill, decode, source.address).state is State.SUCCESS
        security = source.status().security
        assert security is not None
        assert (security.messages, security.insecure, security.trusted_keys) == ("curve", False, 1)


def test_a_source_that_the_sink_does_not_trust_fails_the_transfer_at_once(tmp_path: Path) -> None:
    """Its key came with the address, from whoever gave the worker the address."""
    a, b = tmp_path / "keys a", tmp_path / "keys b"
    key_a, key_b = keys_of(a), keys_of(b)
    trust(a, "b", key_b)
    with (
        LiveDaemon(tmp_path / "a", keys_dir=a) as source,
        LiveDaemon(tmp_path / "b", keys_dir=b) as sink,
        without("any_key_will_do")(tmp_path / "c", keys_dir=b) as weak,
        RawWorker(source.directory) as prefill,
        RawWorker(sink.directory) as decode,
        RawWorker(weak.directory) as decode_weakly,
    ):
        assert move(prefill, decode_weakly, source.address, "weak").state is State.SUCCESS
        seen = move(prefill, decode, source.address)
        assert seen.error is not None
        assert seen.error.code == "not_trusted"
        trust(b, "a", key_a)
        wait_for_keys(sink, 1)
        assert move(prefill, decode, source.address, "again").state is State.SUCCESS


class Impostor:
    """A daemon at a source's address that has not its secret; all that is said to it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], secret: bytes) -> None:
        """``secret``: of a key of its own; empty: it speaks in clear."""
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if secret:
            prove_ourselves(self.socket, secret)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}?key={a_key()[0]}"

    def next(self, wait_s: float = 0.0) -> Any:
        """What was said, if anything was; it is answered with welcome."""
        if not self.socket.poll(int(wait_s * 1000)):
            return None
        route, frame = self.socket.recv_multipart()
        said: Any = peer.MESSAGES.decode(frame)
        if isinstance(said, peer.PeerHello):
            answer = peer.PeerWelcome(version=1, boot_id=BOOT_ID, sink_boot_id=said.boot_id)
            self.socket.send_multipart([route, peer.MESSAGES.encode(answer)])
        return said


@pytest.mark.parametrize("with_key", [False, True])
def test_an_impostor_at_a_sources_address_hears_nothing(tmp_path: Path, with_key: bool) -> None:
    """He would learn ids, and could give a payload of his own for the source's."""
    _, secret = a_key()
    for defence in ("addresses_prove_nothing", None)[with_key:]:  # in clear there is no such key
        keys = tmp_path / f"keys of {defence}"
        keys_of(keys)
        wait_s = WAIT_S if defence else 0.5
        with (
            without(defence)(tmp_path / str(defence), keys_dir=keys, connect_s=wait_s) as daemon,
            RawWorker(daemon.directory) as decode,
            zmq.Context() as context,
        ):
            impostor = Impostor(context, secret if with_key else b"")
            with impostor.socket:
                trust(keys, "source", key_of(impostor.address))
                wait_for_keys(daemon, 1)
                decode.snapshot(worker.Receive(transfer_id="secret-id", source=impostor.address))
                if defence is not None:
                    assert isinstance(impostor.next(WAIT_S), peer.PeerHello)
                    while not isinstance(said := impostor.next(WAIT_S), peer.Pulls):
                        assert said is not None
                    assert said.pulls[0].transfer_id == "secret-id"
                    continue
                seen = decode.wait_end(Role.SINK, "secret-id")
                assert seen.error is not None
                assert seen.error.code == "peer_unreachable"
                assert impostor.next() is None


def test_a_source_whose_key_is_taken_from_the_sinks_list_sends_no_more(tmp_path: Path) -> None:
    total = 2 * BLOCK
    for defence in ("trust_lasts", None):
        a, b = tmp_path / f"keys a {defence}", tmp_path / f"keys b {defence}"
        key_a, key_b = keys_of(a), keys_of(b)
        trust(a, "b", key_b)
        trust(b, "a", key_a)
        with (
            LiveDaemon(tmp_path / f"a {defence}", keys_dir=a, lost_s=60) as source,
            without(defence)(tmp_path / f"b {defence}", keys_dir=b) as sink,
            RawWorker(source.directory) as prefill,
            RawWorker(sink.directory) as decode,
        ):
            prefill.snapshot(worker.Send(transfer_id="t", total_tokens=total))
            window = prefill.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens > BLOCK)
            prefill.fill(window, total)
            prefill.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK))
            decode.snapshot(worker.Receive(transfer_id="t", source=source.address))
            decode.wait_for(Role.SINK, lambda seen: seen.sent_tokens == BLOCK)
            (b / TRUSTED).write_text("")
            wait_for_keys(sink, 0)
            prefill.snapshot(worker.Ready(transfer_id="t", ready_tokens=total))
            seen = decode.wait_end(Role.SINK)
            if defence is not None:
                assert (seen.state, seen.sent_tokens) == (State.SUCCESS, total)
                continue
            assert seen.error is not None
            assert (seen.error.code, seen.sent_tokens) == ("not_trusted", BLOCK)


def test_a_list_that_others_may_change_lets_nobody_in(tmp_path: Path) -> None:
    key, secret = a_key()
    for defence, told in (("open_keys_will_do", "peer_welcome"), (None, "nothing")):
        keys = tmp_path / f"keys of {defence}"
        keys_of(keys, friend=a_key()[0])
        with without(defence)(tmp_path / str(defence), keys_dir=keys) as daemon:
            (keys / TRUSTED).chmod(0o666)  # a mistake of its operator's, which anybody can use
            with (keys / TRUSTED).open("a") as file:
                file.write(f"me {key}\n")
            if defence is None:
                daemon.wait_for_log("the trusted keys stay as they were")
            else:
                wait_for_keys(daemon, 2)
            assert greet(daemon, secret) == told


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as other users")
def test_a_secret_that_others_may_read_is_not_used(place: Path) -> None:
    """Whoever has it is this daemon, for all its peers."""
    keys, peers = place / "keys", place / "keys of a peer"
    trust(peers, "a", keys_of(keys))
    keys_of(peers)
    keys.chmod(0o755)
    (keys / SECRET).chmod(0o604)
    refused = kvferry("serve", "--runtime-dir", place / "a", "--keys-dir", keys)
    assert "open to others" in refused.stderr
    with (
        without("open_keys_will_do")(place / "a", keys_dir=keys),
        LiveDaemon(place / "b", keys_dir=peers) as other,
    ):
        stolen = bytes.fromhex(stranger(NOBODY, "read", keys / SECRET))
        assert greet(other, stolen) == "peer_welcome"


def test_one_peer_has_so_many_links_and_takes_no_place_of_another_ones(tmp_path: Path) -> None:
    honest, honests_secret = a_key()
    hog, hogs_secret = a_key()
    for defence, told in (("links_are_not_counted", "peer_refused"), (None, "pong")):
        keys = tmp_path / f"keys of {defence}"
        keys_of(keys, honest=honest, hog=hog)
        with without(defence)(tmp_path / str(defence), keys_dir=keys) as daemon:
            one, many = (RawPeer(daemon.address, key) for key in (honests_secret, hogs_secret))
            hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
            one.source = one.say(hello).boot_id
            for first in range(0, SINKS_MAX, 256):  # what it has to say to us has room
                for number in range(first, first + 256):
                    name = f"{number:032x}"
                    hello = peer.PeerHello(boot_id=name, daemon_id=name, life=1)
                    many.socket.send(peer.MESSAGES.encode(hello))
                assert {many.next().kind for _ in range(256)} == {"peer_welcome"}
            assert one.say(peer.Ping(**one.boots())).kind == told
            one.close()
            many.close()


def test_nobody_listens_in_clear_for_everybody_by_mistake(tmp_path: Path) -> None:
    everywhere = {"peer_host": "0.0.0.0", "advertise_host": "127.0.0.1"}
    args = [f"--{name.replace('_', '-')}={value}" for name, value in everywhere.items()]
    refused = kvferry("serve", "--runtime-dir", tmp_path / "whole", *args)
    assert (refused.returncode, refused.stdout) == (Exit.USAGE, "")
    assert "would be in clear text" in refused.stderr
    with (
        without("clear_text_anywhere")(tmp_path / "weak", lost_s=60, **everywhere) as daemon,
        RawWorker(daemon.directory) as prefill,
    ):
        prefill.snapshot(worker.Send(transfer_id="t", total_tokens=BLOCK))
        prefill.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens > 0)
        prefill.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK))
        thief = RawPeer(daemon.address.replace("127.0.0.1", off_loopback()))
        hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
        thief.source = thief.say(hello).boot_id
        assert thief.pull().available_tokens == BLOCK
        thief.close()


@pytest.mark.parametrize("with_key", [True, False])
def test_an_address_of_the_other_kind_is_refused(tmp_path: Path, with_key: bool) -> None:
    keys = tmp_path / "keys"
    own = keys_of(keys)
    flags = {} if with_key else {"keys_dir": keys}
    source = "tcp://127.0.0.1:1" + (f"?key={own}" if with_key else "")
    with LiveDaemon(tmp_path / "a", **flags) as daemon, RawWorker(daemon.directory) as raw:
        assert raw.code(worker.Receive(transfer_id="t", source=source)) == "bad_address"


def test_clear_text_off_loopback_is_seen_in_the_status_and_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFERRY_INSECURE", "true")
    flags = {"peer_host": "0.0.0.0", "advertise_host": "127.0.0.1"}
    with LiveDaemon(tmp_path / "a", **flags) as daemon:
        security = daemon.status().security
        assert security is not None
        assert security.insecure
        daemon.wait_for_log("INSECURE")


def move(
    prefill: RawWorker, decode: RawWorker, address: str, transfer_id: str = "t"
) -> worker.Snapshot:
    """Send a block and receive it; the sink's end."""
    prefill.snapshot(worker.Send(transfer_id=transfer_id, total_tokens=BLOCK))
    window = prefill.wait_for(Role.SOURCE, lambda s: s.allocated_tokens > 0, transfer_id)
    prefill.fill(window, BLOCK)
    prefill.snapshot(worker.Ready(transfer_id=transfer_id, ready_tokens=BLOCK))
    decode.snapshot(worker.Receive(transfer_id=transfer_id, source=address))
    seen = decode.wait_end(Role.SINK, transfer_id)
    if seen.state is State.SUCCESS:
        decode.check(seen)
    return seen


def wait_for_keys(daemon: LiveDaemon, keys: int) -> None:
    """Wait until the daemon has read so many trusted keys."""
    until = time.monotonic() + WAIT_S
    while True:
        security = daemon.status().security
        assert security is not None
        if security.trusted_keys == keys:
            return
        assert time.monotonic() < until, security
        time.sleep(0.02)
