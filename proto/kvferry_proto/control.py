"""Control socket: what operators read (`Read`), and what they change (`Change`)."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from kvferry_proto.codec import Codec
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.fields import (
    Attempt,
    BootId,
    Call,
    Count,
    ErrorInfo,
    Message,
    Text,
    Tokens,
    TransferId,
    WireRole,
    WireStall,
    WireState,
)
from kvferry_proto.worker import RANKS_MAX, Rank, Snapshot

TRANSFERS_MAX = 1000
EXPLAINED_MAX = 64  # attempts of one id
NEAR_MAX = 5
LogLevel = Literal["debug", "info", "warning", "error"]
Sort = Literal["opened", "age", "idle", "sent", "blocks"]
Seconds = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
SESSIONS_SHOWN_MAX = 256
SINKS_SHOWN_MAX = 256


class GetStatus(Message):
    """The daemon, its pools, peers and workers."""

    kind: Literal["get_status"] = "get_status"
    call: Call = 0


class GetTransfers(Message):
    """Live and ended transfers, or every attempt of one id; those only that fit all that is given.

    The ``limit`` last ones of the order are told, with what is most of it at the end.
    """

    kind: Literal["get_transfers"] = "get_transfers"
    call: Call = 0
    transfer_id: TransferId | None = None
    limit: Annotated[int, Field(ge=1, le=TRANSFERS_MAX)] = TRANSFERS_MAX
    state: WireState | None = None
    role: WireRole | None = None
    stall: WireStall | None = None
    worker: Annotated[str, Field(max_length=128)] | None = None
    peer: Annotated[str, Field(max_length=256)] | None = None  # address of the other side's daemon
    age_s: Seconds | None = None  # at least so old
    idle_s: Seconds | None = None  # at least so long without progress
    sort: Sort = "opened"


class Explain(Message):
    """Everything that is known of every attempt of one id, or ids that are near it."""

    kind: Literal["explain"] = "explain"
    call: Call = 0
    transfer_id: TransferId


class SetDraining(Message):
    """Take no new transfers, or take them again. Says nothing about those that there are."""

    kind: Literal["set_draining"] = "set_draining"
    call: Call = 0
    draining: bool


class AbortTransfer(Message):
    """Give up every live attempt of an id, or one of them, on all sides that are here."""

    kind: Literal["abort_transfer"] = "abort_transfer"
    call: Call = 0
    transfer_id: TransferId
    attempt: Attempt | None = None
    reason: Text = ""


class SetLogLevel(Message):
    """What the daemon writes to its log from now on, until it ends."""

    kind: Literal["set_log_level"] = "set_log_level"
    call: Call = 0
    level: LogLevel


class PoolStatus(Message):
    """One pool; free + leased + quarantined blocks = total."""

    device: str
    path: str
    block_bytes: Count
    block_size_tokens: Count
    blocks_total: Count
    blocks_free: Count
    blocks_leased: Count
    blocks_quarantined: Count
    source_blocks: Count  # quota
    sink_blocks: Count  # quota
    largest_run_blocks: Count
    workers: Count
    planes: list[str]
    source_held_blocks: Count | None = None  # of the quota; absent: a daemon that does not tell
    sink_held_blocks: Count | None = None


class PlacementStatus(Message):
    """Where pools lie and who copies them."""

    huge_pages: str  # never, always, within_size or advise, as the tmpfs of the pools has it
    numa_node: Count | None = None  # absent: wherever the kernel likes
    copy_cpus: str = ""  # a list such as 0-3,8; empty: all that the process may use


class TurnStatus(Message):
    """Turns of the event loop since the daemon was ready, and their own work: CPU of its thread."""

    turns: Count
    seconds: float  # of all turns
    over_1_ms: Count
    over_2_ms: Count
    over_10_ms: Count
    over_100_ms: Count
    max_ms: float
    work_over_1_ms: Count
    work_over_2_ms: Count
    work_over_10_ms: Count
    work_over_100_ms: Count
    work_max_ms: float


class LoopStatus(Message):
    """How late the event loop came to a timer, in all its looks since the start; 1 ms is libuv's."""

    looks: Count
    late_over_2_ms: Count
    late_over_10_ms: Count
    late_over_100_ms: Count
    late_max_ms: float
    turns: TurnStatus | None = None


class RateStatus(Message):
    """What moved a second, on average of the last ``seconds``."""

    seconds: Seconds
    tokens_sent: Rate  # that a sink has acknowledged
    tokens_received: Rate
    bytes_sent: Rate
    bytes_received: Rate
    bytes_copied: Rate  # within the daemon


class SecurityStatus(Message):
    """How daemons talk to this one."""

    messages: Literal["curve", "clear"]
    insecure: bool = False  # in clear, to whoever reaches the peer socket from elsewhere
    trusted_keys: Count = 0
    payload: Literal["tls", "clear"] = "clear"  # between daemons


class PeerStatus(Message):
    """A daemon that this one pulls from."""

    address: str
    state: Literal["connecting", "up", "lost"]
    boot_id: str | None = None
    streams_open: Count = 0
    transport: str = ""  # of the newest data connection
    why: str = ""  # it is this one
    detail: str = ""


class SinkStatus(Message):
    """A daemon that pulls from this one. Its ids are told to nobody: they let others speak as it."""

    address: str  # its own word; empty where it does not say
    state: Literal["up", "silent"]
    heard_s: Seconds  # ago
    name: str = ""  # under which its key is trusted
    streams_open: Count = 0
    transport: str = ""  # of the newest data connection


class WorkerStatus(Message):
    """A worker's session: its name is its own word, its user the kernel's."""

    name: str
    user: str  # uid:gid:pid of who opened it
    pool: str
    transfers: Count = 0
    lost: bool = False  # silent for longer than it may be


class TransferStatus(Message):
    """A snapshot, and what only an operator asks for.

    ``state``, ``stall``, ``sent_tokens`` and ``available_tokens`` in it are the group's as they are,
    also where its ranks are not shown them yet.
    """

    snapshot: Snapshot
    worker: str
    user: str | None = None  # uid:gid:pid of `worker`
    source: str | None = None
    sink: str | None = None  # of a source: the daemon that pulls, by the address that it names
    transport: str = ""
    age_s: float = 0.0
    idle_s: float = 0.0
    blocks: Count = 0  # of all ranks, as Holder has them
    ended: bool = False
    workers: Annotated[list[str], Field(max_length=RANKS_MAX)] = Field(default_factory=list)
    behind: Annotated[list[Rank], Field(max_length=RANKS_MAX)] = Field(default_factory=list)


class Status(Message):
    """The answer to `get_status`."""

    kind: Literal["status"] = "status"
    call: Call = 0
    version: str
    wire_versions: Annotated[tuple[Count, Count], Field(strict=False)]
    boot_id: BootId
    pid: Count
    uptime_s: float
    draining: bool
    peer_address: str
    runtime_dir: str
    workers: Count
    blocks_total: Count
    blocks_free: Count
    transfers: dict[str, Count]  # live and remembered, by state name
    stalls: dict[str, Count]
    counters: dict[str, Count]
    pools: list[PoolStatus]
    peers: list[PeerStatus]
    placement: PlacementStatus | None = None
    loop: LoopStatus | None = None
    unsettled: Count = 0  # transfers that are live, or still hold blocks
    log_level: str = ""
    security: SecurityStatus | None = None
    sessions: Annotated[list[WorkerStatus], Field(max_length=SESSIONS_SHOWN_MAX)] | None = None
    rates: RateStatus | None = None  # absent: it has looked once at most
    sinks: Annotated[list[SinkStatus], Field(max_length=SINKS_SHOWN_MAX)] | None = None


class Transfers(Message):
    """The answer to `get_transfers`."""

    kind: Literal["transfers"] = "transfers"
    call: Call = 0
    transfers: list[TransferStatus]
    more: Count = 0  # how many the limit left out


class Moment(Message):
    """One line of a timeline: what the numbers were after a change, and what the change was."""

    ago_s: float
    what: Text
    state: WireState
    stall: WireStall | None = None
    sent_tokens: Tokens = 0
    available_tokens: Tokens = 0
    base_tokens: Tokens = 0
    allocated_tokens: Tokens = 0


class Holder(Message):
    """A transfer that has blocks which others wait for."""

    transfer_id: TransferId
    role: WireRole
    attempt: Attempt
    blocks: Count
    stall: WireStall | None = None


class Explained(Message):
    """One side of one attempt. What it waits for is in ``seen.snapshot.stall``."""

    seen: TransferStatus
    moments: list[Moment]  # oldest first
    moments_lost: Count = 0  # older ones that are not kept
    stalled_s: float | None = None  # since when it waits for that
    waits_for: Text = ""
    helps: Text = ""
    holding: Text = ""  # who may still touch its blocks
    holders: list[Holder] = Field(default_factory=list)  # who has the blocks that it waits for


class Explanation(Message):
    """The answer to `explain`."""

    kind: Literal["explanation"] = "explanation"
    call: Call = 0
    transfers: Annotated[list[Explained], Field(max_length=EXPLAINED_MAX)]
    near: Annotated[list[TransferId], Field(max_length=NEAR_MAX)] = Field(default_factory=list)


class Draining(Message):
    """The answer to `set_draining`."""

    kind: Literal["draining"] = "draining"
    call: Call = 0
    draining: bool
    unsettled: Count


class Aborted(Message):
    """The answer to `abort_transfer`: what was live and is given up."""

    kind: Literal["aborted"] = "aborted"
    call: Call = 0
    transfers: Annotated[list[TransferStatus], Field(max_length=TRANSFERS_MAX)]


class LogLevelSet(Message):
    """The answer to `set_log_level`."""

    kind: Literal["log_level_set"] = "log_level_set"
    call: Call = 0
    level: LogLevel
    before: str


class ControlFailure(Message):
    """The request was refused."""

    kind: Literal["control_failure"] = "control_failure"
    call: Call = 0
    error: ErrorInfo


Read = GetStatus | GetTransfers | Explain
Change = SetDraining | AbortTransfer | SetLogLevel
Request = Read | Change
Answer = Status | Transfers | Explanation | Draining | Aborted | LogLevelSet | ControlFailure
CHANGES: tuple[type[Message], ...] = get_args(Change)
REQUESTS: Codec[GetStatus | GetTransfers | Explain | SetDraining | AbortTransfer | SetLogLevel] = (
    Codec(Annotated[Request, Field(discriminator="kind")])
)
ANSWERS: Codec[
    Status | Transfers | Explanation | Draining | Aborted | LogLevelSet | ControlFailure
] = Codec(Annotated[Answer, Field(discriminator="kind")])


def frame_of(answer: Transfers) -> bytes:
    """Encode as many of the newest transfers as fit into a frame; ``more`` counts the others.

    Raises FerryError(resource_exhausted) if not even one does.
    """
    rows = answer.transfers
    while True:
        more = answer.more + len(answer.transfers) - len(rows)
        try:
            return ANSWERS.encode(answer.model_copy(update={"transfers": rows, "more": more}))
        except FerryError as error:
            if error.code is not Code.RESOURCE_EXHAUSTED or len(rows) < 2:
                raise
        rows = rows[len(rows) // 2 :]


__all__ = [
    "ANSWERS",
    "CHANGES",
    "REQUESTS",
    "AbortTransfer",
    "Aborted",
    "Answer",
    "Change",
    "ControlFailure",
    "Draining",
    "Explain",
    "Explained",
    "Explanation",
    "GetStatus",
    "GetTransfers",
    "Holder",
    "LogLevel",
    "LogLevelSet",
    "LoopStatus",
    "Moment",
    "PeerStatus",
    "PlacementStatus",
    "PoolStatus",
    "RateStatus",
    "Read",
    "Request",
    "SecurityStatus",
    "SetDraining",
    "SetLogLevel",
    "SinkStatus",
    "Status",
    "TransferStatus",
    "Transfers",
    "TurnStatus",
    "WireRole",
    "WorkerStatus",
    "frame_of",
]  # fmt: skip
