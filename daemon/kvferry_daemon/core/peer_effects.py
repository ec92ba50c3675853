"""What a ``Peer`` asks for: words and connections of the shell, news for its address's sinks."""

from dataclasses import dataclass

from kvferry_daemon.core.events import StreamKey
from kvferry_proto import peer as wire
from kvferry_proto.errors import Code


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the daemon at ``address``."""

    address: str
    message: wire.PeerMessage


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a data connection with a ticket; answer StreamUp or StreamDown."""

    key: StreamKey
    port: int
    ticket: bytes
    transport: wire.Transport = "tcp"
    certificate_sha256: bytes | None = None  # of who has to answer; None: in clear


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close a data connection; StreamDown follows once no thread uses it."""

    key: StreamKey


@dataclass(frozen=True, slots=True)
class Probe:
    """Find out why nobody answers at ``address``; answer with words for people."""

    address: str


@dataclass(frozen=True, slots=True)
class PeerIsUp:
    """Tell the sinks of ``address``."""

    address: str


@dataclass(frozen=True, slots=True)
class PeerIsDown:
    """Tell the sinks of ``address``."""

    address: str
    restarted: bool = False  # it answers, as another life


@dataclass(frozen=True, slots=True)
class NewsAreLost:
    """Tell the sinks of ``address``: they must ask."""

    address: str


@dataclass(frozen=True, slots=True)
class PeerFailed:
    """Nobody fit to talk to answers: fail the sinks of ``address``."""

    address: str
    code: Code
    message: str


PeerEffect = (
    Say | Connect | Disconnect | Probe | PeerIsUp | PeerIsDown | NewsAreLost | PeerFailed
)  # fmt: skip
