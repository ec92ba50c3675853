"""Peer and its streams: tickets, numbers of connections, connecting again."""

import random

import pytest

from core.test_peers import of, said
from core.test_peers_table import (
    BOOT,
    CALLS,
    REBORN,
    SECRET,
    current,
    link_in,
    pong,
    stream_in,
    stream_of,
    ticket,
)
from core.test_sink_table import SOURCE
from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.core.peer_effects import Connect, Disconnect, PeerFailed
from kvferry_daemon.core.peers import Peer
from kvferry_proto import peer as wire
from kvferry_proto.errors import Code

CERTIFICATE = bytes(range(32))

# --- streams ---


def test_a_ticket_opens_exactly_the_connection_that_was_asked_for() -> None:
    peer = stream_in("asking")
    key = StreamKey(SOURCE, 0, 0)
    assert peer.on_message(ticket(), 0.1) == [Connect(key, 7, SECRET)]
    assert peer.on_message(ticket(), 0.1) == []  # the same once more: it is on its way
    assert (peer.streams_open, peer.closed) == ([], False)
    assert peer.on_stream_up(key, 0.2) == []
    assert peer.streams_open == [key]


@pytest.mark.parametrize(
    "wrong",
    [ticket(0, 1), ticket(1, 0), ticket(9, 0), ticket(boot_id=REBORN), ticket(to="c" * 16)],
)
def test_a_ticket_for_anything_else_opens_nothing(wrong: wire.Ticket) -> None:
    peer = stream_in("asking")
    assert peer.on_message(wrong, 0.1) == []
    assert stream_of(peer) == "asking"


@pytest.mark.parametrize("encrypts", [False, True])
def test_a_source_that_never_heard_of_the_setting_is_not_connected_to(encrypts: bool) -> None:
    """One of an earlier version gives its ticket without a word about encryption."""
    other, ours = (ticket(), ticket(certificate_sha256=CERTIFICATE))
    if not encrypts:
        other, ours = ours, other
    peer = stream_in("asking")
    peer.ways = wire.Ways(payload_encryption="tls" if encrypts else "off")
    [failed] = peer.on_message(other, 0.1)
    assert isinstance(failed, PeerFailed)
    assert failed.code is Code.ENCRYPTION_DIFFERS
    assert stream_of(peer) == "asking"
    key, told = StreamKey(SOURCE, 0, 0), CERTIFICATE if encrypts else None
    assert peer.on_message(ours, 0.2) == [Connect(key, 7, SECRET, certificate_sha256=told)]


def test_a_lost_ticket_is_asked_for_again() -> None:
    peer = stream_in("asking")
    times = []
    for at_s in (1.0, 1.9, 2.0, 3.0, 3.9, 4.0):
        peer.on_message(pong(), at_s)
        times += [at_s] * len(said(peer.tick(at_s), wire.OpenStream))
    assert times == [2.0, 4.0]


def test_a_connection_that_nobody_waits_for_is_closed() -> None:
    """Its number has passed: somebody else may already write the extents that it would bring."""
    peer = stream_in("connecting")
    old = current(peer)
    peer.on_stream_down(old, "refused", 0.1)
    assert peer.on_stream_up(old, 0.2) == [Disconnect(old)]
    assert peer.streams_open == []


def test_the_end_of_an_older_connection_does_not_end_the_newer() -> None:
    peer = stream_in("closed")
    peer.tick(0.1)
    peer.on_message(ticket(0, 1), 0.1)
    peer.on_stream_up(StreamKey(SOURCE, 0, 1), 0.1)
    peer.on_stream_down(StreamKey(SOURCE, 0, 0), "late", 0.2)
    assert peer.streams_open == [StreamKey(SOURCE, 0, 1)]


def test_a_stream_that_ends_leaves_the_others() -> None:
    peer = stream_in("up", streams=2)
    peer.on_message(ticket(1), 0.0)
    peer.on_stream_up(StreamKey(SOURCE, 1, 0), 0.0)
    peer.on_stream_down(StreamKey(SOURCE, 0, 0), "cut", 0.1)
    assert peer.streams_open == [StreamKey(SOURCE, 1, 0)]
    assert peer.detail == "stream 0: cut"


def connects(peer: Peer, count: int) -> list[float]:
    """When a stream is asked for, if every connect fails at once; a new number each time."""
    times: list[float] = []
    for _ in range(10 * count):
        if len(times) == count:
            break
        at_s = peer.wake_at_s
        peer.on_message(pong(), at_s)
        for asked in said(peer.tick(at_s), wire.OpenStream):
            assert asked.connection == len(times) + 1
            times.append(round(at_s, 3))
            peer.on_message(ticket(0, asked.connection), at_s)
            peer.on_stream_down(current(peer), "refused", at_s)
    return times


def test_connecting_again_backs_off_but_not_for_ever() -> None:
    times = connects(stream_in("closed"), 8)
    assert times == [0.0, 0.4, 1.2, 2.8, 4.8, 6.8, 8.8, 10.8]


def test_a_connection_that_stood_is_made_again_at_once() -> None:
    peer = stream_in("closed")
    connects(peer, 5)
    peer.tick(peer.wake_at_s)
    for _ in range(10):
        if stream_of(peer) == "asking":
            break
        peer.on_message(pong(), peer.wake_at_s)
        peer.tick(peer.wake_at_s)
    key, now_s = current(peer), peer.now_s
    peer.on_message(ticket(0, key.connection), now_s)
    peer.on_stream_up(key, now_s)
    peer.on_stream_down(key, "cut", now_s + 2.0)
    assert len(said(peer.tick(now_s + 2.0), wire.OpenStream)) == 1


def test_a_connection_that_ends_as_soon_as_it_stands_is_made_again_with_patience() -> None:
    """What ends it at once will do so again: hundreds of connections a second came to nothing."""
    peer = stream_in("asking")
    asked = 0
    for hundredth in range(1000):
        now_s = hundredth / 100
        if hundredth % 100 == 0:
            peer.on_message(pong(), now_s)
        asked += len(said(peer.tick(now_s), wire.OpenStream))
        key = current(peer)
        peer.on_message(ticket(0, key.connection), now_s)
        if stream_of(peer) == "connecting":
            peer.on_stream_up(key, now_s)
            peer.on_stream_down(key, "ended", now_s)
    assert 4 <= asked <= 10


def test_shutting_ends_when_every_connection_has() -> None:
    peer = stream_in("up", streams=2)
    peer.on_message(ticket(1), 0.0)
    keys = [StreamKey(SOURCE, 0, 0), StreamKey(SOURCE, 1, 0)]
    assert peer.shut() == [Disconnect(key) for key in keys]
    for key in keys:
        assert not peer.closed
        peer.on_stream_down(key, "closed", 0.1)
    assert peer.closed


# --- whole lives ---


@pytest.mark.parametrize("seed", range(100))
def test_a_random_life_keeps_its_books(seed: int) -> None:
    dice = random.Random(seed)
    peer = link_in(dice.choice(["connecting", "up", "lost"]))
    for _ in range(40):
        connection = current(peer).connection
        effects = CALLS[dice.choice(sorted(CALLS))](peer)
        assert current(peer).connection >= connection, "a connection's number never comes back"
        assert all(key == current(peer) for key in peer.streams_open)
        assert all(one.key == current(peer) for one in of(effects, Connect))
        assert peer.state != "up" or peer.boot_id in (BOOT, REBORN)
