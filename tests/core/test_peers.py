"""Peer: hello, heartbeats, silence, restarts and probes.

test_peers_table.py has every message and call in every state, test_peers_streams.py the streams.
"""

from typing import TypeVar

import pytest

from core.test_peers_table import (
    BOOT,
    HELLO,
    PROGRESS,
    REBORN,
    current,
    fresh_peer,
    link_in,
    linked,
    pong,
    refused,
    stream_in,
    stream_of,
    ticket,
    welcome,
)
from core.test_sink_table import SINK, SOURCE, TIMING
from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.core.peer_effects import (
    Disconnect,
    NewsAreLost,
    PeerEffect,
    PeerFailed,
    PeerIsDown,
    PeerIsUp,
    Probe,
    Say,
)
from kvferry_daemon.core.peers import Peer
from kvferry_proto import peer as wire
from kvferry_proto.errors import Code

T = TypeVar("T")


def of(effects: list[PeerEffect], kind: type[T]) -> list[T]:
    """Only the effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


def said(effects: list[PeerEffect], kind: type[T]) -> list[T]:
    """Only the messages of one kind."""
    return [e.message for e in effects if isinstance(e, Say) and isinstance(e.message, kind)]


def ticks(peer: Peer, count: int) -> list[tuple[float, list[PeerEffect]]]:
    """What the next ticks do, each at the moment that the peer asks for."""
    done = []
    for _ in range(count):
        at_s = peer.wake_at_s
        done.append((round(at_s, 3), peer.tick(at_s)))
    return done


# --- news ---


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_news_that_were_cut_in_two_for_their_size_are_not_lost_by_half(lost: int | None) -> None:
    large = PROGRESS.model_copy(update={"aux": dict.fromkeys("abcd", bytes(1 << 16))})
    frames = wire.frames_of(linked(wire.Progresses, before=0, progresses=[large] * 5))
    assert len(frames) == 2
    came = [frame for number, frame in enumerate(frames) if number != lost]
    peer = link_in("up")
    effects: list[PeerEffect] = []
    for message in [*map(wire.MESSAGES.decode, came), pong(news=5)]:
        effects += peer.on_message(message, peer.now_s)
    assert effects == ([] if lost is None else [NewsAreLost(peer.address)])


def test_of_news_that_are_lost_in_a_burst_its_sinks_hear_at_once_and_once_more_behind_it() -> None:
    peer = link_in("up")
    told = []
    for number in range(1, 100):
        at_s = number / 1000
        told += [(at_s, one) for one in of(peer.on_message(pong(news=number), at_s), NewsAreLost)]
    assert told == [(0.001, NewsAreLost(SOURCE))]
    assert peer.wake_at_s == 0.001 + TIMING.resend_s
    assert of(peer.tick(peer.wake_at_s), NewsAreLost) == [NewsAreLost(SOURCE)]
    assert peer.wake_at_s == TIMING.heartbeat_s
    assert of(peer.tick(peer.wake_at_s), NewsAreLost) == []


def test_news_that_are_lost_with_the_link_are_asked_for_when_it_is_up_again() -> None:
    peer = link_in("up")
    for number in (1, 2):
        peer.on_message(pong(news=number), 0.1)
    peer.on_message(refused(Code.DAEMON_RESTARTED, REBORN), 0.1)
    effects = peer.on_message(welcome(REBORN), 0.1) + peer.tick(0.9)
    assert len(of(effects, PeerIsUp)) == 1
    assert of(effects, NewsAreLost) == []


# --- hello ---


def test_hello_is_said_at_once_and_again_after_delays_that_double() -> None:
    peer = Peer(SOURCE, HELLO, TIMING, 1, 5.0)
    found = ticks(peer, 7)
    assert [at_s for at_s, _ in found] == [5.0, 5.2, 5.6, 6.4, 8.0, 10.0, 12.0]
    assert all(said(effects, wire.PeerHello) for _, effects in found)


def test_nothing_is_said_before_its_time() -> None:
    peer = fresh_peer()
    assert peer.tick(0.199) == []
    assert len(said(peer.tick(0.2), wire.PeerHello)) == 1


def test_a_welcome_makes_it_up_and_asks_for_every_stream() -> None:
    peer = fresh_peer(streams=3)
    effects = peer.on_message(welcome(), 0.1)
    assert of(effects, PeerIsUp) == [PeerIsUp(SOURCE)]
    asked = said(effects, wire.OpenStream)
    assert [(one.stream, one.connection) for one in asked] == [(0, 0), (1, 0), (2, 0)]
    assert {(one.source_boot_id, one.sink_boot_id) for one in asked} == {(BOOT, SINK)}
    assert (peer.state, peer.boot_id) == ("up", BOOT)


def test_a_version_that_nobody_here_speaks_fails_its_sinks_and_names_both_ranges() -> None:
    peer = fresh_peer()
    [failed] = of(peer.on_message(welcome(version=9), 0.1), PeerFailed)
    assert (failed.code, peer.state) == (Code.NO_COMMON_VERSION, "connecting")
    assert "1 to 1" in failed.message
    assert "9 to 9" in failed.message


def test_refused_versions_fail_its_sinks_with_the_peer_s_words() -> None:
    peer = fresh_peer()
    effects = peer.on_message(refused(Code.NO_COMMON_VERSION), 0.1)
    assert effects == [PeerFailed(SOURCE, Code.NO_COMMON_VERSION, "because")]
    assert peer.detail == "no_common_version: because"
    assert len(said(peer.tick(0.2), wire.PeerHello)) == 1  # it may be upgraded any moment


# --- silence ---


def test_a_ping_goes_out_every_heartbeat() -> None:
    peer = stream_in("up")
    times = []
    for _ in range(5):
        at_s = peer.wake_at_s
        if said(peer.tick(at_s), wire.Ping):
            times.append(at_s)
        peer.on_message(pong(), at_s)
    assert times == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert peer.state == "up"


@pytest.mark.parametrize(
    ("answer", "state"),
    [(pong(), "up"), (linked(wire.DoneNoted, transfer_id="t", attempt=0), "up"),
     (pong(REBORN), "lost"), (welcome(), "up"), (welcome(to="c" * 16), "lost")],
)  # fmt: skip
def test_only_words_from_this_life_to_this_life_are_a_sign_of_it(
    answer: wire.PeerMessage, state: str
) -> None:
    peer = stream_in("up")
    peer.on_message(answer, 2.0)
    peer.tick(4.9)
    assert peer.state == state
    peer.tick(5.0)
    assert peer.state == "lost"


def test_it_is_lost_when_silent_and_not_a_moment_earlier() -> None:
    peer = stream_in("up")
    peer.tick(2.999)
    assert peer.state == "up"
    peer.tick(3.0)
    assert (peer.state, peer.detail) == ("lost", "silent for 3 s")


def test_when_it_is_lost_its_sinks_hear_of_it_and_its_streams_are_closed() -> None:
    peer = stream_in("up", streams=2)
    peer.on_message(ticket(1), 0.0)
    effects = peer.tick(3.0)
    assert of(effects, PeerIsDown) == [PeerIsDown(SOURCE)]
    keys = [one.key for one in of(effects, Disconnect)]
    assert keys == [StreamKey(SOURCE, 0, 0), StreamKey(SOURCE, 1, 0)]
    assert len(said(effects, wire.PeerHello)) == 1


def test_it_says_hello_again_from_the_shortest_delay_on() -> None:
    peer = link_in("lost")
    times = [3.0]
    for at_s in (3.1, 3.2, 3.4, 3.6, 4.0, 4.4):
        times += [at_s] * len(said(peer.tick(at_s), wire.PeerHello))
    assert times == [3.0, 3.2, 3.6, 4.4]


def test_a_lost_link_sleeps_between_its_hellos() -> None:
    peer = link_in("lost")
    peer.tick(20.0)
    assert peer.wake_at_s > 20.0


def test_the_same_life_may_come_back() -> None:
    peer = link_in("lost")
    peer.on_stream_down(current(peer), "closed", 3.1)
    effects = peer.on_message(welcome(), 4.0)
    assert of(effects, PeerIsUp) == [PeerIsUp(SOURCE)]
    [asked] = said(effects, wire.OpenStream)
    assert (asked.stream, asked.connection, peer.state) == (0, 1, "up")


# --- restart ---


@pytest.mark.parametrize(
    ("sign", "state"),
    [
        pytest.param(welcome(REBORN), "up", id="welcome"),
        pytest.param(refused(Code.DAEMON_RESTARTED, REBORN), "lost", id="refused"),
    ],
)
def test_another_boot_id_is_another_life(sign: wire.PeerMessage, state: str) -> None:
    peer = stream_in("up")
    peer.on_message(sign, 0.5)
    assert (peer.state, stream_of(peer)) == (state, "closing")
    assert not peer.is_current(pong())
    peer.on_message(welcome(REBORN), 0.6)
    assert peer.is_current(pong(REBORN))


@pytest.mark.parametrize("sign", [welcome(REBORN), refused(Code.DAEMON_RESTARTED, REBORN)])
def test_a_restart_takes_everybody_down_first(sign: wire.PeerMessage) -> None:
    peer = stream_in("up")
    effects = peer.on_message(sign, 0.5)
    assert effects[:2] == [PeerIsDown(SOURCE, restarted=True), Disconnect(StreamKey(SOURCE, 0, 0))]


def lives(peer: Peer, until_s: float, *, of_s: float) -> list[float]:
    """When its sinks heard of another life of it, which says so as often."""
    heard, at_s, boot_id = [], 0.0, BOOT
    while at_s < until_s:
        at_s += of_s
        boot_id = REBORN if boot_id == BOOT else BOOT
        for message in (refused(Code.DAEMON_RESTARTED, boot_id), welcome(boot_id)):
            heard += [at_s] * len(of(peer.on_message(message, at_s), PeerIsDown))
    return heard


def test_who_restarts_again_and_again_is_believed_ever_later() -> None:
    heard = lives(stream_in("up"), 60.0, of_s=0.001)
    assert heard[0] == 0.001
    assert len(heard) <= 60.0 / TIMING.lost_s + 10


def test_who_restarts_twice_in_a_second_is_believed_at_once() -> None:
    assert lives(stream_in("up"), 1.0, of_s=0.5) == [0.5, 1.0]


def test_who_fails_its_sinks_a_thousand_times_a_second_does_so_five_times() -> None:
    peer = link_in("up")
    failed = [
        one
        for number in range(1000)
        for one in of(peer.on_message(refused(Code.NOT_TRUSTED), number / 1000), PeerFailed)
    ]
    assert len(failed) == 1 / TIMING.resend_s


def test_streams_of_the_earlier_life_end_before_they_are_asked_for_again() -> None:
    peer = stream_in("up")
    assert said(peer.on_message(welcome(REBORN), 0.5), wire.OpenStream) == []
    peer.on_stream_down(StreamKey(SOURCE, 0, 0), "closed", 0.6)
    [asked] = said(peer.tick(0.6), wire.OpenStream)
    assert (asked.connection, asked.source_boot_id) == (1, REBORN)


# --- nobody answers ---


def test_when_nobody_answers_somebody_looks_why() -> None:
    peer = fresh_peer()
    probes = [at_s for at_s, effects in ticks(peer, 25) if of(effects, Probe)]
    assert probes == [15.0, 30.0]
    effects = peer.on_probed("connection refused")
    assert effects == [
        PeerFailed(
            SOURCE,
            Code.PEER_UNREACHABLE,
            f"no kvferry daemon answers at {SOURCE}: connection refused",
        )
    ]


@pytest.mark.parametrize("state", ["up", "lost"])
def test_a_probe_that_comes_late_fails_nobody(state: str) -> None:
    assert link_in(state).on_probed("connection refused") == []
