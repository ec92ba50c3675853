"""What a daemon has to know after its own death: one small record a row, read as strictly as a frame.

Times are the machine's monotonic seconds: they go on while the machine does, as tmpfs does.
"""

from typing import Annotated, Literal

from pydantic import Field

from kvferry_proto.codec import Codec
from kvferry_proto.fields import (
    TOKENS_MAX,
    Attempt,
    Aux,
    BootId,
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
from kvferry_proto.layout import Layout
from kvferry_proto.worker import (
    RANKS_MAX,
    WINDOW_BLOCKS_MAX,
    FileName,
    Receive,
    Secret,
    Send,
    Snapshot,
)

HOST = "host"  # the device of a pool that outlives its daemon's process
LeaseRecord = Annotated[tuple[Count, Count, Count], Field(strict=False)]  # id, first block, blocks
Seconds = Annotated[float, Field(ge=0)]


class SessionRecord(Message):
    """A worker that has joined."""

    kind: Literal["session"] = "session"
    secret: Secret
    name: Annotated[str, Field(max_length=128)]
    pid: Count
    lock: FileName
    pool_id: FileName
    user: Annotated[str, Field(max_length=64)]  # uid:gid:pid


class PoolRecord(Message):
    """A pool: its file lies beside the ledger, or it was in a device and ended with its process."""

    kind: Literal["pool"] = "pool"
    pool_id: FileName
    layout: Layout
    blocks: Count
    source_blocks: Count
    sink_blocks: Count
    device: Annotated[str, Field(max_length=16)] = HOST


class OpeningRecord(Message):
    """What a transfer was opened with: written once."""

    kind: Literal["opening"] = "opening"
    role: WireRole
    transfer_id: TransferId
    attempt: Attempt
    session: Secret  # whose call it was
    pool_id: FileName
    call: Annotated[Send | Receive, Field(discriminator="kind")]
    aux_digest: bytes | None = None  # of its aux values, which are in a row of their own
    window_tokens: Tokens
    source: Annotated[str, Field(max_length=256)] | None = None
    max_tokens: Tokens | None = None
    chunk_tokens: Tokens


class AuxRecord(Message):
    """A transfer's aux values: written once, they may be large."""

    kind: Literal["aux"] = "aux"
    aux: Aux


class RankRecord(Message):
    """What one worker of a transfer has said."""

    session: Annotated[str, Field(max_length=64)] = ""  # has not come
    released: bool = False
    level_tokens: Annotated[int, Field(ge=-1)] = 0
    total_tokens: Tokens | None = None


class Shown(Message):
    """What the ranks of a group were shown last, of what asks them to act."""

    state: WireState
    stall: WireStall | None = None
    sent_tokens: Tokens


class TransferRecord(Message):
    """Where a transfer is."""

    kind: Literal["transfer"] = "transfer"
    version: Count
    state: WireState
    error: ErrorInfo | None = None
    sent_tokens: Tokens
    partial_sent_tokens: Tokens
    last_resume_at: Annotated[int, Field(ge=-1, le=TOKENS_MAX)]
    total_tokens: Tokens | None = None
    available_tokens: Tokens
    base_tokens: Tokens
    leases: Annotated[list[LeaseRecord], Field(max_length=WINDOW_BLOCKS_MAX)]
    ranks: Annotated[list[RankRecord], Field(min_length=1, max_length=RANKS_MAX)]
    quarantined: bool
    ended_s: Seconds | None = None
    # a sink's
    known: bool = False  # its source has answered
    peer_met: bool = False
    done_noted: bool = False
    shown: Shown | None = None  # to the ranks of a group
    # a source's
    sink_daemon: BootId | None = None
    began: bool = False


class StoneRecord(Message):
    """What is remembered of a transfer that is over."""

    kind: Literal["stone"] = "stone"
    snapshot: Snapshot
    sessions: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=RANKS_MAX)]
    until_s: Seconds
    sink_daemon: BootId | None = None


class DaemonRecord(Message):
    """Which daemon this is, and which of its lives wrote last."""

    kind: Literal["daemon"] = "daemon"
    format: Count
    daemon_id: BootId
    life: Annotated[int, Field(ge=1, le=1 << 20)]
    machine_boot: Text  # monotonic seconds mean nothing after the machine has started anew
    directory: Count = 0  # the number of its runtime directory: beside other pools it means nothing
    peer_port: Annotated[int, Field(ge=0, le=65535)] = 0


Record = (
    SessionRecord | PoolRecord | OpeningRecord | AuxRecord | TransferRecord | StoneRecord
    | DaemonRecord
)  # fmt: skip
RECORDS: Codec[Record] = Codec(Annotated[Record, Field(discriminator="kind")])
Row = tuple[str, bytes | None]  # a name, and what it holds now; None: it is gone
