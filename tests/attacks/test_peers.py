"""Strangers and faithless peers, against the peer socket of a daemon with keys."""

import time
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils import z85

from attacks.scene import ends, without
from kvferry_daemon.keys import TRUSTED, new_key, trust
from kvferry_daemon.transports.tcp.listener import connect as connect_data
from kvferry_proto import peer, worker
from kvferry_proto.states import Role, State
from live import BLOCK, BOOT_ID, LiveDaemon, RawPeer, RawWorker

SILENT_MS = 1500
REPEATED = 900
WAIT_S = 10.0
OTHER_ID = "cd" * 16


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
