"""ZMTP 3.0 spoken by hand: libzmq itself does not send half of a message."""

import socket
from pathlib import Path

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4
WAIT_S = 15


def frame(body: bytes, flags: int) -> bytes:
    """A frame as it is on the wire."""
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return bytes((flags | LONG,)) + len(body).to_bytes(8, "big") + body


def joined(address: str) -> socket.socket:
    """A connection to a ROUTER, past its handshake (NULL); OSError if it was cut."""
    if address.startswith("tcp://"):
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        one = socket.create_connection((host, int(port)))
    else:
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(Path(address.removeprefix("ipc://"))))
    one.settimeout(WAIT_S)
    try:
        shake_hands(one, b"DEALER")
    except OSError:
        one.close()
        raise
    return one


def shake_hands(one: socket.socket, kind: bytes) -> None:
    """Say who we are and hear who the other side is; OSError if it was cut."""
    one.sendall(GREETING)
    name = b"Socket-Type"
    ready = b"\x05READY" + bytes((len(name),)) + name + len(kind).to_bytes(4, "big") + kind
    one.sendall(frame(ready, COMMAND))
    taken = b""
    while len(taken) < len(GREETING) + 2 or len(taken) < len(GREETING) + 2 + taken[65]:
        part = one.recv(1)  # and nothing of what comes behind it
        if not part:
            raise ConnectionResetError("cut in the handshake")
        taken += part


def read_frame(one: socket.socket) -> bytes:
    """The body of the next frame; OSError if it was cut."""
    flags = _read(one, 1)[0]
    size = int.from_bytes(_read(one, 8 if flags & LONG else 1), "big")
    return _read(one, size)


def _read(one: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = one.recv(size - len(data))
        if not part:
            raise ConnectionResetError("cut within a frame")
        data += part
    return data
