"""What happens to a transfer, and what it wants done. The next event is the only way back."""

from dataclasses import dataclass
from typing import NamedTuple

from kvferry_daemon.core.pool import Lease
from kvferry_daemon.core.shape import Shape
from kvferry_daemon.core.window import Place
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.peer import Progress, Pull, Want
from kvferry_proto.states import Role, State

HERE = -1  # a stream's number that no message can name


class Key(NamedTuple):
    """Names one side of one attempt of a transfer."""

    role: Role
    transfer_id: str
    attempt: int


class StreamKey(NamedTuple):
    """One connection of one data stream: a new number for every connect.

    ``peer`` is the source's address on the side that connects, the sink's boot id on the other.
    """

    peer: str
    stream: int
    connection: int

    @classmethod
    def here(cls, boot_id: str) -> "StreamKey":
        """What copies within this daemon go over; it is up as long as the daemon is."""
        return cls(boot_id, HERE, 0)

    @property
    def is_here(self) -> bool:
        """Whether source and sink are both in this daemon."""
        return self.stream == HERE


@dataclass(frozen=True, slots=True)
class Timing:
    """Every delay and deadline of the protocol, in seconds."""

    resend_s: float = 0.2
    resend_max_s: float = 2.0
    stall_s: float = 60.0
    connect_s: float = 15.0
    lease_s: float = 30.0
    hold_s: float = 60.0
    drain_s: float = 2.0  # then streams are closed, which proves what waiting cannot
    heartbeat_s: float = 1.0
    lost_s: float = 3.0
    tombstone_s: float = 600.0


# --- events of both sides -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has come to ``now_s`` (monotonic).

    ``sink_heard_s`` (source only): when the daemon of its sink said anything.
    """

    now_s: float
    sink_heard_s: float = -float("inf")


@dataclass(frozen=True, slots=True)
class Slept:
    """The daemon itself stood still: for so long nobody could be heard."""

    for_s: float


@dataclass(frozen=True, slots=True)
class Granted:
    """Blocks for the window's edge, zeroed if another owner had them: those were promised."""

    leases: tuple[Lease, ...]
    promised: bool = False


@dataclass(frozen=True, slots=True)
class Promised:
    """So many blocks will be granted once what another owner left in them is wiped."""

    blocks: int


@dataclass(frozen=True, slots=True)
class Joined:
    """The worker of one more rank has come."""

    rank: int
    session: str


@dataclass(frozen=True, slots=True)
class Release:
    """The worker touches no block of this transfer any more."""

    rank: int = 0


@dataclass(frozen=True, slots=True)
class Fail:
    """Somebody gave the transfer up, or something that it needs is gone."""

    code: Code
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker went silent; ``dead`` is proof that it touches no block any more."""

    dead: bool
    message: str
    rank: int = 0


@dataclass(frozen=True, slots=True)
class StreamDown:
    """A data connection has ended and none of its threads touches a block any more."""

    key: StreamKey


# --- events of a sink -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewsLost:
    """A frame of the source's daemon did not come; it may have been about this transfer."""


@dataclass(frozen=True, slots=True)
class PeerUp:
    """The source's daemon answers."""


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The source's daemon has gone silent."""


@dataclass(frozen=True, slots=True)
class StreamUp:
    """A data connection may be asked on."""

    key: StreamKey


@dataclass(frozen=True, slots=True)
class Heard:
    """The source's word on this attempt."""

    progress: Progress


@dataclass(frozen=True, slots=True)
class Shaped:
    """The source's layout or ranks are not ours, but fit: the payload comes in these parts."""

    shape: Shape


@dataclass(frozen=True, slots=True)
class Copied:
    """The source is here, but its blocks cannot become ours: they are copied, in these parts."""

    key: StreamKey
    shape: Shape


@dataclass(frozen=True, slots=True)
class Received:
    """A claimed extent is in place, its bytes verified."""

    key: StreamKey
    first_token: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Missed:
    """A claim ended without bytes; nobody writes there through this connection any more."""

    key: StreamKey
    first_token: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class TookOver:
    """Blocks of a source in this daemon changed owner; ``tokens`` of each rank are filled."""

    leases: tuple[Lease, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class RoomAgain:
    """The sink quota has room; try to take over again."""


@dataclass(frozen=True, slots=True)
class ResumeAt:
    """The worker has taken every token below ``sent_tokens`` over."""

    sent_tokens: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class ActedOn:
    """A rank of a group has seen this snapshot, and waits for one behind it."""

    snapshot: int
    rank: int


@dataclass(frozen=True, slots=True)
class DoneNoted:
    """The source knows how this attempt ended."""


# --- events of a source ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadyTo:
    """The worker has filled every token below ``ready_tokens``."""

    ready_tokens: int
    total_tokens: int | None
    aux: dict[str, int | float | str | bytes] | None
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Pulled:
    """A sink's daemon asks; ``sink`` is the boot id of this life of it, ``daemon`` its own."""

    sink: str
    daemon: str
    pull: Pull
    shape: Shape | None = None  # where blocks of another shape are asked for


@dataclass(frozen=True, slots=True)
class Sent:
    """The transport has read an extent for the last time."""

    key: StreamKey
    first_token: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class GiveOver:
    """A sink in this daemon takes up to ``blocks`` blocks from ``first_token`` on."""

    first_token: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Done:
    """The sink's end of the transfer."""

    state: State
    error: ErrorInfo | None


# --- effects --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WantBlocks:
    """Level: up to ``blocks`` more at the edge; 0 wants none. ``whole``: all of them or none.

    They are for ``ranks`` ranks: each gets as many as the others, so one more token has room in
    all of them or in none.
    """

    blocks: int
    whole: bool = False
    urgent: bool = False  # holds none, and others may be waiting for what it would free
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Free:
    """Nobody can touch these any more."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class FreeTail:
    """Blocks behind the end of the payload go back; each lease is the tail of a live one."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The transfer is over, but somebody may still touch these."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """Expect an extent on one stream connection, and receive it into these blocks."""

    key: StreamKey
    first_token: int
    tokens: int
    place: Place
    part: int = 0


@dataclass(frozen=True, slots=True)
class CancelClaims:
    """Take back every claim that no thread has begun to fill; answer Missed for those."""


@dataclass(frozen=True, slots=True)
class CloseStream:
    """End a connection: the only way to be sure of a reader or writer that hangs."""

    key: StreamKey


@dataclass(frozen=True, slots=True)
class SendPull:
    """Ask the source."""

    number: int
    acked_tokens: int
    want: tuple[Want, ...]
    show_layout: bool = False


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Take ready blocks from the source in this daemon, from ``first_token`` on."""

    first_token: int
    blocks: int


@dataclass(frozen=True, slots=True)
class SendDone:
    """Tell the source how it ended."""


@dataclass(frozen=True, slots=True)
class SendProgress:
    """Tell the sink where the source is; ``error`` answers one bad pull only.

    ``is_its_own``: the attempt is this sink's, so that it may hear of the payload.
    """

    number: int
    sink: str
    error: ErrorInfo | None = None
    is_its_own: bool = True


@dataclass(frozen=True, slots=True)
class Serve:
    """Send an extent out of these blocks on one stream connection."""

    key: StreamKey
    handle: int
    first_token: int
    tokens: int
    place: Place
    part: int = 0


@dataclass(frozen=True, slots=True)
class HandOver:
    """These ready blocks, as many of each rank, may change owner; ``tokens`` of each are filled."""

    leases: tuple[Lease, ...]
    tokens: int


Effect = (
    WantBlocks
    | Free
    | FreeTail
    | Quarantine
    | Claim
    | CancelClaims
    | CloseStream
    | SendPull
    | TakeOver
    | SendDone
    | SendProgress
    | Serve
    | HandOver
)
