"""What the shell is told of transfers, for its log and for traces. Nothing depends on it."""

from dataclasses import dataclass

from kvferry_daemon.core.events import Key
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.states import State


@dataclass(frozen=True, slots=True)
class TransferOpened:
    """A transfer began, or ``again``: this life of the daemon goes on with it."""

    key: Key
    at_s: float
    worker: str
    source: str | None  # the daemon that is pulled from, if it is another one
    start_tokens: int
    traceparent: str | None
    again: bool = False


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """It is over, well or not."""

    key: Key
    at_s: float
    took_s: float
    state: State
    error: ErrorInfo | None
    sent_tokens: int
    total_tokens: int | None


@dataclass(frozen=True, slots=True)
class TraceJoined:
    """A sink's daemon has named the trace of a source whose own worker named none."""

    key: Key
    traceparent: str


@dataclass(frozen=True, slots=True)
class WindowMoved:
    """A window that began at ``base_tokens`` has moved on, or its transfer has ended."""

    key: Key
    began_s: float
    ended_s: float
    base_tokens: int
    edge_tokens: int  # how far it reached
    sent_tokens: int


@dataclass(frozen=True, slots=True)
class ChunksMoved:
    """Chunks that were asked for at once are in place, have left, or will never come."""

    key: Key
    began_s: float
    ended_s: float
    first_token: int
    tokens: int  # of all chunks, each part's counted
    chunks: int
    missed: int  # of them those that came to nothing


Told = TransferOpened | TransferEnded | TraceJoined | WindowMoved | ChunksMoved
EVERY = (TransferOpened, TransferEnded, TraceJoined, WindowMoved, ChunksMoved)
