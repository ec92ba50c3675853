"""A process of another user: `python stranger.py UID ACT DIRECTORY ...`; prints what it was told.

It becomes that user only after its imports, which lie where that user may not read.
"""

import os
import sys
from pathlib import Path

import zmq

from kvferry_proto import control, worker
from live import LAYOUT, RawWorker

PATIENCE_MS = 2000
NOTHING = "nothing"


def told(socket: zmq.Socket[bytes], *frames: bytes) -> str:
    """The kind of the answer, or the code of a failure."""
    socket.send_multipart(frames)
    if not socket.poll(PATIENCE_MS):
        return NOTHING
    reply = worker.REPLIES.decode(socket.recv())
    return str(reply.error.code) if isinstance(reply, worker.Failure) else reply.kind


def hello(directory: Path) -> str:
    """Join as a worker."""
    with RawWorker(directory, hello=False) as raw:
        return told(
            raw.socket, worker.CALLS.encode(worker.Hello(lock=raw.lock_name, layout=LAYOUT))
        )


def take_up(directory: Path, secret: str, lock: str) -> str:
    """Say hello with another worker's secret, and under its lock."""
    with RawWorker(directory, hello=False) as raw:
        call = worker.Hello(lock=lock, layout=LAYOUT, session=secret)
        return told(raw.socket, worker.CALLS.encode(call))


def squat(directory: Path, route: str) -> str:
    """Take a routing id over whose connection has gone, and call without a hello."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTING_ID, bytes.fromhex(route))
        socket.connect(f"ipc://{directory / 'worker.sock'}")
        return told(socket, worker.CALLS.encode(worker.Heartbeat()))


def status(directory: Path) -> str:
    """Ask what operators ask."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{directory / 'control.sock'}")
        socket.send(control.REQUESTS.encode(control.GetStatus()))
        return control.ANSWERS.decode(socket.recv()).kind if socket.poll(PATIENCE_MS) else NOTHING


if __name__ == "__main__":
    uid, act, directory, *more = sys.argv[1:]
    os.setgid(int(uid))
    os.setuid(int(uid))
    acts = {one.__name__: one for one in (hello, take_up, squat, status)}
    print(acts[act](Path(directory), *more))
