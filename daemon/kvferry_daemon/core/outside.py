"""What reaches the node from outside, and what it wants done there."""

from dataclasses import dataclass
from typing import NamedTuple

from kvferry_daemon.core.allocator import Run
from kvferry_daemon.core.events import Key, StreamKey
from kvferry_daemon.core.past import Past
from kvferry_daemon.core.peer_effects import Connect, Disconnect, Probe, Say
from kvferry_daemon.core.records import Row
from kvferry_daemon.core.told import Told
from kvferry_daemon.core.window import Place
from kvferry_proto import peer, worker
from kvferry_proto.errors import Code
from kvferry_proto.layout import Layout
from kvferry_proto.parts import SideSlice

WorkerCall = (
    worker.Hello | worker.Send | worker.Ready | worker.Receive | worker.Poll | worker.Resume
    | worker.Release | worker.Abort | worker.Heartbeat | worker.Batch
)  # fmt: skip
WorkerReply = worker.Welcome | worker.Snapshots | worker.Failure | worker.BatchReply


# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerCalled:
    """A worker's call; ``lock_held`` (hello only): its lock file is locked, so it lives.

    ``user``: what the kernel says of who connected, as ``uid:gid:pid``.
    """

    route: bytes
    call: WorkerCall
    lock_held: bool = False
    user: str = ""


@dataclass(frozen=True, slots=True)
class LockDropped:
    """The kernel dropped a worker's flock: its process is dead."""

    session: str


@dataclass(frozen=True, slots=True)
class PoolMade:
    """The answer to MakePool: the file is there, all its space allocated.

    ``memory``: there is no file, but a GPU's memory that workers open like this.
    """

    pool_id: str
    path: str
    memory: worker.DeviceMemory | None = None


@dataclass(frozen=True, slots=True)
class PoolNotMade:
    """The answer to MakePool: it cannot be, and why, with the numbers."""

    pool_id: str
    message: str
    code: Code = Code.POOL_REFUSED
    usable: bool = True  # the device for this process, as in PoolBroken


@dataclass(frozen=True, slots=True)
class PoolBroken:
    """The device failed in a copy from or to this pool: nothing in it is to be relied on.

    ``usable``: the device still works for this process, so that the pool can be made anew.
    """

    pool_id: str
    message: str
    usable: bool


@dataclass(frozen=True, slots=True)
class Zeroed:
    """The answer to Zero."""

    ticket: int


@dataclass(frozen=True, slots=True)
class SourceSaid:
    """A message of a daemon that we pull from."""

    address: str
    message: peer.PeerMessage


@dataclass(frozen=True, slots=True)
class SinkSaid:
    """A message of a daemon that pulls from us; answers go to ``route``.

    ``peer``: the name under which its ``key`` is trusted; both empty where daemons talk in clear.
    """

    route: bytes
    message: peer.PeerMessage
    peer: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class TrustChanged:
    """Other keys are trusted now: these."""

    keys: frozenset[str]


@dataclass(frozen=True, slots=True)
class Probed:
    """The answer to Probe."""

    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class SinkStreamUp:
    """A data connection that we opened may be asked on."""

    key: StreamKey


@dataclass(frozen=True, slots=True)
class SinkStreamDown:
    """It has ended (or could not be opened), and no thread writes through it any more."""

    key: StreamKey
    reason: str


@dataclass(frozen=True, slots=True)
class SourceStreamUp:
    """A sink's daemon has opened a data connection."""

    key: StreamKey


@dataclass(frozen=True, slots=True)
class SourceStreamDown:
    """It has ended, and no thread reads a block for it any more."""

    key: StreamKey
    reason: str


@dataclass(frozen=True, slots=True)
class ChunkReceived:
    """A claimed extent is in place, verified."""

    key: StreamKey
    handle: int
    first_token: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkMissed:
    """A claim ended without bytes and nobody writes there."""

    key: StreamKey
    handle: int
    first_token: int


@dataclass(frozen=True, slots=True)
class ChunkDrained:
    """Bytes that nobody had claimed were read aside."""

    payload_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkSent:
    """A served extent has left; its blocks are not read for it any more."""

    key: StreamKey
    owner: Key
    part: int
    first_token: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What an earlier life of this daemon left in its ledger; the first event, if there is one."""

    past: Past


@dataclass(frozen=True, slots=True)
class DrainBegun:
    """No new transfers from now on."""


@dataclass(frozen=True, slots=True)
class DrainEnded:
    """New transfers are welcome again."""


@dataclass(frozen=True, slots=True)
class TransfersAborted:
    """An operator gives transfers up."""

    keys: tuple[Key, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing happened but the clock."""


NodeEvent = (
    WorkerCalled | LockDropped | PoolMade | PoolNotMade | PoolBroken | Zeroed | SourceSaid | SinkSaid
    | Probed | SinkStreamUp | SinkStreamDown | SourceStreamUp | SourceStreamDown | ChunkReceived
    | ChunkMissed | ChunkDrained | ChunkSent | Restored | DrainBegun | DrainEnded
    | TransfersAborted | TrustChanged | TimePassed
)  # fmt: skip


# --- effects --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToWorker:
    """Answer a worker."""

    route: bytes
    reply: WorkerReply


@dataclass(frozen=True, slots=True)
class ToSink:
    """Answer a daemon that pulls from us."""

    route: bytes
    message: peer.PeerMessage


@dataclass(frozen=True, slots=True)
class OpenPeer:
    """Make a message link to a source's daemon."""

    address: str


@dataclass(frozen=True, slots=True)
class ClosePeer:
    """Drop that link."""

    address: str


@dataclass(frozen=True, slots=True)
class Admit:
    """Let one data connection in that shows this ticket."""

    key: StreamKey
    ticket: bytes
    transport: peer.Transport = "tcp"


@dataclass(frozen=True, slots=True)
class Expel:
    """Close a data connection that a sink's daemon had opened."""

    key: StreamKey


class Slices(NamedTuple):
    """What of the blocks a part has, where they do not travel whole."""

    wire_block_tokens: int
    planes: tuple[SideSlice, ...]


@dataclass(frozen=True, slots=True)
class Expect:
    """Claim: receive this extent, from this connection only, into these blocks."""

    key: StreamKey
    pool_id: str
    handle: int
    first_token: int
    tokens: int
    place: Place
    slices: Slices | None = None


@dataclass(frozen=True, slots=True)
class CancelExpected:
    """Take back what no thread has begun, of every part; ChunkMissed for each of those.

    ``handle`` is that of the first part.
    """

    handle: int


@dataclass(frozen=True, slots=True)
class Transmit:
    """Send this extent out of the owner's blocks, under the sink's handle."""

    key: StreamKey
    owner: Key
    part: int
    pool_id: str
    handle: int
    first_token: int
    tokens: int
    place: Place
    slices: Slices | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """Put rows into the ledger; whatever stands behind it in the list must wait for that."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class ShowSlot:
    """Write a snapshot into the slot of the pool's status board that it names."""

    pool_id: str
    snapshot: worker.Snapshot


@dataclass(frozen=True, slots=True)
class ClearSlot:
    """A slot of the pool's status board is nobody's now."""

    pool_id: str
    index: int


@dataclass(frozen=True, slots=True)
class DropPool:
    """Nobody uses this pool, and another needs its room."""

    pool_id: str


@dataclass(frozen=True, slots=True)
class Zero:
    """Wipe blocks off the loop; answer Zeroed."""

    pool_id: str
    runs: tuple[Run, ...]
    ticket: int


@dataclass(frozen=True, slots=True)
class MakePool:
    """Create a pool's memory off the loop; answer PoolMade or PoolNotMade."""

    pool_id: str
    layout: Layout
    blocks: int


@dataclass(frozen=True, slots=True)
class ForgetWorker:
    """A session is over; its lock file may go."""

    session: str


@dataclass(frozen=True, slots=True)
class WatchWorker:
    """Look at a session's lock file from now on."""

    session: str
    lock: str


NodeEffect = (
    ToWorker | ToSink | Say | OpenPeer | ClosePeer | Connect | Disconnect | Probe | Admit | Expel
    | Expect | CancelExpected | Transmit | Zero | MakePool | DropPool | WatchWorker
    | Write | ForgetWorker | ShowSlot | ClearSlot | Told
)  # fmt: skip
