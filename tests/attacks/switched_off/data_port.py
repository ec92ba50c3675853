"""The port for bytes: tickets, handshakes, encryption, and whose a chunk is."""

import dataclasses
import select
import ssl
from typing import Any

from attacks.switched_off.replacing import replace
from kvferry_daemon.core import outside as out
from kvferry_daemon.core import sink_streams, source_desk, ways
from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.core.outside import Admit
from kvferry_daemon.streams import Streams
from kvferry_daemon.transports.tcp import events as te
from kvferry_daemon.transports.tcp import listener, receiver, tls


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


SWITCHES = (
    any_ticket_will_do,
    tickets_last,
    older_tickets_stay,
    any_connection_will_do,
    streams_are_free,
    claims_are_everybodys,
    short_data_handshakes,
    drops_have_time,
    no_bound_on_handshakes,
    one_host_has_all,
    any_certificate_will_do,
    encryption_may_differ,
)
