"""The sockets that listen: each is made with its gate, has its door, and is bound."""

import logging
from collections.abc import Callable
from pathlib import Path

import zmq

from kvferry_daemon.access import Access
from kvferry_daemon.core.crowd import Crowd
from kvferry_daemon.keys import Keys
from kvferry_daemon.links.curve import prove_ourselves
from kvferry_daemon.links.gate import Gate, bounds_of
from kvferry_daemon.links.zap import (
    CONTROL,
    PEER,
    WORKER,
    Door,
    Doorkeeper,
    LocalDoor,
    PeerDoor,
    guard,
)
from kvferry_daemon.links.zmq_link import make_socket

SOCKETS_MAX = 4096
log = logging.getLogger(__name__)


class Sockets:
    """The context that all sockets are of, who may connect to ours, and how many."""

    def __init__(
        self,
        access: Access,
        keys: Keys | None,
        connections_max: int,
        on_refused: Callable[[], None],
    ) -> None:
        """Take the descriptors that there may be. Nobody can connect before a socket is bound."""
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)  # before the first one
        doors: dict[str, Door] = {
            WORKER: LocalDoor(access.workers),
            CONTROL: LocalDoor(access.readers),
        }
        if keys is not None:
            doors[PEER] = PeerDoor(keys.name_of)
        self.doorkeeper = Doorkeeper(self.context, doors, on_refused)
        self.gates: dict[str, Gate] = {}
        self._bounds = bounds_of(connections_max)
        self.peer = self._gated(PEER) if keys is None else self._guarded(PEER)
        if keys is not None:
            prove_ourselves(self.peer, keys.secret)

    def bind_peer(self, host: str, port: int, earlier_port: int) -> int:
        """Bind the configured port, else the earlier life's, where peers look for us; return it.

        0: there is none. Raises zmq.ZMQError.
        """
        if ":" in host:
            self.peer.setsockopt(zmq.IPV6, 1)
        at = f"tcp://{bracketed(host)}"
        wanted = port or earlier_port
        try:
            self.peer.bind(f"{at}:{wanted or '*'}")
        except zmq.ZMQError as error:
            if port or not wanted or error.errno != zmq.EADDRINUSE:
                raise
            log.warning("port %d of the earlier life is taken; its peers will not find us", wanted)
            self.peer.bind(f"{at}:*")
        bound = self.peer.getsockopt_string(zmq.LAST_ENDPOINT)
        return int(bound.rpartition(":")[2])

    def bind_local(self, path: Path, domain: str) -> zmq.Socket[bytes]:
        """A socket for processes of this machine; zmq.ZMQError."""
        socket = self._guarded(domain)
        socket.bind(f"ipc://{path}")
        return socket

    def close_gates(self) -> None:
        """After the sockets have closed."""
        for gate in self.gates.values():
            gate.close()

    def _guarded(self, domain: str) -> zmq.Socket[bytes]:
        socket = self._gated(domain)
        guard(socket, domain)
        return socket

    def _gated(self, domain: str) -> zmq.Socket[bytes]:
        socket = make_socket(self.context, zmq.ROUTER)
        self.gates[domain] = Gate(socket, domain, Crowd(self._bounds[domain]))
        return socket


def bracketed(host: str) -> str:
    """A host as it stands before a port."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
