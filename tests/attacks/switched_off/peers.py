"""What holds other daemons: keys, names, and what each is told and believed."""

from typing import Any

from attacks.switched_off.replacing import replace
from kvferry_daemon.config import Config
from kvferry_daemon.core import events as ev
from kvferry_daemon.core import sink_daemons, source
from kvferry_daemon.core.effects_of import EffectDesk
from kvferry_daemon.core.sink_desk import SinkDesk
from kvferry_daemon.core.source import SourceTransfer
from kvferry_daemon.core.source_desk import SourceDesk
from kvferry_daemon.keys import Keys
from kvferry_daemon.links import peer_link, zap
from kvferry_proto import peer
from kvferry_proto.states import Role


def any_key_will_do() -> None:
    """CURVE without an allow-list, as libzmq has it where nobody answers its questions."""
    replace(zap.PeerDoor, "__call__", lambda _self, request: request.credentials[0].hex())
    replace(Keys, "name_of", lambda _self, _key: "somebody")


def trust_lasts() -> None:
    """A key that was trusted once is trusted for as long as its connection lasts."""
    connections_outlive_trust()
    plain = Keys.name_of
    known: dict[str, str] = {}

    def name_of(self: Keys, key: str) -> str | None:
        name = plain(self, key)
        if name is not None:
            known[key] = name
        return known.get(key)

    replace(Keys, "name_of", name_of)


def connections_outlive_trust() -> None:
    """Data connections stay whatever becomes of the key that they were opened with."""
    replace(SourceDesk, "on_trust_changed", lambda _self, _event: None)


def peers_say_who_they_are() -> None:
    """Any trusted daemon may go by the id of another one."""
    replace(sink_daemons, "known_as", lambda daemon_id, _peer: daemon_id)
    plain = sink_daemons.SinkDaemons.seen

    def seen(
        self: sink_daemons.SinkDaemons, boot_id: str, route: bytes, _peer: str, now_s: float
    ) -> sink_daemons.SinkDaemon:
        known = self.get(boot_id)
        return plain(self, boot_id, route, known.peer if known else "", now_s)

    replace(sink_daemons.SinkDaemons, "seen", seen)


def refused_sinks_hear_all() -> None:
    """Every answer to a pull tells of the payload, whoever asks."""

    def told(_self: EffectDesk, transfer: SourceTransfer, _effect: object) -> dict[str, Any]:
        return {
            "available_tokens": transfer.servable_tokens,
            "total_tokens": transfer.total_tokens,
            "aux": transfer.aux,
        }

    replace(EffectDesk, "_payload_told", told)


def addresses_prove_nothing() -> None:
    """Whoever answers at a source's address is the source."""
    replace(peer_link, "prove_peer", lambda _socket, _key, _secret: None)


def clear_text_anywhere() -> None:
    """A daemon listens where it is told to, with keys or without."""
    replace(Config, "is_open_to_all", property(lambda _self: False))


def links_are_not_counted() -> None:
    """One peer may have as many links as there is room for."""
    replace(sink_daemons.SinkDaemons, "_of_one", lambda *_: [])


def all_is_served() -> None:
    """Another daemon is sent what it asks for, be it ready or not."""

    def serve(self: SourceTransfer, sink: str, pull: Any, want: Any) -> None:
        key = ev.StreamKey(sink, want.stream, want.connection)
        place = self.window.cover(want.first_token, want.tokens, self.shape.ranks[want.part])
        self._reading.add((key, want.first_token, want.part))
        self._emit(ev.Serve(key, pull.handle, want.first_token, want.tokens, place, want.part))

    replace(SourceTransfer, "_serve", serve)


def wants_are_queued() -> None:
    """What is wanted on a connection that is not open reaches the transfer."""
    replace(SourceDesk, "_servable", lambda _self, _sink, pulls: pulls)
    replace(source, "READING_MAX", 1 << 30)


def every_pull_is_answered() -> None:
    """As often as a transfer is pulled in one message."""

    def say(self: SourceDesk, sink: str, progress: peer.Progress) -> None:
        told = self._progresses.setdefault(sink, {})
        told[str(len(told)), 0] = progress

    replace(SourceDesk, "say_progress", say)


def anybody_ends_sources() -> None:
    """Whoever says that a transfer has arrived is believed, if nobody else has pulled it."""

    def may_end(_self: SourceDesk, transfer: Any, sink: Any, _state: Any) -> bool:
        return transfer.sink_daemon in (None, sink.daemon_id)

    replace(SourceDesk, "_may_end", may_end)


def any_source_tells() -> None:
    """What a source says of a transfer counts, be it received from there or not."""
    plain = SinkDesk._on_progress

    def on_progress(self: SinkDesk, address: str, progress: Any) -> None:
        key = ev.Key(Role.SINK, progress.transfer_id, progress.attempt)
        for its_own, sinks in self._sinks_of.items():
            if key in sinks:
                address = its_own
        plain(self, address, progress)

    replace(SinkDesk, "_on_progress", on_progress)


SWITCHES = (
    any_key_will_do,
    trust_lasts,
    connections_outlive_trust,
    peers_say_who_they_are,
    refused_sinks_hear_all,
    addresses_prove_nothing,
    clear_text_anywhere,
    links_are_not_counted,
    all_is_served,
    wants_are_queued,
    every_pull_is_answered,
    anybody_ends_sources,
    any_source_tells,
)
