"""Who may connect to a ZeroMQ socket, how many, how much they may send, and what a frame may be."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgpack
import zmq
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils import z85

from attacks.switched_off.replacing import replace
from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.crowd import Crowd
from kvferry_daemon.keys import Keys
from kvferry_daemon.links import sockets, zap, zmq_link
from kvferry_daemon.links.pressure import Pressure
from kvferry_proto import codec


def no_doors() -> None:
    """Sockets have no domain, so libzmq asks nobody who may connect."""
    replace(sockets, "guard", lambda _socket, _domain: None)
    plain = zmq_link.ZmqLink.__init__

    def begin(self: zmq_link.ZmqLink, *args: Any, names_users: bool = False, **more: Any) -> None:
        plain(self, *args, **more)  # nobody has said who they are

    replace(zmq_link.ZmqLink, "__init__", begin)
    replace(Keys, "name_of", lambda _self, _key: "somebody")


def nobody_at_the_doors() -> None:
    """The scene: the handler that libzmq asks is not there."""
    nobody = SimpleNamespace(close=lambda: None)
    replace(sockets, "Doorkeeper", lambda _context, _doors, _on_refused: nobody)


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
    replace(sockets, "Doorkeeper", Authenticator)


def faulty_pyzmqs_handler() -> None:
    """And a fault meets it."""
    doors_fail_once()
    handler_is_pyzmqs()


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


def no_pressure_and_no_rates() -> None:
    """Memory may grow, by as many answers as somebody likes."""
    no_pressure()
    no_rates()


def msgpack_as_it_is() -> None:
    """Frames may hold whatever msgpack lets through."""
    replace(codec, "_unpacked", lambda frame: msgpack.unpackb(frame, strict_map_key=False))


def frames_of_any_size() -> None:
    """A frame may be as long as it likes."""
    options(zmq.MAXMSGSIZE, -1)


def any_number_of_frames() -> None:
    """A message may have as many frames as it likes."""
    replace(zmq_link, "FRAMES_MAX", 1 << 30)


def handshakes_last() -> None:
    """A handshake may take as long as it likes, and there is no other bound."""
    options(zmq.HANDSHAKE_IVL, 0)


def options(option: int, value: int) -> None:
    """Set something else on every socket that listens."""
    plain = zmq_link.make_socket

    def make_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
        socket = plain(context, kind)
        if kind == zmq.ROUTER:
            socket.setsockopt(option, value)
        return socket

    replace(zmq_link, "make_socket", make_socket)
    replace(sockets, "make_socket", make_socket)


SWITCHES = (
    no_doors,
    nobody_at_the_doors,
    bare_curve,
    doors_fail_once,
    handler_is_pyzmqs,
    faulty_pyzmqs_handler,
    no_rates,
    no_gate,
    no_pressure,
    no_pressure_and_no_rates,
    msgpack_as_it_is,
    frames_of_any_size,
    any_number_of_frames,
    handshakes_last,
)
