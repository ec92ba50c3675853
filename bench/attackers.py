"""One attack each, until somebody ends it: `python -m bench.attackers NAME DIRECTORY PEER DATA HTTP`.

Those at the control socket, by HTTP and by connections alone are here, the others by the door that
they come to: a worker's, a peer's, the data port, and a source's own.
"""

import sys
import time
from itertools import cycle, repeat
from pathlib import Path

from bench import attackers_data, attackers_peer, attackers_source, attackers_worker
from bench.doors import (
    AGAIN_S,
    KNOCK_S,
    MIB,
    Attack,
    Target,
    ask,
    connect_and_keep,
    knock,
    plain,
    pour,
)
from bench.zmtp import GREETING, MORE, WAIT_S, frame
from kvferry_proto import control


def endless_to_control(target: Target) -> None:
    """One message that has no end, of an operator."""
    pour(target.control, repeat(frame(bytes(MIB), MORE)))


def operator(target: Target) -> None:
    """Questions of an operator without a pause, who takes the answers."""
    questions: tuple[control.Request, ...] = (
        control.GetStatus(),
        control.GetTransfers(),
        control.Explain(transfer_id="bystander-0"),
    )
    ask(target.control, cycle([control.REQUESTS.encode(one) for one in questions]))


def unread(target: Target) -> None:
    """Questions of an operator who never reads an answer."""
    question = frame(control.REQUESTS.encode(control.GetTransfers()), 0)
    pour(target.control, repeat(question * 100))


def half_open_to_worker(target: Target) -> None:
    """Connections that never begin their handshake."""
    connect_and_keep(target, 0)


def half_open_to_peer(target: Target) -> None:
    """The same from the network."""
    connect_and_keep(target, target.peer_port)


def drops_to_peer(target: Target) -> None:
    """A greeting of one byte a second, on as many connections as there are to be had."""
    connect_and_keep(target, target.peer_port, drip=GREETING)


def half_open_to_data(target: Target) -> None:
    """Data connections that never show a ticket."""
    connect_and_keep(target, target.data_port)


def half_open_to_http(target: Target) -> None:
    """HTTP connections that never ask."""
    connect_and_keep(target, target.http_port)


def connects_to_worker(target: Target) -> None:
    """Connect and close without a pause."""
    knock(target, 0)


def connects_to_peer(target: Target) -> None:
    """The same from the network."""
    knock(target, target.peer_port)


def connects_to_data(target: Target) -> None:
    """The same, where a ticket has to be shown."""
    knock(target, target.data_port)


def connects_to_http(target: Target) -> None:
    """The same by HTTP."""
    knock(target, target.http_port)


def http_requests(target: Target) -> None:
    """Metrics, without a pause."""
    while True:
        try:
            with plain(target, target.http_port, KNOCK_S) as one:
                one.settimeout(WAIT_S)
                one.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
                one.recv(1 << 16)
        except OSError:
            time.sleep(AGAIN_S)


OURS: tuple[Attack, ...] = (
    endless_to_control,
    operator,
    unread,
    half_open_to_worker,
    half_open_to_peer,
    drops_to_peer,
    half_open_to_data,
    half_open_to_http,
    connects_to_worker,
    connects_to_peer,
    connects_to_data,
    connects_to_http,
    http_requests,
)
ATTACKS: dict[str, Attack] = {
    one.__name__: one
    for one in (
        *attackers_worker.ATTACKS,
        *attackers_peer.ATTACKS,
        *attackers_source.ATTACKS,
        *attackers_data.ATTACKS,
        *OURS,
    )
}

if __name__ == "__main__":
    name, directory, peer, data_port, http_port = sys.argv[1:]
    attack = ATTACKS[name]
    print("begun", flush=True)
    attack(Target(Path(directory), peer, int(data_port), int(http_port)))
