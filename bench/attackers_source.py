"""Attacks of a source: workers of the daemon pull from addresses where the attacker listens."""

import itertools
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from bench.attackers_peer import BLOCK, BLOCKS_MAX, framed, sliced_layout
from bench.attackers_worker import LARGE_AUX, Hog
from bench.doors import MIB, Attack, Target
from bench.zmtp import MORE, frame, read_frame, shake_hands
from kvferry_proto import peer, worker
from kvferry_proto.layout import Layout
from kvferry_proto.states import State

OURS = "ab" * 16  # boot id
SOURCES = 16  # one that was thrown out stays away for 10 s; the others go on
TURN_S = 1.0  # to be connected to
OF_ONE = 400  # transfers from one connection
NEW = 8  # layouts that one source may have at once


class Pulled:
    """A connection of the daemon that pulls, which takes us for a source's daemon."""

    def __init__(self, one: socket.socket) -> None:
        """Shake hands and hear its hello; OSError."""
        shake_hands(one, b"ROUTER")
        said = peer.MESSAGES.decode(read_frame(one))
        assert isinstance(said, peer.PeerHello), said
        self._sink = said.boot_id
        welcome = peer.PeerWelcome(version=1, boot_id=OURS, sink_boot_id=self._sink)
        one.sendall(framed(welcome))

    def pong(self) -> bytes:
        """What answers a ping."""
        return framed(peer.Pong(news=0, source_boot_id=OURS, sink_boot_id=self._sink))

    def news(self, progress: peer.Progress) -> bytes:
        """News of one transfer."""
        return framed(
            peer.Progresses(
                before=0, progresses=[progress], source_boot_id=OURS, sink_boot_id=self._sink
            )
        )


def receive(hog: Hog, name: str, address: str, ranks: int = 1) -> None:
    """Have the daemon pull from us."""
    hog.call(worker.Receive(transfer_id=name, source=address, window_tokens=1, world_size=ranks))


def pulling(hog: Hog, ranks: int = 1) -> Iterator[tuple[socket.socket, str, str]]:
    """Connections that the daemon makes, each with its address and a transfer of it; for ever."""
    with ExitStack() as stack:
        there = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(SOURCES)
        ]
        for number, listening in enumerate(itertools.cycle(there)):
            listening.settimeout(TURN_S)
            name = f"from-{number}"
            address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
            receive(hog, name, address, ranks)
            try:
                one, _ = listening.accept()
            except TimeoutError:
                continue
            with one:
                one.settimeout(TURN_S)
                yield one, address, name


def endless_from_source(target: Target) -> None:
    """A message of a source that has no end."""
    endless = frame(os.urandom(MIB), MORE)
    for one, _, _ in pulling(Hog(target)):
        with suppress(OSError):
            shake_hands(one, b"ROUTER")
            while True:
                one.sendall(endless)


def messages_from_source(target: Target) -> None:
    """Pongs and news of a source, without a pause."""
    for one, _, name in pulling(Hog(target)):
        with suppress(OSError):
            source = Pulled(one)
            progress = peer.Progress(
                transfer_id=name, attempt=0, number=1, state=State.BOOTSTRAPPING
            )
            some = source.pong() * 500 + source.news(progress) * 100
            while True:
                one.sendall(some)


def aux_from_source(target: Target) -> None:
    """Large aux values of a source, of one transfer after the other."""
    hog = Hog(target)
    for one, address, first in pulling(hog):
        with suppress(OSError):
            source = Pulled(one)
            for number in range(OF_ONE):
                name = f"{first}-{number}"
                receive(hog, name, address)
                progress = peer.Progress(
                    transfer_id=name,
                    attempt=0,
                    number=1,
                    state=State.TRANSFERRING,
                    total_tokens=1,
                    aux=LARGE_AUX,
                )
                one.sendall(source.news(progress))


def layouts_from_source(target: Target) -> None:
    """Layouts that nobody has seen, of many sources at once."""
    hog = Hog(target, sliced_layout(32, BLOCK))
    blocks = itertools.cycle(range(1, BLOCKS_MAX))
    with ExitStack() as stack:
        for one, _, name in pulling(hog, ranks=32):
            with suppress(OSError):
                source = Pulled(one)
                news = [
                    source.news(a_progress_with(name, sliced_layout(64, BLOCK * next(blocks))))
                    for _ in range(NEW + 2)
                ]
                args = (stack.enter_context(one.dup()), news)
                threading.Thread(target=say, args=args, daemon=True).start()


def say(one: socket.socket, parts: list[bytes]) -> None:
    """All of it, as long as it is heard."""
    with suppress(OSError):
        for part in parts:
            one.sendall(part)


def a_progress_with(name: str, layout: Layout) -> peer.Progress:
    """That the source has another layout, on 64 ranks."""
    return peer.Progress(
        transfer_id=name,
        attempt=0,
        number=1,
        state=State.BOOTSTRAPPING,
        layout=layout,
        world_size=64,
    )


ATTACKS: tuple[Attack, ...] = (
    endless_from_source,
    messages_from_source,
    aux_from_source,
    layouts_from_source,
)
