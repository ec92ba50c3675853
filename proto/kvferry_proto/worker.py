"""Worker socket: what a prefill or decode worker says to its daemon, and what it answers.

Every call carries a ``call`` number that the answer echoes. Every verb has absolute parameters:
the same call again changes nothing and answers the current snapshot. Bulk bytes never travel
here; a worker maps the pool that ``Welcome`` names.
"""

from typing import Annotated, Literal

from pydantic import Field

from kvferry_proto.codec import Codec
from kvferry_proto.fields import (
    Attempt,
    Aux,
    BootId,
    Call,
    Count,
    ErrorInfo,
    Message,
    Text,
    Tokens,
    Traceparent,
    TransferId,
    WireMode,
    WireRole,
    WireStall,
    WireState,
)
from kvferry_proto.layout import BLOCK_BYTES_MAX, Layout
from kvferry_proto.states import Mode
from kvferry_proto.versions import OURS, Version, Versions

POLL_MAX = 4096
BATCH_MAX = 256
WAIT_MAX_S = 60.0
RANKS_MAX = 64  # of one group
Secret = Annotated[str, Field(min_length=32, max_length=64, pattern=r"^[0-9a-f]+$")]
FileName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_\-]+$")]


BLOCKS_MAX = 1 << 31  # of one pool
WINDOW_BLOCKS_MAX = 1 << 15  # were each a run of its own, a snapshot would still fit into a frame
_Block = Annotated[int, Field(ge=0, le=BLOCKS_MAX)]
# (first_block, blocks); msgpack has lists only.
BlockRun = Annotated[tuple[_Block, _Block], Field(strict=False)]


Rank = Annotated[int, Field(ge=0, lt=RANKS_MAX)]
WorldSize = Annotated[int, Field(ge=1, le=RANKS_MAX)]


Deadline = Annotated[float, Field(gt=0, le=86400)]  # seconds from whatever it counts from


class _Call(Message):
    call: Call = 0


class _Named(_Call):
    """``rank``: which worker of a group this is; 0 where there is no group."""

    transfer_id: TransferId
    attempt: Attempt = 0
    rank: Rank = 0


class Hello(_Call):
    """First call on every connection; with ``session`` it takes an earlier session up again."""

    kind: Literal["hello"] = "hello"
    versions: Versions = OURS
    worker: Annotated[str, Field(max_length=128)] = ""  # a name for operators
    pid: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    lock: FileName  # file in <runtime>/workers on which the worker holds a flock while it lives
    layout: Layout
    session: Secret | None = None


class Send(_Named):
    """Open the source side: the worker will fill a window and mark tokens ready.

    The workers of a group of ``world_size`` ranks all say it, each with its own rank.
    """

    kind: Literal["send"] = "send"
    world_size: WorldSize = 1
    start_tokens: Tokens = 0
    total_tokens: Tokens | None = None
    aux: Aux | None = None
    window_tokens: Tokens | None = None
    stall_s: Deadline | None = None  # these beat the daemon's own, up to its deadline_max_s
    lease_s: Deadline | None = None
    traceparent: Traceparent | None = None


class Ready(_Named):
    """Tokens ``[start, ready_tokens)`` are filled; the worker writes them no more."""

    kind: Literal["ready"] = "ready"
    ready_tokens: Tokens
    total_tokens: Tokens | None = None
    aux: Aux | None = None


class Receive(_Named):
    """Open the sink side and pull from the daemon at ``source`` (None: from this one)."""

    kind: Literal["receive"] = "receive"
    world_size: WorldSize = 1
    source: Annotated[str, Field(max_length=256)] | None = None
    mode: WireMode = Mode.CONSUME
    start_tokens: Tokens = 0
    window_tokens: Tokens | None = None
    max_tokens: Tokens | None = None  # whole mode: what is reserved before anything moves
    stall_s: Deadline | None = None  # these beat the daemon's own, up to its deadline_max_s
    hold_s: Deadline | None = None
    traceparent: Traceparent | None = None


class Watched(Message):
    """One transfer in a poll: answer once its snapshot number is above ``after``."""

    role: WireRole
    transfer_id: TransferId
    attempt: Attempt = 0
    rank: Rank = 0
    after: Annotated[int, Field(ge=-1)] = -1


class Poll(_Call):
    """Ask for snapshots; with ``wait_s`` the answer waits until one of them changes.

    ``board``: give these transfers slots on the status board, and show some of them, news or not.
    """

    kind: Literal["poll"] = "poll"
    transfers: Annotated[list[Watched], Field(min_length=1, max_length=POLL_MAX)]
    wait_s: Annotated[float, Field(ge=0, le=WAIT_MAX_S)] = 0.0
    board: bool = False


class Resume(_Named):
    """The sink worker has taken ``[.., sent_tokens)`` over; their blocks may go."""

    kind: Literal["resume"] = "resume"
    sent_tokens: Tokens


class Release(_Named):
    """The worker touches no block of this attempt any more. Always acts on the attempt named."""

    kind: Literal["release"] = "release"
    role: WireRole


class Abort(_Named):
    """Give the transfer up. Says nothing about blocks; `release` does."""

    kind: Literal["abort"] = "abort"
    role: WireRole
    reason: Text = ""


class Heartbeat(_Call):
    """The worker's process is alive and its interpreter runs."""

    kind: Literal["heartbeat"] = "heartbeat"


Verb = Annotated[
    Send | Ready | Receive | Poll | Resume | Release | Abort | Heartbeat,
    Field(discriminator="kind"),
]


class Batch(_Call):
    """Several calls in one frame, answered in one, in order; polls in it do not wait."""

    kind: Literal["batch"] = "batch"
    calls: Annotated[list[Verb], Field(min_length=1, max_length=BATCH_MAX)]


class DeviceMemory(Message):
    """How a pool in a GPU's memory is opened."""

    device: Annotated[str, Field(max_length=16)]  # the daemon's own name for it: for people
    uuid: Annotated[bytes, Field(min_length=16, max_length=16)]  # of the GPU, as the driver has it
    handle: Annotated[bytes, Field(min_length=64, max_length=64)]  # for cuIpcOpenMemHandle


class PoolInfo(Message):
    """The pool that a session uses: a file to map, or a GPU's memory to open."""

    path: Annotated[str, Field(max_length=4096)]  # empty where there is `device`
    blocks: Annotated[int, Field(ge=1, le=BLOCKS_MAX)]
    block_bytes: Annotated[int, Field(ge=1, le=BLOCK_BYTES_MAX)]
    window_tokens: Tokens  # the default window
    board: Annotated[str, Field(max_length=4096)] | None = None  # the status board's file
    device: DeviceMemory | None = None


class Welcome(_Call):
    """The answer to `hello`."""

    kind: Literal["welcome"] = "welcome"
    version: Version
    boot_id: BootId
    session: Secret
    pool: PoolInfo
    heartbeat_s: Annotated[float, Field(gt=0, le=86400)]
    peer_address: Annotated[str, Field(max_length=256)]  # what a sink elsewhere gives as `source`


class BoardSlot(Message):
    """Where a transfer stands on the status board, and the key that its slot bears so long."""

    index: Count
    key: Count


class Snapshot(Message):
    """Everything a worker may know of one transfer at one moment.

    Block ``i`` of the window holds tokens ``base_tokens + i * block_size_tokens`` onwards.
    ``snapshot`` grows with every change. On the source, ``sent_tokens`` is what the sink has
    acknowledged and ``available_tokens`` what the worker marked ready.

    The ranks of a group see the same under the same number, but for their own ``runs`` and, on the
    source, what they themselves marked ready. What asks a sink's ranks to act (``sent_tokens``,
    ``stall``, success) changes only when all have polled behind the number that showed it before,
    or resumed at its ``sent_tokens``: so all of them take the same tokens over.
    """

    role: WireRole
    transfer_id: TransferId
    attempt: Attempt
    rank: Rank = 0
    world_size: WorldSize = 1
    snapshot: Count
    state: WireState
    stall: WireStall | None = None
    error: ErrorInfo | None = None
    start_tokens: Tokens = 0
    sent_tokens: Tokens = 0
    partial_sent_tokens: Tokens = 0
    last_resume_at: Annotated[int, Field(ge=-1)] = -1
    total_tokens: Tokens | None = None
    available_tokens: Tokens = 0
    base_tokens: Tokens = 0
    allocated_tokens: Tokens = 0
    target_tokens: Tokens = 0  # the edge up to which the window may be topped up
    runs: Annotated[list[BlockRun], Field(max_length=WINDOW_BLOCKS_MAX)] = Field(
        default_factory=list
    )  # in token order
    aux: Aux | None = None
    slot: BoardSlot | None = None  # if it is on the status board


class Refused(Message):
    """One transfer of a poll that cannot be answered."""

    role: WireRole
    transfer_id: TransferId
    attempt: Attempt
    rank: Rank = 0
    error: ErrorInfo


class Snapshots(_Call):
    """The answer to every verb about transfers."""

    kind: Literal["snapshots"] = "snapshots"
    transfers: list[Snapshot] = Field(default_factory=list)
    refused: list[Refused] = Field(default_factory=list)


class Failure(_Call):
    """The call was refused and changed nothing."""

    kind: Literal["failure"] = "failure"
    error: ErrorInfo


Reply = Annotated[Snapshots | Failure, Field(discriminator="kind")]


class BatchReply(_Call):
    """One reply for each call of a batch."""

    kind: Literal["batch_reply"] = "batch_reply"
    replies: list[Reply]


WorkerCall = Annotated[
    Hello | Send | Ready | Receive | Poll | Resume | Release | Abort | Heartbeat | Batch,
    Field(discriminator="kind"),
]
WorkerReply = Annotated[Welcome | Snapshots | Failure | BatchReply, Field(discriminator="kind")]

CALLS: Codec[
    Hello | Send | Ready | Receive | Poll | Resume | Release | Abort | Heartbeat | Batch
] = Codec(WorkerCall)
REPLIES: Codec[Welcome | Snapshots | Failure | BatchReply] = Codec(WorkerReply)
