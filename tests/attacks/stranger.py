"""A process of another user: `python stranger.py UID:GID ACT DIRECTORY ...`; prints what it was told.

It becomes that user only after its imports, which lie where that user may not read.
"""

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import numpy
import zmq

from kvferry_client import FerryError, connect, session
from kvferry_client.session import Lock
from kvferry_daemon import operator
from kvferry_proto import control, peer, worker
from kvferry_proto.states import Role
from live import BLOCK, BOOT_ID, LAYOUT, RawPeer, RawWorker

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


def crowd(directory: Path, count: str) -> str:
    """Say hello again and again; tell how often that was one more session, and live until ended."""
    locks = [Lock(directory) for _ in range(int(count))]
    with RawWorker(directory, hello=False) as raw:
        calls = [worker.CALLS.encode(worker.Hello(lock=one.name, layout=LAYOUT)) for one in locks]
        answers = [told(raw.socket, call) for call in calls]
        print(f"{answers.count('welcome')} welcome", flush=True)
        signal.pause()
    return NOTHING


def beat(directory: Path) -> str:
    """Be a worker that asks for nothing, and says so until it is ended."""
    with RawWorker(directory) as raw:
        print("joined", flush=True)
        while told(raw.socket, worker.CALLS.encode(worker.Heartbeat())) == "snapshots":
            pass
    return NOTHING


def hold(directory: Path) -> str:
    """Make a lock file as the client does, and hold it until we are ended."""
    print(Lock(directory).name, flush=True)
    signal.pause()
    return NOTHING


def map_all(directory: Path) -> str:
    """Be a worker as the client makes one, with its pool and board mapped."""
    with connect(directory, LAYOUT, "stranger") as client:
        assert client.board_trouble is None, client.board_trouble
        return f"{client.welcome.pool.blocks} blocks"


def take_up(directory: Path, secret: str, lock: str) -> str:
    """Say hello with another worker's secret, and under its lock."""
    with RawWorker(directory, hello=False) as raw:
        call = worker.Hello(lock=lock, layout=LAYOUT, session=secret)
        return told(raw.socket, worker.CALLS.encode(call))


def search(directory: Path, secret: str) -> str:
    """Join, then look for bytes in every pool that can be opened, our own first."""
    with RawWorker(directory) as raw:
        assert raw.welcome is not None
        for path in (Path(raw.welcome.pool.path), *directory.glob("pools/*")):
            with contextlib.suppress(PermissionError):
                if bytes.fromhex(secret) in path.read_bytes():
                    return "seen"
    return "not seen"


def keep(directory: Path, transfer_id: str, secret: str) -> str:
    """Open a transfer, write bytes into its window, mark them ready, and live until we are ended."""
    with RawWorker(directory) as raw:
        raw.snapshot(worker.Send(transfer_id=transfer_id, total_tokens=BLOCK))
        seen = raw.wait_for(Role.SOURCE, lambda s: s.allocated_tokens > 0, transfer_id)
        block = bytes.fromhex(secret).ljust(LAYOUT.block_bytes, b"\0")
        raw.write_block(seen.runs[0][0], block)
        raw.snapshot(worker.Ready(transfer_id=transfer_id, ready_tokens=BLOCK))
        print("kept", flush=True)
        signal.pause()
    return NOTHING


def receive(directory: Path, transfer_id: str, secret: str, source: str = "") -> str:
    """Receive a transfer, say so once it is open, and tell whether its bytes came or why not."""
    with RawWorker(directory) as raw:
        answer = raw.call(worker.Receive(transfer_id=transfer_id, source=source or None))
        if isinstance(answer, worker.Failure):
            return str(answer.error.code)
        print("open", flush=True)
        seen = raw.wait_end(Role.SINK, transfer_id)
        if seen.error is not None:
            return str(seen.error.code)
        return "seen" if bytes.fromhex(secret) in raw.block(seen.runs[0][0]) else "not seen"


def cut(pool: Path) -> str:
    """Cut a pool's file short, as whoever may write it can."""
    os.truncate(pool, 0)
    return "cut"


def pull(_directory: Path, address: str, transfer_id: str) -> str:
    """Go by a daemon that has no key, and pull; how many tokens there are to have."""
    one = RawPeer(address)
    hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
    one.socket.send(peer.MESSAGES.encode(hello))
    if not one.socket.poll(PATIENCE_MS):
        return NOTHING
    one.source = one.next().boot_id
    return f"{one.pull(transfer_id=transfer_id).available_tokens} tokens"


def write(directory: Path, secret: str, defence: str) -> str:
    """Be a worker that sends, by the client; ``defence``: whether it looks whose directory it is."""
    if defence == "off":
        vars(session)["check_runtime_dir"] = lambda _path: None
    try:
        with connect(directory, LAYOUT, "victim") as client:
            rows = numpy.frombuffer(bytes.fromhex(secret), numpy.int32).reshape(1, 8)
            client.send("t").fill(0, {"kv": rows, "ids": numpy.zeros(1, numpy.int64)})
    except FerryError as error:
        return str(error.code)
    return "written"


def asks(directory: Path) -> str:
    """Ask what operators ask, as the command line does."""
    try:
        return str(operator.ask(directory, control.GetStatus()).kind)
    except FerryError as error:
        return str(error.code)


def reach(directory: Path) -> str:
    """Which sockets take a connection, whatever becomes of it."""
    found = []
    for path in sorted(directory.glob("*.sock")):
        with contextlib.suppress(PermissionError), socket.socket(socket.AF_UNIX) as one:
            one.connect(str(path))
            found.append(path.name)
    return " ".join(found)


def retry(directory: Path, transfer_id: str, attempt: str) -> str:
    """Send under another worker's id, as if it were to be tried again."""
    with RawWorker(directory) as raw:
        call = worker.Send(transfer_id=transfer_id, attempt=int(attempt))
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
    return asked(directory, control.GetStatus())


def drain(directory: Path) -> str:
    """Change something, as operators do."""
    return asked(directory, control.SetDraining(draining=True))


def abort(directory: Path, transfer_id: str) -> str:
    """End a transfer, as operators do."""
    return asked(directory, control.AbortTransfer(transfer_id=transfer_id))


def silence(directory: Path) -> str:
    """Have the daemon write errors only, as operators may."""
    return asked(directory, control.SetLogLevel(level="error"))


def files(directory: Path) -> str:
    """Try to open, for reading, what there is, and to list what the directories have."""
    found = []
    for path in (*directory.glob("*"), *directory.glob("pools/*"), *directory.glob("workers/*")):
        if path.is_file():
            with contextlib.suppress(PermissionError), path.open("rb"):
                found.append(path.name if len(path.stem) < 32 else f"pool{path.suffix}")
    return " ".join(sorted(found))


def read(path: Path) -> str:
    """What is in a file."""
    return path.read_text()


def asked(directory: Path, request: control.Request) -> str:
    """The kind of the answer, or the code of a failure."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{directory / 'control.sock'}")
        socket.send(control.REQUESTS.encode(request))
        if not socket.poll(PATIENCE_MS):
            return NOTHING
        answer = control.ANSWERS.decode(socket.recv())
        return str(answer.error.code) if hasattr(answer, "error") else answer.kind


if __name__ == "__main__":
    user, act, directory, *more = sys.argv[1:]
    uid, gid = user.split(":")
    if os.getuid() == 0:  # nobody else can become another one
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    workers = (hello, crowd, beat, hold, map_all, take_up, squat, search, keep, receive, retry)
    clients = (cut, pull, write, asks)
    can = (*workers, *clients, status, drain, abort, silence, files, read, reach)
    acts = {one.__name__: one for one in can}
    print(acts[act](Path(directory), *more))
