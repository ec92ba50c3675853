"""The daemons that this one pulls from: hello, heartbeat, streams. One machine an address."""

from dataclasses import dataclass, field
from typing import Literal

from kvferry_daemon.core.events import StreamKey, Timing
from kvferry_daemon.core.peer_effects import (
    Connect,
    Disconnect,
    NewsAreLost,
    PeerEffect,
    PeerFailed,
    PeerIsDown,
    PeerIsUp,
    Probe,
    Say,
)
from kvferry_proto import peer as wire
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.versions import Versions, agree

NEVER_S = float("inf")
ONLY_TCP = wire.Ways()
FATAL = (
    Code.NO_COMMON_VERSION,
    Code.TRANSPORT_UNAVAILABLE,
    Code.ENCRYPTION_DIFFERS,
    Code.NOT_TRUSTED,
)  # asking again does not help


@dataclass(slots=True)
class _Stream:
    connection: int = 0
    state: Literal["closed", "asking", "connecting", "up", "closing"] = "closed"
    up_at_s: float = 0.0
    retry_at_s: float = 0.0
    retry_s: float = 0.2


@dataclass(slots=True)
class Peer:
    """One daemon that this one pulls from. Only the ``on_`` methods and ``tick`` change it."""

    address: str
    hello: wire.PeerHello
    timing: Timing
    streams_wanted: int
    now_s: float
    ways: wire.Ways = ONLY_TCP
    transport: wire.Transport | None = None  # of the newest connection; None before the first
    why: str = ""  # it is this one
    state: Literal["connecting", "up", "lost"] = "connecting"
    boot_id: str | None = None
    detail: str = ""
    used_s: float = 0.0  # when a live transfer needed it last
    _news: int = 0  # that have come or are known to be lost
    _ask_at_s: float = NEVER_S  # sinks are to hear that more news were lost
    _tell_at_s: dict[type, float] = field(default_factory=dict)  # not before; see _may_tell
    _restart_s: float = 0.0  # how long after the last restart the next one was not believed
    _silent_since_s: float = 0.0
    _say_at_s: float = 0.0
    _say_s: float = 0.0
    _probe_at_s: float = 0.0
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _effects: list[PeerEffect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.used_s = self._silent_since_s = self._say_at_s = self.now_s
        self._say_s = self.timing.resend_s
        self._probe_at_s = self.now_s + self.timing.connect_s
        self._streams = {index: _Stream() for index in range(self.streams_wanted)}

    @property
    def our_boot_id(self) -> str:
        """Of this life of ours."""
        return self.hello.boot_id

    @property
    def streams_open(self) -> list[StreamKey]:
        """Connections that may be asked on."""
        return [
            StreamKey(self.address, index, stream.connection)
            for index, stream in self._streams.items()
            if stream.state == "up"
        ]

    @property
    def closed(self) -> bool:
        """Whether no data connection is open or on its way."""
        return all(stream.state in ("closed", "asking") for stream in self._streams.values())

    @property
    def wake_at_s(self) -> float:
        """When tick() is due at the latest."""
        if self.state == "connecting":
            return min(self._say_at_s, self._probe_at_s)
        if self.state == "lost":
            return self._say_at_s  # whether anybody answers there was found out once
        waiting = [s.retry_at_s for s in self._streams.values() if s.state in ("closed", "asking")]
        lost_at_s = self._silent_since_s + self.timing.lost_s
        return min([self._say_at_s, lost_at_s, self._ask_at_s, *waiting])

    def tick(self, now_s: float) -> list[PeerEffect]:
        """Time has come to ``now_s``: repeat what is unanswered, notice silence."""
        self.now_s = now_s
        if self.state == "up" and now_s >= self._silent_since_s + self.timing.lost_s:
            self._lose(f"silent for {self.timing.lost_s:g} s")
        if self.state != "up":
            self._say_hello()
        else:
            if now_s >= self._say_at_s:
                self._say_at_s = now_s + self.timing.heartbeat_s
                self._say(
                    wire.Ping(source_boot_id=self.boot_id or "", sink_boot_id=self.our_boot_id)
                )
            if now_s >= self._ask_at_s:
                self._lose_news()
            self._ask_for_streams()
        return self._taken()

    def forgive(self, slept_s: float) -> None:
        """We stood still ourselves: what the peer said meanwhile is still to be read."""
        self._silent_since_s += slept_s
        self._probe_at_s += slept_s

    def on_message(self, message: wire.PeerMessage, now_s: float) -> list[PeerEffect]:
        """Handle a link-level answer; the caller routes progress and done_noted itself."""
        self.now_s = now_s
        if isinstance(message, wire.PeerRefused):
            self._refused(message)
        elif isinstance(message, wire.PeerWelcome):
            self._welcomed(message)
        elif self.is_current(message):
            self._silent_since_s = now_s
            if isinstance(message, wire.Ticket):
                self._ticket(message)
            elif isinstance(message, wire.Progresses):
                self._count(message.before, message.before + len(message.progresses))
            elif isinstance(message, wire.Pong):
                self._count(message.news, message.news)
        return self._taken()

    def _count(self, before: int, news: int) -> None:
        """Of those ``before`` this message some may not have come; ``news`` now have."""
        if before > self._news:
            self._lose_news()
        self._news = max(self._news, news)

    def _lose_news(self) -> None:
        """All sinks ask at once, so for what is lost in the moments after that they ask once more."""
        if self._may_tell(NewsAreLost, self.timing.resend_s):
            self._ask_at_s = NEVER_S
            self._effects.append(NewsAreLost(self.address))
        else:
            self._ask_at_s = self._tell_at_s[NewsAreLost]

    def _may_tell(self, what: type[PeerEffect], pause_s: float) -> bool:
        """What thousands of sinks hear, a source could say thousands of times a second."""
        if self.now_s < self._tell_at_s.get(what, 0.0):
            return False
        self._tell_at_s[what] = self.now_s + pause_s
        return True

    def is_current(self, message: wire.PeerMessage) -> bool:
        """Whether a message comes from the life of the peer that we talk to, to this life."""
        sink, source = getattr(message, "sink_boot_id", ""), getattr(message, "source_boot_id", "")
        return self.state == "up" and sink == self.our_boot_id and source == self.boot_id

    def on_stream_up(self, key: StreamKey, now_s: float) -> list[PeerEffect]:
        """A connect succeeded."""
        self.now_s = now_s
        stream = self._streams[key.stream]
        if stream.connection != key.connection or stream.state != "connecting":
            self._effects.append(Disconnect(key))
        else:
            stream.state = "up"
            stream.up_at_s = now_s
        return self._taken()

    def on_stream_down(self, key: StreamKey, reason: str, now_s: float) -> list[PeerEffect]:
        """A connection ended, or a connect failed."""
        self.now_s = now_s
        stream = self._streams[key.stream]
        if stream.connection == key.connection and stream.state in ("connecting", "up", "closing"):
            self.detail = f"stream {key.stream}: {reason}"
            if stream.state != "connecting" and now_s - stream.up_at_s >= self.timing.resend_max_s:
                stream.retry_s = self.timing.resend_s  # else it would end as soon again
            stream.state = "closed"
            stream.connection += 1
            stream.retry_at_s = (
                now_s if stream.retry_s == self.timing.resend_s else (now_s + stream.retry_s)
            )
            stream.retry_s = min(stream.retry_s * 2, self.timing.resend_max_s)
        return self._taken()

    def on_probed(self, reason: str) -> list[PeerEffect]:
        """The probe has found why nobody answers."""
        if self.state == "connecting":
            self.detail = reason
            message = f"no kvferry daemon answers at {self.address}: {reason}"
            self._effects.append(PeerFailed(self.address, Code.PEER_UNREACHABLE, message))
        return self._taken()

    def shut(self) -> list[PeerEffect]:
        """Close every data connection."""
        self._close_streams()
        return self._taken()

    def _close_streams(self) -> None:
        for index, stream in self._streams.items():
            if stream.state in ("connecting", "up"):
                stream.state = "closing"
                self._effects.append(Disconnect(StreamKey(self.address, index, stream.connection)))

    def _taken(self) -> list[PeerEffect]:
        effects, self._effects = self._effects, []
        return effects

    def _say(self, message: wire.PeerMessage) -> None:
        self._effects.append(Say(self.address, message))

    def _say_hello(self) -> None:
        if self.now_s >= self._say_at_s:
            self._say_at_s = self.now_s + self._say_s
            self._say_s = min(self._say_s * 2, self.timing.resend_max_s)
            self._say(self.hello)
        if self.state == "connecting" and self.now_s >= self._probe_at_s:
            self._probe_at_s = self.now_s + self.timing.connect_s
            self._effects.append(Probe(self.address))

    def _welcomed(self, message: wire.PeerWelcome) -> None:
        if message.sink_boot_id != self.our_boot_id:
            return
        try:
            agree(Versions(low=message.version, high=message.version))
        except FerryError as error:
            self._fail(error.code, error.message)
            return
        self._silent_since_s = self.now_s
        self._news = 0  # it may have forgotten us, and counts anew
        if self.state == "up" and message.boot_id == self.boot_id:
            self._lose_news()  # or a hello was answered twice
            return
        if self.state == "up" and not self._has_restarted():
            return
        self.state = "up"
        self.boot_id = message.boot_id
        self.detail = ""
        self._ask_at_s = NEVER_S
        self._say_at_s = self.now_s + self.timing.heartbeat_s
        self._effects.append(PeerIsUp(self.address))
        self._ask_for_streams()

    def _refused(self, message: wire.PeerRefused) -> None:
        self.detail = f"{message.error.code}: {message.error.message}"
        if message.error.code in FATAL:
            self._fail(Code(message.error.code), message.error.message)
        elif self.state == "up" and message.boot_id != self.boot_id:
            self._has_restarted()
        elif self.state == "up" and message.error.code == Code.HELLO_FIRST:
            self._say(self.hello)

    def _fail(self, code: Code, message: str) -> None:
        if self._may_tell(PeerFailed, self.timing.resend_s):  # who opens one hears it at the next
            self._effects.append(PeerFailed(self.address, code, message))

    def _has_restarted(self) -> bool:
        """Another life answers. Who says so again and again is believed ever later, and else lost."""
        timing = self.timing
        quiet_s = self.now_s - self._tell_at_s.get(PeerIsDown, -NEVER_S)
        pause_s = timing.resend_s
        if quiet_s < timing.lost_s:
            pause_s = min(2 * self._restart_s, timing.lost_s)
        if not self._may_tell(PeerIsDown, pause_s):
            return False
        self._restart_s = pause_s
        self._lose("restarted", restarted=True)
        return True

    def _lose(self, why: str, *, restarted: bool = False) -> None:
        """Streams are closed: only that proves that nothing more is written through them."""
        self.state = "lost"
        self.detail = why
        self._say_at_s = self.now_s
        self._say_s = self.timing.resend_s
        self._effects.append(PeerIsDown(self.address, restarted))
        self._close_streams()

    def _ask_for_streams(self) -> None:
        for index, stream in self._streams.items():
            if stream.state in ("closed", "asking") and self.now_s >= stream.retry_at_s:
                stream.state = "asking"
                stream.retry_at_s = self.now_s + self.timing.resend_max_s
                self._say(
                    wire.OpenStream(
                        stream=index,
                        connection=stream.connection,
                        ways=self.ways,
                        source_boot_id=self.boot_id or "",
                        sink_boot_id=self.our_boot_id,
                    )
                )

    def _ticket(self, message: wire.Ticket) -> None:
        stream = self._streams.get(message.stream)
        if stream is None or stream.connection != message.connection or stream.state != "asking":
            return
        if message.transport == "nixl" and not self.ways.nixl:
            words = f"the source wants nixl, which is not here: {self.ways.why}"
            self._fail(Code.TRANSPORT_UNAVAILABLE, words)
            return
        offered = "off" if message.certificate_sha256 is None else "tls"
        if offered != self.ways.payload_encryption:  # it is one that never heard of the setting
            words = f"payload_encryption: the sink has {self.ways.payload_encryption}"
            words += f", the source offers {offered}"
            self._fail(Code.ENCRYPTION_DIFFERS, words)
            return
        stream.state = "connecting"
        self.transport, self.why = message.transport, message.why
        key = StreamKey(self.address, message.stream, message.connection)
        told = (message.port, message.ticket, message.transport, message.certificate_sha256)
        self._effects.append(Connect(key, *told))
