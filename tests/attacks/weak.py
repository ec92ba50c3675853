"""`kvferry` with one defence switched off, by its name: `python -m attacks.weak NAME serve ...`.

The attacks run against it too: one that fails there as well proves nothing about the defence. This
is the only place where a defence can be switched off; the product has no such option. Some only set
the scene, for both runs of an attack: a fault of ours, or deadlines that a test can wait for.
"""

import dataclasses
import logging
import os
import select
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import zmq
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils import z85

from kvferry_daemon import access, audit, daemon, keys, logs, runtime_dir
from kvferry_daemon.command import main
from kvferry_daemon.config import Config
from kvferry_daemon.core import (
    deeds,
    openings,
    readiness,
    sink_daemons,
    sink_streams,
    source,
    source_desk,
    tombstones,
    ways,
    worker_desk,
)
from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.aux_books import AuxBooks
from kvferry_daemon.core.crowd import Crowd
from kvferry_daemon.core.effects_of import EffectDesk
from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.core.node import Session
from kvferry_daemon.core.opening import Opened
from kvferry_daemon.core.openings import Openings
from kvferry_daemon.core.outside import Admit
from kvferry_daemon.core.sink_desk import SinkDesk
from kvferry_daemon.core.source import SourceTransfer
from kvferry_daemon.core.source_desk import SourceDesk
from kvferry_daemon.core.worker_desk import WorkerDesk
from kvferry_daemon.http import door
from kvferry_daemon.keys import Keys
from kvferry_daemon.links import peer_link, zap, zmq_link
from kvferry_daemon.links.pressure import Pressure
from kvferry_daemon.memory import board, host
from kvferry_daemon.streams import Streams
from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp import listener, receiver, tls
from kvferry_proto import codec, peer
from kvferry_proto.errors import FerryError
from kvferry_proto.states import Role


def anybody_connects() -> None:
    """The worker socket lets every process in that reaches it."""

    def admit(_self: zap.LocalDoor, request: zap.Request) -> str:
        found = zap.LOCAL.fullmatch(request.address)
        assert found is not None
        return ":".join(found.groups())

    replace(zap.LocalDoor, "__call__", admit)


def anybody_operates() -> None:
    """Whoever may read what operators read may change it, too."""
    replace(access.Users, "has", lambda _self, _user: True)


def secret_is_enough() -> None:
    """A session may be taken up by whoever knows its secret."""
    anybody_connects()
    replace(Session, "belongs_to", lambda _self, _user: True)


def routes_are_trusted() -> None:
    """Whoever has a connection's routing id has its session."""
    anybody_connects()
    plain = WorkerDesk.session_at

    def session_at(self: WorkerDesk, route: bytes, _user: str) -> Session | None:
        return plain(self, route, self._routes.get(route, ("", ""))[1])

    replace(WorkerDesk, "session_at", session_at)


def transfers_are_everybodys() -> None:
    """Whoever knows a transfer's id may do with it what its own worker may."""
    replace(Openings, "check_owner", lambda _self, _session, _key, _rank: None)


def anybody_retries() -> None:
    """A higher attempt ends the one before it, whoever opens it."""
    replace(Openings, "_check_retry", lambda _self, _session, _key, _newest: None)


def no_zeroing() -> None:
    """Blocks are handed out as they come back."""
    replace(host.HostPool, "zero", lambda _self, _first_block, _blocks: None)


def all_is_served() -> None:
    """Another daemon is sent what it asks for, be it ready or not."""

    def serve(self: SourceTransfer, sink: str, pull: Any, want: Any) -> None:
        key = ev.StreamKey(sink, want.stream, want.connection)
        place = self.window.cover(want.first_token, want.tokens, self.shape.ranks[want.part])
        self._reading.add((key, want.first_token, want.part))
        self._emit(ev.Serve(key, pull.handle, want.first_token, want.tokens, place, want.part))

    replace(SourceTransfer, "_serve", serve)


def pools_are_the_groups() -> None:
    """The files of a tenant's pool are open to all workers, as those of a shared one are."""

    def open_to_group(descriptor: int, _uid: int, *, writable: bool) -> None:
        os.fchmod(descriptor, 0o660 if writable else 0o640)

    replace(host, "open_to_user", open_to_group)
    replace(board, "open_to_user", open_to_group)


def tenants_meet() -> None:
    """Whoever knows a transfer's id may receive it, and end it."""
    replace(Openings, "_check_tenant", lambda _self, _session, _key: None)
    replace(Openings, "are_strangers", lambda _self, _key, _other: False)
    replace(SinkDesk, "_is_us", lambda _self, _address: False)


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


def open_keys_will_do() -> None:
    """Files of keys are read whoever else may read or write them."""
    replace(keys, "_check", lambda _path, _forbidden: None)


def links_are_not_counted() -> None:
    """One peer may have as many links as there is room for."""
    replace(sink_daemons.SinkDaemons, "_of_one", lambda *_: [])


def no_doors() -> None:
    """Sockets have no domain, so libzmq asks nobody who may connect."""
    replace(daemon, "guard", lambda _socket, _domain: None)
    plain = zmq_link.ZmqLink.__init__

    def begin(self: zmq_link.ZmqLink, *args: Any, names_users: bool = False, **more: Any) -> None:
        plain(self, *args, **more)  # nobody has said who they are

    replace(zmq_link.ZmqLink, "__init__", begin)
    replace(Keys, "name_of", lambda _self, _key: "somebody")


def nobody_at_the_doors() -> None:
    """The scene: the handler that libzmq asks is not there."""
    nobody = SimpleNamespace(close=lambda: None)
    replace(daemon, "Doorkeeper", lambda _context, _doors, _on_refused: nobody)


def bare_curve() -> None:
    """CURVE as libzmq has it by itself."""
    nobody_at_the_doors()
    no_doors()


def doors_fail_once() -> None:
    """The scene: a fault of ours, at the first who shows a key."""
    plain = zap.PeerDoor.__call__
    faults = [ZeroDivisionError("a fault of ours")]

    def admit(self: zap.PeerDoor, request: zap.Request) -> str:
        if faults:
            raise faults.pop()
        return plain(self, request)

    replace(zap.PeerDoor, "__call__", admit)


class Authenticator(AsyncioAuthenticator):
    """pyzmq's own handler, which asks our doors."""

    def __init__(self, context: Any, doors: Any, on_refused: Callable[[], None]) -> None:
        super().__init__(context)
        self.door, self.on_refused = doors[zap.PEER], on_refused
        self.configure_curve_callback(zap.PEER, credentials_provider=self)
        self.start()

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether the holder of this key is let in."""
        try:
            self.door(zap.Request("", b"CURVE", [z85.decode(key)]))
        except zap.Refused:
            self.on_refused()
            return False
        return True

    def curve_user_id(self, client_public_key: bytes) -> str:
        """As our handler names him."""
        return client_public_key.hex()

    def close(self) -> None:
        """As ours does."""
        self.stop()


def handler_is_pyzmqs() -> None:
    """The handler is the one that comes with pyzmq."""
    replace(daemon, "Doorkeeper", Authenticator)


def faulty_pyzmqs_handler() -> None:
    """And a fault meets it."""
    doors_fail_once()
    handler_is_pyzmqs()


def no_flock() -> None:
    """A daemon takes any directory that it is told to, another one's too."""
    weak = SimpleNamespace(flock=lambda _descriptor, _how: None, LOCK_EX=0, LOCK_NB=0)
    replace(runtime_dir, "fcntl", weak)


def files_are_replaced() -> None:
    """libzmq binds over whatever lies where a socket is to be."""
    replace(runtime_dir, "_refuse_others", lambda _path: None)


def any_ticket_will_do() -> None:
    """Who connects to the data port is taken for the one who is expected."""
    plain = listener.Listener._check

    def check(self: listener.Listener, ticket: bytes) -> Any:
        return plain(self, next(iter(self._tickets), ticket))

    replace(listener.Listener, "_check", check)


def tickets_last() -> None:
    """A ticket is good again and again, for connections beside the first one."""
    streams_are_free()

    def check(self: listener.Listener, ticket: bytes) -> Any:
        found = self._tickets.get(ticket)
        return None if found is None else found.key

    replace(listener.Listener, "_check", check)


def older_tickets_stay() -> None:
    """A newer ticket does not take the place of one that was given before."""

    def admit(self: listener.Listener, ticket: bytes, key: Any, _s: float, stream: Any) -> None:
        self._tickets[ticket] = listener._Ticket(key, stream, float("inf"))
        self._ticket_of[stream] = ticket

    replace(listener.Listener, "admit", admit)


def any_connection_will_do() -> None:
    """What is asked for goes out on some connection, whosever it is."""
    replace(sink_streams.SinkStreams, "__contains__", lambda _self, _key: True)
    replace(sink_streams.SinkStreams, "reads", lambda _self, _key, _transfer: True)
    plain = Streams.transmit

    def transmit(self: Streams, effect: out.Transmit, place: Any, blocks: Any) -> bool:
        some = next(iter(self._senders))
        return plain(self, dataclasses.replace(effect, key=some), place, blocks)

    replace(Streams, "transmit", transmit)


def claims_are_everybodys() -> None:
    """A chunk goes where its header says, by whatever connection it comes."""
    claims: dict[Any, Any] = {}
    whose: dict[tuple[int, int], Any] = {}
    begin, claim = receiver.StreamReceiver.__init__, receiver.StreamReceiver.claim

    def begin_weakly(
        self: receiver.StreamReceiver, sock: Any, key: Any, post: Any, *rest: Any
    ) -> None:
        def post_for(event: Any) -> None:
            if isinstance(event, te.Received):
                event = dataclasses.replace(event, key=whose[event.handle, event.first_token])
            post(event)

        begin(self, sock, key, post_for, *rest)
        self._claims = claims

    def claim_weakly(
        self: receiver.StreamReceiver, handle: int, first_token: int, *rest: Any
    ) -> None:
        whose[handle, first_token] = self._key
        claim(self, handle, first_token, *rest)

    replace(receiver.StreamReceiver, "__init__", begin_weakly)
    replace(receiver.StreamReceiver, "claim", claim_weakly)


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


def short_data_handshakes() -> None:
    """The scene: handshakes on the data port have a second."""
    replace(listener, "HANDSHAKE_S", 1.0)


def drops_have_time() -> None:
    """The deadline of a handshake begins anew with every byte."""
    short_data_handshakes()

    def receive(sock: Any, size: int, _until_s: float) -> bytes:
        data = b""
        sock.settimeout(listener.HANDSHAKE_S)
        while len(data) < size:
            data += sock.recv(size - len(data)) or b"x" * size
        return data

    def shaken(context: Any, sock: Any, _until_s: float, *, server_side: bool) -> Any:
        one = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
        one.settimeout(0)
        while True:
            try:
                one.do_handshake()
                return one
            except ssl.SSLWantReadError:
                if not select.select([one], [], [], listener.HANDSHAKE_S)[0]:
                    one.close()
                    raise TimeoutError from None

    replace(listener, "_receive", receive)
    replace(tls, "_shaken", shaken)


def no_bound_on_handshakes() -> None:
    """Any number of connections to the data port may be in their handshake."""
    replace(listener.Listener, "_over", lambda _self, _host: None)


def one_host_has_all() -> None:
    """All of those that there may be at once may come from one host."""
    replace(listener, "HANDSHAKES_OF_ONE", listener.HANDSHAKES_MAX)


def any_certificate_will_do() -> None:
    """The sink shows its ticket to whoever shakes hands."""

    def connect_tls(sock: Any, _sha256: bytes, until_s: float) -> Any:
        return tls._shaken(tls._client_context(), sock, until_s, server_side=False)

    replace(listener, "connect_tls", connect_tls)


def encryption_may_differ() -> None:
    """A daemon that encrypts gives tickets to those that do not, too."""
    plain = ways.choose

    def choose(sink: Any, source: Any) -> Any:
        same = {"payload_encryption": source.payload_encryption}
        return plain(sink.model_copy(update=same), source)

    replace(source_desk, "choose", choose)


def files_are_open() -> None:
    """What the daemon makes has the modes that a careless program gives it."""
    os.umask(0)
    replace(os, "umask", lambda _mask: 0)
    opened, made = os.open, Path.mkdir

    def open_file(path: str, flags: int, _mode: int = 0, **more: Any) -> int:
        return opened(path, flags, 0o666, **more)

    def mkdir(path: Path, mode: int = 0, parents: bool = False, exist_ok: bool = False) -> None:
        del mode
        made(path, 0o777, parents, exist_ok)

    replace(os, "open", open_file)
    replace(os, "fchmod", lambda _descriptor, _mode: None)
    replace(Path, "mkdir", mkdir)
    replace(Path, "chmod", lambda _path, _mode: None)


def audit_shares_the_log() -> None:
    """Lines of the audit log wait among all the others."""
    replace(logs.WriterThread, "_of", lambda self, _record: self.other)


def audit_tells_all() -> None:
    """Every deed has its line, however many there are."""
    replace(audit, "LINES_A_S", 1 << 30)


def level_silences_audit() -> None:
    """The audit log is a log like all others."""
    plain = logs.begin

    def begin(level: str, form: logs.Format) -> None:
        plain(level, form)
        logging.getLogger(logs.AUDIT).setLevel(logging.NOTSET)

    replace(logs, "begin", begin)


def refusals_tell_the_call() -> None:
    """The audit log has the whole of a call that was refused, as is handy for who looks for faults."""
    plain = WorkerDesk._note_refused

    def note(self: WorkerDesk, user: str, call: Any, error: FerryError) -> None:
        plain(self, user, call, FerryError(error.code, repr(call)))

    replace(WorkerDesk, "_note_refused", note)
    replace(deeds, "WHY_MAX", 1 << 30)


def differences_are_shown() -> None:
    """Whoever says something else than before is told both, as is handy for who looks for faults."""
    for one in (openings, readiness):
        replace(one, "difference", lambda before, now: f"aux was {before}, now {now}")


def words_are_lines() -> None:
    """Words of workers go into the log as they are."""
    replace(logs, "plain", lambda words: words)


def no_rates() -> None:
    """Everybody may send as much as they like."""
    replace(Allowances, "wait_s", lambda _self, _name, _now_s: 0.0)
    replace(Allowances, "owe", lambda _self, _name, _more: None)


def no_gate() -> None:
    """Everybody may have as many connections as they like."""
    replace(Crowd, "arrived", lambda _self, _number, _source, _now_s: "")


def no_pressure() -> None:
    """Memory may grow."""
    replace(Pressure, "_relieve", lambda _self, _grown_bytes: True)


def msgpack_as_it_is() -> None:
    """Frames may hold whatever msgpack lets through."""
    replace(codec, "_unpacked", lambda frame: msgpack.unpackb(frame, strict_map_key=False))


def frames_of_any_size() -> None:
    """A frame may be as long as it likes."""
    options(zmq.MAXMSGSIZE, -1)


def any_number_of_frames() -> None:
    """A message may have as many frames as it likes."""
    replace(zmq_link, "FRAMES_MAX", 1 << 30)


def streams_are_free() -> None:
    """A data stream may have many connections at once, and a peer as many as it likes."""
    replace(sink_streams, "OF_ONE_MAX", 1 << 30)
    plain = sink_streams.SinkStreams.came

    def came(self: sink_streams.SinkStreams, key: StreamKey, whose: str) -> bool:
        plain(self, key, whose)
        return True

    replace(sink_streams.SinkStreams, "came", came)
    replace(sink_streams.SinkStreams, "before", lambda _self, _key: [])

    def admit(self: Streams, effect: Admit) -> None:
        self.listener.admit(effect.ticket, (effect.key, effect.transport), sink_streams.TICKET_S)

    replace(Streams, "admit", admit)


def wants_are_queued() -> None:
    """What is wanted on a connection that is not open reaches the transfer."""
    replace(SourceDesk, "_servable", lambda _self, _sink, pulls: pulls)
    replace(source, "READING_MAX", 1 << 30)


def anybody_ends_sources() -> None:
    """Whoever says that a transfer has arrived is believed, if nobody else has pulled it."""

    def may_end(_self: SourceDesk, transfer: Any, sink: Any, _state: Any) -> bool:
        return transfer.sink_daemon in (None, sink.daemon_id)

    replace(SourceDesk, "_may_end", may_end)


def answers_are_made_whole() -> None:
    """An answer has all that was asked for, as often as it was; how large it is is seen then."""
    replace(worker_desk, "once_each", lambda asked: asked)
    replace(worker_desk, "check_fits", lambda _answer, _room_bytes=0: None)


def every_pull_is_answered() -> None:
    """As often as a transfer is pulled in one message."""

    def say(self: SourceDesk, sink: str, progress: peer.Progress) -> None:
        told = self._progresses.setdefault(sink, {})
        told[str(len(told)), 0] = progress

    replace(SourceDesk, "say_progress", say)


def ended_ones_keep_their_aux() -> None:
    """What is remembered of a transfer that is over has all that it had."""
    replace(tombstones, "without_aux", lambda snapshot: snapshot)
    replace(Opened, "by", lambda call, pool_id: Opened(call, None, pool_id))


def aux_is_not_counted() -> None:
    """Live transfers may have as many aux values as they like."""
    replace(AuxBooks, "check", lambda _self, _opening, _aux: None)


def dear_requests() -> None:
    """The scene: a host has a twentieth of the loop's time, which any machine's requests are over."""
    replace(door, "SHARE_S", door.SHARE_S / 5)


def open_http() -> None:
    """As many connections by HTTP as anybody likes, for as long as he likes."""
    replace(door.HttpDoor, "__call__", lambda self: self._server())
    replace(door.HttpDoor, "answer", lambda _self, request, handler: handler(request))


def any_host() -> None:
    """By HTTP the daemon answers under whatever name it is asked."""
    replace(door, "is_ours", lambda _said, _host: True)


def handshakes_last() -> None:
    """A handshake may take as long as it likes, and there is no other bound."""
    options(zmq.HANDSHAKE_IVL, 0)


def handover() -> None:
    """Who connects under a routing id that is in use has it, and the session with it."""
    routes_are_trusted()
    options(zmq.ROUTER_HANDOVER, 1)


def options(option: int, value: int) -> None:
    """Set something else on every socket that listens."""
    plain = zmq_link.make_socket

    def make_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
        socket = plain(context, kind)
        if kind == zmq.ROUTER:
            socket.setsockopt(option, value)
        return socket

    replace(zmq_link, "make_socket", make_socket)
    replace(daemon, "make_socket", make_socket)


def replace(owner: Any, name: str, weak: Any) -> None:
    """Put the weak one in place, where there was one before."""
    assert name in vars(owner), f"{owner} has no {name} any more"
    setattr(owner, name, weak)


WEAK: dict[str, Callable[[], None]] = {
    one.__name__: one
    for one in (
        anybody_connects,
        anybody_operates,
        secret_is_enough,
        routes_are_trusted,
        transfers_are_everybodys,
        anybody_retries,
        no_zeroing,
        all_is_served,
        pools_are_the_groups,
        tenants_meet,
        any_key_will_do,
        trust_lasts,
        connections_outlive_trust,
        peers_say_who_they_are,
        refused_sinks_hear_all,
        addresses_prove_nothing,
        clear_text_anywhere,
        open_keys_will_do,
        links_are_not_counted,
        no_doors,
        nobody_at_the_doors,
        bare_curve,
        doors_fail_once,
        handler_is_pyzmqs,
        faulty_pyzmqs_handler,
        no_flock,
        files_are_replaced,
        any_ticket_will_do,
        tickets_last,
        older_tickets_stay,
        any_connection_will_do,
        claims_are_everybodys,
        any_source_tells,
        short_data_handshakes,
        drops_have_time,
        no_bound_on_handshakes,
        one_host_has_all,
        any_certificate_will_do,
        encryption_may_differ,
        files_are_open,
        audit_shares_the_log,
        audit_tells_all,
        level_silences_audit,
        refusals_tell_the_call,
        differences_are_shown,
        words_are_lines,
        no_rates,
        no_gate,
        no_pressure,
        msgpack_as_it_is,
        frames_of_any_size,
        any_number_of_frames,
        streams_are_free,
        wants_are_queued,
        anybody_ends_sources,
        answers_are_made_whole,
        every_pull_is_answered,
        ended_ones_keep_their_aux,
        aux_is_not_counted,
        dear_requests,
        open_http,
        any_host,
        handshakes_last,
        handover,
    )
}

if __name__ == "__main__":
    WEAK[sys.argv.pop(1)]()
    main()
