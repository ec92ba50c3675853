"""The daemons that pull from us: their messages, and what we tell them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.deeds import Deed
from kvferry_daemon.core.shape import Side
from kvferry_daemon.core.sink_daemons import SinkDaemon, SinkDaemons
from kvferry_daemon.core.sink_streams import SinkStreams
from kvferry_daemon.core.source import SourceTransfer
from kvferry_daemon.core.tombstones import Tombstone
from kvferry_daemon.core.transfer import NEVER_S
from kvferry_daemon.core.unmet import Unmet, answer_without_transfer
from kvferry_daemon.core.ways import choose
from kvferry_proto import peer as wire
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.states import Role, State
from kvferry_proto.versions import agree

if TYPE_CHECKING:
    from kvferry_daemon.core.node import AnyTransfer, Node

FRAME_WANTS_MAX = 4096  # a daemon sends no more: see sink_desk
UNKNOWN_ENDS_A_S = 1000  # of one peer, or of all in clear: each is a row of the ledger
FRAME_PROGRESSES_MAX = 16  # so that the other daemon is not held up by one frame for long


class SourceDesk:
    """Everything about sinks elsewhere."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.daemons = SinkDaemons()
        self.streams = SinkStreams()
        self.transports: dict[str, wire.Transport] = {}  # by sink, of its newest connection
        self.unmet = Unmet(node)
        self._unknown_ends = Allowances(UNKNOWN_ENDS_A_S)
        self._progresses: dict[str, dict[tuple[str, int], wire.Progress]] = {}

    # --- messages ---

    def on_message(self, event: out.SinkSaid) -> None:
        """A daemon that pulls from us said something; whatever it is, it gets an answer."""
        message, route = event.message, event.route
        try:
            if isinstance(message, wire.PeerHello):
                self._on_hello(event, message)
                return
            daemon = self._checked(event)
            sink = daemon.boot_id
            match message:
                case wire.Ping():
                    pong = wire.Pong(
                        news=daemon.news,
                        source_boot_id=self._node.settings.boot_id,
                        sink_boot_id=sink,
                    )
                    self._say(daemon, pong)
                case wire.OpenStream():
                    self._on_open_stream(daemon, message)
                case wire.Pulls():
                    for pull in self._servable(sink, message.pulls):
                        self.on_pull(ev.Pulled(sink, daemon.daemon_id, pull))
                case wire.Done():
                    self._on_done(daemon, message)
                case _:
                    raise FerryError(Code.PEER_PROTOCOL, f"a sink does not send {message.kind}")
        except FerryError as error:
            self._node.counters[f"peer_refused_{error.code.value}"] += 1
            code, why = error.code.value, error.message
            self._node.deeds.append(
                Deed(
                    "peer_refused", event.peer or "in clear", asked=message.kind, code=code, why=why
                )
            )
            self._refuse(route, error)

    def _refuse(self, route: bytes, error: FerryError) -> None:
        info = ErrorInfo.of_error(error)
        refusal = wire.PeerRefused(boot_id=self._node.settings.boot_id, error=info)
        self._node.effects.append(out.ToSink(route, refusal))

    def _checked(self, event: out.SinkSaid) -> SinkDaemon:
        ours, message = self._node.settings.boot_id, event.message
        if getattr(message, "source_boot_id", None) != ours:
            raise FerryError(Code.DAEMON_RESTARTED, "the message is for an earlier life of mine")
        boot_id = str(getattr(message, "sink_boot_id", ""))
        daemon = self.daemons.seen(boot_id, event.route, event.peer, self._node.now_s)
        daemon.key = event.key
        return daemon

    def _on_hello(self, event: out.SinkSaid, hello: wire.PeerHello) -> None:
        version = agree(hello.versions)
        for boot_id in self.daemons.hello(event.route, event.peer, hello, self._node.now_s):
            self._forget_sink(boot_id)
        daemon = self.daemons.get(hello.boot_id)
        if daemon is not None:
            daemon.key = event.key
        welcome = wire.PeerWelcome(
            version=version, boot_id=self._node.settings.boot_id, sink_boot_id=hello.boot_id
        )
        self._node.effects.append(out.ToSink(event.route, welcome))

    def on_trust_changed(self, event: out.TrustChanged) -> None:
        """Whoever opened a data connection with a key that is not trusted any more has none."""
        for boot_id in self.daemons.distrust(event.keys):
            self._node.counters["links_distrusted"] += 1
            self._forget_sink(boot_id)

    def _forget_sink(self, boot_id: str) -> None:
        self.transports.pop(boot_id, None)
        for key in self.streams.forget(boot_id):
            self._node.effects.append(out.Expel(key))

    def _on_open_stream(self, daemon: SinkDaemon, message: wire.OpenStream) -> None:
        """A new connection of a stream ends the earlier ones: one writer an extent."""
        sink = daemon.boot_id
        key = ev.StreamKey(sink, message.stream, message.connection)
        transport, why = choose(message.ways, self._node.ways)
        if not self.streams.admit(key, daemon.whose, self._node.now_s):
            return
        self.transports[sink] = transport
        for earlier in self.streams.before(key):
            self._node.effects.append(out.Expel(earlier))
        ticket = self._node.new_secret()
        self._node.effects.append(out.Admit(key, ticket, transport))
        answer = wire.Ticket(
            stream=message.stream,
            connection=message.connection,
            port=self._node.data_port,
            ticket=ticket,
            transport=transport,
            why=why,
            certificate_sha256=self._node.certificate_sha256,
            source_boot_id=self._node.settings.boot_id,
            sink_boot_id=sink,
        )
        self._say(daemon, answer)

    def _servable(self, sink: str, pulls: list[wire.Pull]) -> Iterator[wire.Pull]:
        """Pulls without what is wanted on connections that are not open, or beyond what we send."""
        room = FRAME_WANTS_MAX
        for pull in pulls:
            want = [
                one
                for one in pull.want
                if ev.StreamKey(sink, one.stream, one.connection) in self.streams
            ][:room]
            room -= len(want)
            if dropped := len(pull.want) - len(want):
                self._node.counters["wants_dropped"] += dropped
                pull = pull.model_copy(update={"want": want})
            yield pull

    def on_pull(self, event: ev.Pulled) -> None:
        """A sink elsewhere asks: its transfer answers, or we do while there is none."""
        node, sink, pull = self._node, event.sink, event.pull
        key = ev.Key(Role.SOURCE, pull.transfer_id, pull.attempt)
        node.counters["pulls_received"] += 1
        node.pay(key)  # it may be over by that: there is an answer to that, too
        transfer = node.transfers.get(key)
        if transfer is None:
            self.say_progress(sink, self.unmet.answer(key, event))
            return
        layout, ranks = node.books[transfer.opening.pool_id].layout, transfer.ranks.size
        asked_as = (pull.layout_digest, pull.world_size)
        sliced = transfer.shape.slices is not None
        known = sliced and getattr(transfer, "sink", None) == sink  # one started anew asks anew
        if known or asked_as == (layout.digest, ranks):
            node.post(key, event)
        elif pull.layout is not None:
            self._on_pull_of_another_shape(key, event, Side.of(layout, ranks))
        else:
            progress = answer_without_transfer(node, key, pull.number)
            ours = {"layout": layout, "world_size": ranks, "known": True}
            self.say_progress(sink, progress.model_copy(update=ours))

    def _on_pull_of_another_shape(self, key: ev.Key, event: ev.Pulled, ours: Side) -> None:
        """The sink's layout or ranks are not ours: both work out what goes where, once a life."""
        node, pull, daemon = self._node, event.pull, self.daemons.get(event.sink)
        transfer = node.transfers[key]
        assert pull.layout is not None
        assert isinstance(transfer, SourceTransfer)
        if transfer.ended or transfer.what_is_wrong(event) is not None:
            node.post(key, event)  # which says so, without any work
            return
        theirs = Side.of(pull.layout, pull.world_size)
        whose, peer = ("", "") if daemon is None else (daemon.whose, daemon.peer)
        names = ("peer", whose), ("peers", peer)  # in clear, they can be as many as they say
        if not node.plans.may_make(*names, ours, theirs, node.now_s):
            node.counters["plans_refused"] += 1  # it asks again
            return
        try:
            shape, _ = node.plans.make(ours, theirs)
        except FerryError as error:
            refusal = answer_without_transfer(node, key, pull.number)
            info = ErrorInfo.of_error(error)
            failed = {"state": State.FAILED, "known": True, "error": info}
            self.say_progress(event.sink, refusal.model_copy(update=failed))
            return
        node.run_now(key, replace(event, shape=shape))  # no other one in the same frame

    def _on_done(self, sink: SinkDaemon, message: wire.Done) -> None:
        key = ev.Key(Role.SOURCE, message.transfer_id, message.attempt)
        known = self._node.transfers.get(key) or self._node.tombstones.get(key)
        if known is None and self._unknown_ends.wait_s(sink.peer, self._node.now_s):
            self._node.counters["dones_over_rate"] += 1
            return  # not noted, so it says it again
        if known is None or self._may_end(known, sink, message.state):
            self._node.run_now(key, ev.Done(message.state, message.error))
        else:
            self._node.counters["dones_dropped"] += 1
        noted = wire.DoneNoted(
            transfer_id=message.transfer_id,
            attempt=message.attempt,
            source_boot_id=self._node.settings.boot_id,
            sink_boot_id=sink.boot_id,
        )
        self._say(sink, noted)

    def _may_end(self, known: AnyTransfer | Tombstone, sink: SinkDaemon, state: State) -> bool:
        """One that nobody has pulled yet may have failed there, but not have arrived, nor late."""
        by = getattr(known, "sink_daemon", None)
        if state is State.SUCCESS:
            return by == sink.daemon_id and known.total_tokens is not None
        return by in (None, sink.daemon_id)

    def done_without_transfer(self, key: ev.Key, done: ev.Done) -> None:
        """A late done, or one for an attempt that is still to be opened here."""
        node = self._node
        self.unmet.drop(key)
        if node.tombstones.get(key) is not None:
            if node.tombstones.on_done(key, done):
                node.notes.stone(key)
        elif node.current.get((Role.SOURCE, key.transfer_id), -1) < key.attempt:
            node.tombstones.add_unknown(key, done, node.now_s)
            node.notes.stone(key)

    # --- streams ---

    def on_stream_up(self, event: out.SourceStreamUp) -> None:
        """A sink's daemon has connected; it may have asked for a newer one, or be forgotten."""
        daemon = self.daemons.get(event.key.peer)
        newest = self.streams.came(event.key, "" if daemon is None else daemon.whose)
        if daemon is None or not newest:
            self._node.counters["streams_expelled"] += 1
            self._node.effects.append(out.Expel(event.key))

    def on_stream_down(self, event: out.SourceStreamDown) -> None:
        """No thread reads a block for it any more."""
        self._node.chronicle.stream_down(event.key)
        self._node.tell(self.streams.ended(event.key), ev.StreamDown(event.key))

    def forget(self, transfer: SourceTransfer) -> None:
        """The transfer is gone."""
        self.streams.forget_transfer(transfer.key, transfer.streams)

    def on_sent(self, event: out.ChunkSent) -> None:
        """An extent has left."""
        if not event.key.is_here:
            self._node.counters["chunks_sent"] += 1
            self._node.counters["bytes_sent"] += event.payload_bytes
        chunk = (event.owner, event.part, event.first_token)
        self._node.chronicle.chunk_ended(event.key, *chunk)
        self._node.post(event.owner, ev.Sent(event.key, event.first_token, event.part))

    # --- saying ---

    def say_progress(self, sink: str, progress: wire.Progress) -> None:
        """Send news with the others of this turn to the same daemon.

        Of one attempt the newest, which answers all pulls before; or the one that refused one.
        """
        told = self._progresses.setdefault(sink, {})
        key = progress.transfer_id, progress.attempt
        if key not in told or told[key].error is None:
            told[key] = progress

    def flush(self) -> None:
        """Send the news of this turn."""
        news, self._progresses = self._progresses, {}
        for sink, told in news.items():
            daemon, progresses = self.daemons.get(sink), list(told.values())
            if daemon is None:
                continue  # it has to say hello again, and to ask
            for first in range(0, len(progresses), FRAME_PROGRESSES_MAX):
                part = progresses[first : first + FRAME_PROGRESSES_MAX]
                message = wire.Progresses.model_construct(
                    kind="progresses",
                    before=daemon.news,
                    progresses=part,
                    source_boot_id=self._node.settings.boot_id,
                    sink_boot_id=sink,
                )
                daemon.news += len(part)
                self._say(daemon, message)

    def _say(self, daemon: SinkDaemon, message: wire.PeerMessage) -> None:
        self._node.effects.append(out.ToSink(daemon.route, message))

    def heard_s(self, sink: str | None) -> float:
        """When the daemon of a source's sink said anything; all its leases are renewed by that."""
        if sink == self._node.settings.boot_id:
            return self._node.now_s
        daemon = self.daemons.get(sink)
        return -NEVER_S if daemon is None else daemon.heard_s

    def streams_of(self) -> Counter[str]:
        """How many data connections each sink has."""
        return self.streams.counted()
