"""What the threads of a stream tell the loop.

``key`` is whatever names one connection. StreamDown is the last event of a stream, posted once,
when its thread touches no memory any more: it is the proof of drain.
"""

import socket
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Received:
    """A claimed extent is in place and verified."""

    key: Hashable
    handle: int
    first_token: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A claimed extent came with wrong bytes; StreamDown follows."""

    key: Hashable
    handle: int
    first_token: int
    why: str


@dataclass(frozen=True, slots=True)
class Drained:
    """Bytes that nobody had claimed were read aside."""

    key: Hashable
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Sent:
    """An extent has been read out of the pool for the last time."""

    key: Hashable
    owner: Hashable
    first_token: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """A sink's daemon has connected with a good ticket."""

    key: Hashable
    sock: socket.socket


@dataclass(frozen=True, slots=True)
class StreamDown:
    """The connection is over."""

    key: Hashable
    reason: str


StreamEvent = Received | Rejected | Drained | Sent | StreamOpened | StreamDown
Post = Callable[[StreamEvent], None]
Enter = Callable[[], None]  # what a thread that moves bytes does before all else


def stay() -> None:
    """The thread runs where the kernel likes."""
