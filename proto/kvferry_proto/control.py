"""Control socket: what operators read. Verbs that change something get a family of their own."""

from typing import Annotated, Literal

from pydantic import Field

from kvferry_proto.codec import Codec
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.fields import BootId, Call, Count, ErrorInfo, Message, TransferId, WireRole
from kvferry_proto.worker import RANKS_MAX, Rank, Snapshot

TRANSFERS_MAX = 1000


class GetStatus(Message):
    """The daemon, its pools, peers and workers."""

    kind: Literal["get_status"] = "get_status"
    call: Call = 0


class GetTransfers(Message):
    """Live and ended transfers, or every attempt of one id."""

    kind: Literal["get_transfers"] = "get_transfers"
    call: Call = 0
    transfer_id: TransferId | None = None
    limit: Annotated[int, Field(ge=1, le=TRANSFERS_MAX)] = TRANSFERS_MAX


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


class PlacementStatus(Message):
    """Where pools lie and who copies them."""

    huge_pages: str  # never, always, within_size or advise, as the tmpfs of the pools has it
    numa_node: Count | None = None  # absent: wherever the kernel likes
    copy_cpus: str = ""  # a list such as 0-3,8; empty: all that the process may use


class LoopStatus(Message):
    """How late the event loop came to a timer, in all its looks since the start; 1 ms is libuv's."""

    looks: Count
    late_over_2_ms: Count
    late_over_10_ms: Count
    late_over_100_ms: Count
    late_max_ms: float


class PeerStatus(Message):
    """A daemon that this one pulls from."""

    address: str
    state: Literal["connecting", "up", "lost"]
    boot_id: str | None = None
    streams_open: Count = 0
    transport: str = ""  # of the newest data connection
    why: str = ""  # it is this one
    detail: str = ""


class TransferStatus(Message):
    """A snapshot, and what only an operator asks for.

    ``state``, ``stall``, ``sent_tokens`` and ``available_tokens`` in it are the group's as they are,
    also where its ranks are not shown them yet.
    """

    snapshot: Snapshot
    worker: str
    source: str | None = None
    transport: str = ""
    age_s: float = 0.0
    idle_s: float = 0.0
    blocks: Count = 0
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


class Transfers(Message):
    """The answer to `get_transfers`."""

    kind: Literal["transfers"] = "transfers"
    call: Call = 0
    transfers: list[TransferStatus]
    more: Count = 0  # how many the limit left out


class ControlFailure(Message):
    """The request was refused."""

    kind: Literal["control_failure"] = "control_failure"
    call: Call = 0
    error: ErrorInfo


REQUESTS: Codec[GetStatus | GetTransfers] = Codec(
    Annotated[GetStatus | GetTransfers, Field(discriminator="kind")]
)
ANSWERS: Codec[Status | Transfers | ControlFailure] = Codec(
    Annotated[Status | Transfers | ControlFailure, Field(discriminator="kind")]
)


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
    "ANSWERS", "REQUESTS", "ControlFailure", "GetStatus", "GetTransfers", "LoopStatus",
    "PeerStatus", "PlacementStatus", "PoolStatus", "Status", "TransferStatus", "Transfers", "WireRole", "frame_of",
]  # fmt: skip
