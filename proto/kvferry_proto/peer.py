"""Peer socket: what a sink's daemon (it connects) and a source's daemon say to each other.

Messages may be lost, doubled and reordered. Pulls are numbered per transfer and answers echo the
number; both ends' boot ids are on every message after the hello. Bulk bytes travel on data
connections, each opened with a ticket from here (see chunk.py).
"""

from typing import Annotated, Literal

from pydantic import Field

from kvferry_proto.codec import Codec
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.fields import (
    Attempt,
    Aux,
    BootId,
    Count,
    ErrorInfo,
    Message,
    Text,
    Tokens,
    Traceparent,
    TransferId,
    WireState,
)
from kvferry_proto.layout import Layout
from kvferry_proto.versions import OURS, Version, Versions
from kvferry_proto.worker import WorldSize

WANTS_MAX = 1024
PULLS_MAX = 1024
STREAMS_MAX = 16
ADDRESS_CHARS_MAX = 256
PARTS_MAX = 1 << 12  # RANKS_MAX squared
Handle = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
Number = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
Stream = Annotated[int, Field(ge=0, lt=STREAMS_MAX)]
Transport = Literal["tcp", "nixl"]
Encryption = Literal["off", "tls"]
Fingerprint = Annotated[bytes, Field(min_length=32, max_length=32)]


class PeerHello(Message):
    """Sink's daemon to source's: first message, repeated until answered.

    A daemon that goes on from its ledger keeps its ``daemon_id``, and its ``life`` grows. The
    ``boot_id`` is of this life and this link: a source may be reached by two addresses.
    """

    kind: Literal["peer_hello"] = "peer_hello"
    versions: Versions = OURS
    boot_id: BootId
    daemon_id: BootId
    life: Annotated[int, Field(ge=1, le=1 << 31)]
    address: Annotated[str, Field(max_length=ADDRESS_CHARS_MAX)] = ""  # for operators: its own word


class PeerWelcome(Message):
    """The source's daemon answers with its own boot id."""

    kind: Literal["peer_welcome"] = "peer_welcome"
    version: Version
    boot_id: BootId
    sink_boot_id: BootId  # echoed


class _Linked(Message):
    source_boot_id: BootId
    sink_boot_id: BootId


class Ping(_Linked):
    """Sink to source, once a heartbeat, also when nothing moves; it renews all leases."""

    kind: Literal["ping"] = "ping"


class Pong(_Linked):
    """Source to sink: the answer to a ping, and how many news were told on this link before it."""

    kind: Literal["pong"] = "pong"
    news: Count


class Ways(Message):
    """By which transports an end can move blocks, and which one its operator wishes."""

    wish: Literal["auto", "tcp", "nixl"] = "tcp"
    nixl: Annotated[str, Field(max_length=32)] = ""  # its version; empty: not to be had
    fast: bool = False  # NIXL has hardware there that beats tcp
    why: Text = ""  # why it is not to be had, or not fast
    payload_encryption: Encryption = "off"  # both ends have to be set alike


class OpenStream(_Linked):
    """Ask for a ticket for connection number ``connection`` of data stream ``stream``."""

    kind: Literal["open_stream"] = "open_stream"
    stream: Stream
    connection: Number
    ways: Ways = Ways()


class Ticket(_Linked):
    """A single-use secret that admits one data connection on ``port`` of the same host.

    ``transport`` is what the source has chosen of both ends' ways, and ``why``. With
    ``certificate_sha256`` the connection is TLS, and whoever answers there has to have this
    certificate: nothing may be said before it is known.
    """

    kind: Literal["ticket"] = "ticket"
    stream: Stream
    connection: Number
    port: Annotated[int, Field(ge=1, le=65535)]
    ticket: Annotated[bytes, Field(min_length=32, max_length=32)]
    transport: Transport = "tcp"
    why: Text = ""
    certificate_sha256: Fingerprint | None = None


class Want(Message):
    """An extent of one part, and the one stream connection that it may come on."""

    first_token: Tokens
    tokens: Annotated[int, Field(ge=1, le=1 << 32)]
    stream: Stream
    connection: Number
    part: Annotated[int, Field(ge=0, lt=PARTS_MAX)] = 0


class Pull(Message):
    """What the sink wants now; an empty ``want`` asks for news.

    ``handle`` is a multiple of PARTS_MAX; the header of a part's chunk has ``handle + part``.
    """

    transfer_id: TransferId
    attempt: Attempt
    number: Number
    handle: Handle  # names (transfer, attempt) in the chunk headers
    layout_digest: Annotated[bytes, Field(min_length=16, max_length=16)]
    start_tokens: Tokens
    acked_tokens: Tokens
    world_size: WorldSize = 1  # the sink's ranks
    layout: Layout | None = None  # the sink's own, once it has heard that the source's is another
    traceparent: Traceparent | None = None  # the sink's, until it has heard that it is known
    want: Annotated[list[Want], Field(max_length=WANTS_MAX)] = Field(default_factory=list)


class Pulls(_Linked):
    """The pulls of all transfers between two daemons that are due."""

    kind: Literal["pulls"] = "pulls"
    pulls: Annotated[list[Pull], Field(min_length=1, max_length=PULLS_MAX)]


class Progress(Message):
    """The source's side of one transfer, as the answer to pull ``number`` or as news.

    ``known`` False: this daemon has no such attempt (yet, or any more). ``will_tell``: it remembers
    who asked, and answers again without being asked once it has.
    """

    transfer_id: TransferId
    attempt: Attempt
    number: Number
    known: bool = True
    will_tell: bool | None = None
    state: WireState
    available_tokens: Tokens = 0  # what may be asked for: whole blocks, or all once it is total
    total_tokens: Tokens | None = None
    aux: Aux | None = None
    error: ErrorInfo | None = None
    layout: Layout | None = (
        None  # the source's own, when it does not know the sink's, and they differ
    )
    world_size: WorldSize = 1  # the source's ranks; told with the layout


class Progresses(_Linked):
    """News of several transfers; ``before``: how many were told on this link before these."""

    kind: Literal["progresses"] = "progresses"
    before: Count
    progresses: Annotated[list[Progress], Field(min_length=1, max_length=PULLS_MAX)]


class Done(_Linked):
    """The sink's end of a transfer; repeated until `done_noted` comes."""

    kind: Literal["done"] = "done"
    transfer_id: TransferId
    attempt: Attempt
    state: WireState
    error: ErrorInfo | None = None


class DoneNoted(_Linked):
    """The source knows that the sink has ended."""

    kind: Literal["done_noted"] = "done_noted"
    transfer_id: TransferId
    attempt: Attempt


class PeerRefused(Message):
    """The message was refused; ``boot_id`` is the refusing daemon's."""

    kind: Literal["peer_refused"] = "peer_refused"
    boot_id: BootId
    error: ErrorInfo


PeerMessage = (
    PeerHello | PeerWelcome | Ping | Pong | OpenStream | Ticket | Pulls | Progresses
    | Done | DoneNoted | PeerRefused
)  # fmt: skip
MESSAGES: Codec[
    PeerHello
    | PeerWelcome
    | Ping
    | Pong
    | OpenStream
    | Ticket
    | Pulls
    | Progresses
    | Done
    | DoneNoted
    | PeerRefused
] = Codec(Annotated[PeerMessage, Field(discriminator="kind")])


def frames_of(message: PeerMessage) -> list[bytes]:
    """Encode a message; one of many pulls or progresses becomes several where it is too large.

    Each of them says what went before it, so that none can be lost unseen.
    Raises FerryError(resource_exhausted) if even a single one of them does not fit into a frame.
    """
    many = _parts(message)
    try:
        return [MESSAGES.encode(message)]
    except FerryError as error:
        if error.code is not Code.RESOURCE_EXHAUSTED or len(many) < 2:
            raise
    half = len(many) // 2
    field = "pulls" if isinstance(message, Pulls) else "progresses"
    halves: list[dict[str, object]] = [{field: many[:half]}, {field: many[half:]}]
    if isinstance(message, Progresses):
        halves[1]["before"] = message.before + half
    return [frame for part in halves for frame in frames_of(message.model_copy(update=part))]


def _parts(message: PeerMessage) -> list[Pull] | list[Progress]:
    if isinstance(message, Pulls):
        return message.pulls
    return message.progresses if isinstance(message, Progresses) else []
