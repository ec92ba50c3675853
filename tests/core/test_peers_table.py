"""Peer: every message and call in every state of the link, and in every state of a stream."""

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest

from core.test_sink_table import SINK, SOURCE, TIMING, frozen
from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.core.peer_effects import PeerEffect, Say
from kvferry_daemon.core.peers import Peer, _Stream
from kvferry_proto import peer as wire
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.states import State

BOOT, REBORN = "a" * 16, "e" * 16
SECRET = b"s" * 32
HELLO = wire.PeerHello(boot_id=SINK, daemon_id=SINK, life=1)

# `stays`: something changed, but neither the link's state nor the stream's. `absorbed`: nothing
# did. The link's table has one stream, which is asked for while the link is up, and closing when
# it was lost. A message that is said stands by its own name.
LINK = """
tick                        | connecting up lost | absorbed
tick, 1 s on                | connecting lost    | stays PeerHello
tick, 1 s on                | up                 | stays Ping
tick, 3 s on                | connecting lost    | stays PeerHello
tick, 3 s on                | up                 | link lost PeerIsDown PeerHello
tick, 15 s on               | connecting         | stays PeerHello Probe
tick, 15 s on               | up                 | link lost PeerIsDown PeerHello
tick, 15 s on               | lost               | stays PeerHello
shut                        | connecting up lost | absorbed
on_probed                   | connecting         | stays PeerFailed
on_probed                   | up lost            | absorbed
on_stream_up                | connecting up lost | stays Disconnect
on_stream_up, stale         | connecting up lost | stays Disconnect
on_stream_down              | connecting up      | absorbed
on_stream_down              | lost               | stream closed
on_stream_down, stale       | connecting up lost | absorbed
PeerWelcome                 | connecting         | link up stream asking PeerIsUp OpenStream
PeerWelcome                 | up                 | stays NewsAreLost
PeerWelcome                 | lost               | link up PeerIsUp
PeerWelcome of another life | connecting         | link up stream asking PeerIsUp OpenStream
PeerWelcome of another life | up                 | stays PeerIsDown PeerIsUp
PeerWelcome of another life | lost               | link up PeerIsUp
PeerWelcome to another      | connecting up lost | absorbed
PeerWelcome of version 9    | connecting up lost | stays PeerFailed
PeerRefused                 | connecting up lost | stays
PeerRefused, no version     | connecting up lost | stays PeerFailed
PeerRefused by another life | connecting lost    | stays
PeerRefused by another life | up                 | link lost PeerIsDown
PeerRefused, hello first    | connecting lost    | stays
PeerRefused, hello first    | up                 | stays PeerHello
Pong                        | connecting lost    | absorbed
Pong                        | up                 | stays
Pong of another life        | connecting up lost | absorbed
Pong after news that were lost | connecting lost | absorbed
Pong after news that were lost | up          | stays NewsAreLost
Progresses                  | connecting lost    | absorbed
Progresses                  | up                 | stays
Progresses, not the next    | connecting lost    | absorbed
Progresses, not the next    | up                 | stays NewsAreLost
DoneNoted                   | connecting lost    | absorbed
DoneNoted                   | up                 | stays
Ticket                      | connecting lost    | absorbed
Ticket                      | up                 | stream connecting Connect
Ticket, stale               | connecting lost    | absorbed
Ticket, stale               | up                 | stays
Ticket of no stream         | connecting lost    | absorbed
Ticket of no stream         | up                 | stays
Ticket of another life      | connecting up lost | absorbed
Ticket to another           | connecting up lost | absorbed
PeerHello                   | connecting up lost | absorbed
Ping                        | connecting lost    | absorbed
Ping                        | up                 | stays
OpenStream                  | connecting lost    | absorbed
OpenStream                  | up                 | stays
Pulls                       | connecting lost    | absorbed
Pulls                       | up                 | stays
Done                        | connecting lost    | absorbed
Done                        | up                 | stays
"""

# The link is up.
STREAM = """
tick                        | closed                              | stream asking OpenStream
tick                        | asking connecting up closing        | absorbed
tick, 1 s on                | closed                              | stream asking Ping OpenStream
tick, 1 s on                | asking connecting up closing        | stays Ping
tick, 3 s on                | closed asking closing               | link lost PeerIsDown PeerHello
tick, 3 s on                | connecting up                       | link lost stream closing PeerIsDown Disconnect PeerHello
shut                        | closed asking closing               | absorbed
shut                        | connecting up                       | stream closing Disconnect
on_stream_up                | closed asking up closing            | stays Disconnect
on_stream_up                | connecting                          | stream up
on_stream_up, stale         | closed asking connecting up closing | stays Disconnect
on_stream_down              | closed asking                       | absorbed
on_stream_down              | connecting up closing               | stream closed
on_stream_down, stale       | closed asking connecting up closing | absorbed
Ticket                      | closed connecting up closing        | stays
Ticket                      | asking                              | stream connecting Connect
Ticket, stale               | closed asking connecting up closing | stays
Ticket of no stream         | closed asking connecting up closing | stays
Ticket of another life      | closed asking connecting up closing | absorbed
Ticket to another           | closed asking connecting up closing | absorbed
"""


# --- messages ---


def welcome(boot_id: str = BOOT, version: int = 1, to: str = SINK) -> wire.PeerWelcome:
    return wire.PeerWelcome(version=version, boot_id=boot_id, sink_boot_id=to)


def refused(code: Code, boot_id: str = BOOT) -> wire.PeerRefused:
    return wire.PeerRefused(boot_id=boot_id, error=ErrorInfo.of(code, "because"))


def ticket(
    stream: int = 0,
    connection: int = 0,
    boot_id: str = BOOT,
    to: str = SINK,
    certificate_sha256: bytes | None = None,
) -> wire.Ticket:
    return wire.Ticket(
        stream=stream,
        connection=connection,
        port=7,
        ticket=SECRET,
        certificate_sha256=certificate_sha256,
        source_boot_id=boot_id,
        sink_boot_id=to,
    )


def linked(kind: Any, boot_id: str = BOOT, **more: Any) -> Any:
    """A message of a link that is up."""
    return kind(source_boot_id=boot_id, sink_boot_id=SINK, **more)


def pong(boot_id: str = BOOT, news: int = 0) -> wire.Pong:
    return wire.Pong(news=news, source_boot_id=boot_id, sink_boot_id=SINK)


T: dict[str, Any] = {"transfer_id": "t", "attempt": 0}
PROGRESS = wire.Progress(**T, number=1, state=State.TRANSFERRING)
PULL = wire.Pull(**T, number=1, handle=1, layout_digest=b"x" * 16, start_tokens=0, acked_tokens=0)


# --- the peer's states ---


def fresh_peer(streams: int = 1) -> Peer:
    """Nobody has answered yet."""
    peer = Peer(SOURCE, HELLO, TIMING, streams, 0.0)
    peer.tick(0.0)
    return peer


def stream_in(state: str, streams: int = 1) -> Peer:
    """A link that is up since 0 s, with stream 0 in a state; `closed` has ended once before."""
    peer = fresh_peer(streams)
    peer.on_message(welcome(), 0.0)
    if state != "asking":
        peer.on_message(ticket(), 0.0)
    if state == "closed":
        peer.on_stream_down(current(peer), "refused", 0.0)
    if state in ("up", "closing"):
        peer.on_stream_up(current(peer), 0.0)
    if state == "closing":
        peer.shut()
    assert stream_of(peer) == state
    return peer


def link_in(state: str) -> Peer:
    """A lost one had its stream open."""
    if state == "connecting":
        return fresh_peer()
    peer = stream_in("up" if state == "lost" else "asking")
    if state == "lost":
        peer.tick(3.0)
    assert peer.state == state
    return peer


def current(peer: Peer, stream: int = 0) -> StreamKey:
    """The newest connection of a stream."""
    return StreamKey(SOURCE, stream, peer._streams[stream].connection)


def stream_of(peer: Peer, stream: int = 0) -> str:
    return peer._streams[stream].state


# --- the tables ---

Call = Callable[[Peer], list[PeerEffect]]


def says(message: wire.PeerMessage) -> Call:
    return lambda peer: peer.on_message(message, peer.now_s + 0.1)


def stale(peer: Peer) -> StreamKey:
    return StreamKey(SOURCE, 0, 99)


CALLS: dict[str, Call] = {
    "tick": lambda peer: peer.tick(peer.now_s + 0.1),
    "tick, 1 s on": lambda peer: peer.tick(peer.now_s + 1),
    "tick, 3 s on": lambda peer: peer.tick(peer.now_s + 3),
    "tick, 15 s on": lambda peer: peer.tick(peer.now_s + 15),
    "shut": lambda peer: peer.shut(),
    "on_probed": lambda peer: peer.on_probed("nobody listens there"),
    "on_stream_up": lambda peer: peer.on_stream_up(current(peer), peer.now_s),
    "on_stream_up, stale": lambda peer: peer.on_stream_up(stale(peer), peer.now_s),
    "on_stream_down": lambda peer: peer.on_stream_down(current(peer), "cut", peer.now_s),
    "on_stream_down, stale": lambda peer: peer.on_stream_down(stale(peer), "cut", peer.now_s),
    "PeerWelcome": says(welcome()),
    "PeerWelcome of another life": says(welcome(REBORN)),
    "PeerWelcome to another": says(welcome(to="c" * 16)),
    "PeerWelcome of version 9": says(welcome(version=9)),
    "PeerRefused": says(refused(Code.PEER_PROTOCOL)),
    "PeerRefused, no version": says(refused(Code.NO_COMMON_VERSION)),
    "PeerRefused, hello first": says(refused(Code.HELLO_FIRST)),
    "PeerRefused by another life": says(refused(Code.DAEMON_RESTARTED, REBORN)),
    "Pong": says(pong()),
    "Pong of another life": says(pong(REBORN)),
    "Pong after news that were lost": says(pong(news=1)),
    "Progresses": says(linked(wire.Progresses, before=0, progresses=[PROGRESS])),
    "Progresses, not the next": says(linked(wire.Progresses, before=1, progresses=[PROGRESS])),
    "DoneNoted": says(linked(wire.DoneNoted, **T)),
    "Ticket": lambda peer: peer.on_message(ticket(0, current(peer).connection), peer.now_s + 0.1),
    "Ticket, stale": says(ticket(0, 99)),
    "Ticket of no stream": says(ticket(9, 0)),
    "Ticket of another life": says(ticket(boot_id=REBORN)),
    "Ticket to another": says(ticket(to="c" * 16)),
    "PeerHello": says(wire.PeerHello(boot_id=BOOT, daemon_id=BOOT, life=1)),
    "Ping": says(linked(wire.Ping)),
    "OpenStream": says(linked(wire.OpenStream, stream=0, connection=0)),
    "Pulls": says(linked(wire.Pulls, pulls=[PULL])),
    "Done": says(linked(wire.Done, **T, state=State.SUCCESS)),
}


def outcome(peer: Peer, call: Call) -> str:
    """What one message or call does, in the words of the tables."""
    before, link, stream = _held(peer), peer.state, stream_of(peer)
    effects = call(peer)
    if not effects and _held(peer) == before:
        return "absorbed"
    states = [f"link {peer.state}"] if peer.state != link else []
    states += [f"stream {stream_of(peer)}"] if stream_of(peer) != stream else []
    said = [_name(effect.message if isinstance(effect, Say) else effect) for effect in effects]
    return " ".join([*(states or ["stays"]), *said])


def _held(peer: Peer) -> object:
    held = frozen(peer)
    assert isinstance(held, dict)
    return {name: value for name, value in held.items() if name != "now_s"}


def _name(thing: object) -> str:
    return type(thing).__name__


def rows(table: str) -> list[tuple[str, str, str]]:
    """(label, state, outcome) for every state that a line names."""
    found = []
    for line in table.strip().splitlines():
        label, states, what = (part.strip() for part in line.split("|"))
        found += [(label, state, what) for state in states.split()]
    return found


@pytest.mark.parametrize(("label", "state", "expected"), rows(LINK))
def test_a_message_or_call_in_a_state_of_the_link(label: str, state: str, expected: str) -> None:
    assert outcome(link_in(state), CALLS[label]) == expected


@pytest.mark.parametrize(("label", "state", "expected"), rows(STREAM))
def test_a_message_or_call_in_a_state_of_a_stream(label: str, state: str, expected: str) -> None:
    assert outcome(stream_in(state), CALLS[label]) == expected


def pairs_of(table: str) -> set[tuple[str, str]]:
    return {(label.split()[0].rstrip(","), state) for label, state, *_ in rows(table)}


def test_every_message_and_call_in_every_state_has_a_row() -> None:
    messages = {kind.__name__ for kind in get_args(wire.PeerMessage)}
    calls = {name for name in vars(Peer) if name.startswith("on_") or name in ("tick", "shut")}
    states = get_args(get_type_hints(Peer)["state"])
    wanted = {(name, s) for name in messages | calls - {"on_message"} for s in states}
    assert pairs_of(LINK) == wanted
    on_streams = {"tick", "shut", "Ticket"} | {name for name in calls if "stream" in name}
    states = get_args(get_type_hints(_Stream)["state"])
    assert pairs_of(STREAM) == {(name, s) for name in on_streams for s in states}
    for table in (LINK, STREAM):
        labels = [row[:2] for row in rows(table)]
        assert len(set(labels)) == len(labels), "two rows for one case"
