"""Attacks at the peer socket, of a daemon that is let in there: in clear, on loopback."""

import itertools
import os
from collections.abc import Iterator
from functools import partial
from itertools import cycle, repeat
from typing import Any

from bench.attackers_worker import LARGE, LARGE_AUX, Hog, a_send
from bench.doors import MIB, Attack, Target, pour, together
from bench.zmtp import MORE, frame
from kvferry_daemon.operator import ask as ask_operator
from kvferry_proto import control, peer, worker
from kvferry_proto.layout import PLANES_MAX, Dtype, Layout, Plane
from kvferry_proto.states import State

LONG_MIB = 64
DAEMONS = 16
SLICED = 480  # transfers; each is pulled with a layout of its own
BLOCK = 64  # tokens of a sliced transfer's block
BLOCKS_MAX = 1024  # so many times as large a block may be


class Link:
    """A daemon that we play, and what it may say to the other one."""

    def __init__(self, target: Target, number: int = 0) -> None:
        """``number``: which of several."""
        status = ask_operator(target.directory, control.GetStatus())
        assert isinstance(status, control.Status)
        self.said = hello_of(number)
        self.boots: Any = {"source_boot_id": status.boot_id, "sink_boot_id": self.said.boot_id}
        self.hello = framed(self.said)

    def wish(self, number: int) -> peer.OpenStream:
        """A ticket for one more connection; all streams take their turn."""
        stream = number % peer.STREAMS_MAX
        return peer.OpenStream(stream=stream, connection=number, **self.boots)

    def pulls(self, pulls: list[peer.Pull]) -> bytes:
        """All of them in one message."""
        return framed(peer.Pulls(pulls=pulls, **self.boots))


def hello_of(number: int) -> peer.PeerHello:
    """What a daemon says first; in clear it is who it says that it is."""
    name = f"{number:032x}"
    return peer.PeerHello(boot_id=name, daemon_id=name, life=1)


def framed(message: peer.PeerMessage) -> bytes:
    """A message as it is on the wire."""
    return frame(peer.MESSAGES.encode(message), 0)


def a_pull(name: str, number: int = 1, **more: Any) -> peer.Pull:
    """A pull of a transfer, of which nothing is wanted yet."""
    given: dict[str, Any] = {"layout_digest": LARGE.digest, "attempt": 0, "handle": 0}
    return peer.Pull(
        transfer_id=name, number=number, start_tokens=0, acked_tokens=0, **given | more
    )


def endless_to_peer(target: Target) -> None:
    """One message that has no end, from the network, in clear."""
    pour(target.peer, repeat(frame(os.urandom(MIB), MORE)))


def frame_too_long(target: Target) -> None:
    """Frames of 64 MiB: what such a frame says of its length is enough to be cut."""
    pour(target.peer, repeat(frame(bytes(LONG_MIB * MIB), 0)), again_s=0)


def peer_messages(target: Target) -> None:
    """Pings and pulls without a pause; the pulls are of transfers that there are."""
    link = Link(target)
    pings = framed(peer.Ping(**link.boots)) * 500
    pull = link.pulls([a_pull(f"bystander-{number}") for number in range(16)]) * 50
    pour(target.peer, cycle((pings, pull)), link.hello, reads=True)


def full_pulls(target: Target) -> None:
    """As many pulls as a message may have, of transfers that nobody has opened yet."""
    link = Link(target)

    def parts() -> Iterator[bytes]:
        for first in itertools.count(0, peer.PULLS_MAX):
            names = range(first, first + peer.PULLS_MAX)
            yield link.pulls([a_pull(f"unmet-{number}") for number in names])

    pour(target.peer, parts(), link.hello, reads=True)


def wants(target: Target) -> None:
    """As much as a message may want, on connections that nobody has opened."""
    link = Link(target)
    want = [
        peer.Want(first_token=0, tokens=1, stream=0, connection=number)
        for number in range(peer.WANTS_MAX)
    ]
    pulls = link.pulls([a_pull("bystander-0", number, want=want) for number in range(8)])
    pour(target.peer, repeat(pulls), link.hello, reads=True)


def unread_by_peer(target: Target) -> None:
    """Pulls of daemons that never read an answer, each of which nearly fills a frame."""
    hog = Hog(target)
    names = ("unread-0", "unread-1", "unread-2")
    for name in names:
        hog.call(a_send(name, LARGE_AUX))
    pulls = [a_pull(name) for name in names]
    there = [Link(target, number) for number in range(DAEMONS)]
    together(partial(pour, target.peer, repeat(one.pulls(pulls) * 100), one.hello) for one in there)


def huge_answers_to_peer(target: Target) -> None:
    """Messages that pull one large transfer as often as a message may."""
    link, hog = Link(target), Hog(target)
    hog.call(a_send("huge", LARGE_AUX))
    pulls = [a_pull("huge", number) for number in range(peer.PULLS_MAX)]
    pour(target.peer, repeat(link.pulls(pulls)), link.hello, reads=True)


def dones(target: Target) -> None:
    """That transfers are over which nobody has opened."""
    link = Link(target)

    def parts() -> Iterator[bytes]:
        for number in itertools.count():
            name = f"over-{number}"
            yield framed(peer.Done(transfer_id=name, attempt=0, state=State.FAILED, **link.boots))

    pour(target.peer, parts(), link.hello, reads=True)


def links(target: Target) -> None:
    """Hellos of one daemon after the other."""
    hellos = (framed(hello_of(number)) for number in itertools.count())
    pour(target.peer, hellos, reads=True)


def sliced_layout(ranks: int, block: int) -> Layout:
    """What each of so many ranks has of a thousand planes of 64 heads."""
    planes = tuple(
        Plane(name=f"p{number}", dtype=Dtype.UINT8, shape=(64 // ranks,), heads_total=64)
        for number in range(PLANES_MAX)
    )
    return Layout(planes=planes, block_size_tokens=block)


def sliced_pulls(link: Link, first: int) -> Iterator[bytes]:
    """Each of another transfer, with a layout that nobody has seen."""
    for number in itertools.count(first):
        ours = sliced_layout(32, BLOCK * (number % BLOCKS_MAX + 1))
        name = f"sliced-{number % SLICED}"
        more = {"layout": ours, "layout_digest": ours.digest, "world_size": 32}
        yield link.pulls([a_pull(name, number, **more)])


def layouts(target: Target) -> None:
    """Pulls with layouts that nobody has seen: to work out what goes where takes a while."""
    hog = Hog(target, sliced_layout(64, BLOCK))
    for number in range(SLICED):
        send = worker.Send(transfer_id=f"sliced-{number}", world_size=64, window_tokens=1)
        hog.call(send)
    there = [Link(target, number) for number in range(DAEMONS)]  # each may have some
    together(
        partial(
            pour,
            target.peer,
            sliced_pulls(one, number * SLICED // DAEMONS),
            one.hello,
            reads=True,
        )
        for number, one in enumerate(there)
    )


ATTACKS: tuple[Attack, ...] = (
    endless_to_peer,
    frame_too_long,
    peer_messages,
    full_pulls,
    wants,
    unread_by_peer,
    huge_answers_to_peer,
    dones,
    links,
    layouts,
)
