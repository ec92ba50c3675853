"""CURVE on a socket: what is said is encrypted, and each end proves that it has its key."""

import zmq
from zmq.utils import z85


def prove_ourselves(socket: zmq.Socket[bytes], secret: bytes) -> None:
    """Let only those connect who know our public key; who they are is the doorkeeper's to ask."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def prove_peer(socket: zmq.Socket[bytes], key: str, secret: bytes) -> None:
    """Connect only to who has the secret of this public key; show him ours."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, bytes.fromhex(key))
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, z85.decode(zmq.curve_public(z85.encode(secret))))
