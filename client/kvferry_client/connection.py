"""One worker's way to its daemon: the lock that proves it lives, the session, calls and replies."""

import fcntl
import itertools
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import zmq

from kvferry_proto import worker
from kvferry_proto.codec import FRAME_BYTES_MAX
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout

REPEAT_S = 1.0
CALL_S = 10.0
HELLO_S = 60.0  # the first hello with a layout allocates the pool


class Lock:
    """A flock on a file of the runtime directory: held exactly as long as blocks may be touched."""

    def __init__(self, runtime_dir: Path) -> None:
        """Create and lock the file; FerryError(daemon_unreachable) without a runtime directory."""
        self.name = secrets.token_hex(16)
        try:
            self._descriptor = os.open(
                runtime_dir / "workers" / self.name,
                os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
                0o600,
            )
        except OSError as error:
            raise FerryError(
                Code.DAEMON_UNREACHABLE, f"no daemon's runtime directory at {runtime_dir}: {error}"
            ) from error
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        """Say that this process touches no block any more. The daemon removes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Session:
    """What every connection of one worker shares."""

    def __init__(self, runtime_dir: Path, layout: Layout, name: str) -> None:
        self.runtime_dir = runtime_dir
        self.layout = layout
        self.name = name
        self.lock = Lock(runtime_dir)
        self.welcome: worker.Welcome | None = None
        self.joining = threading.Lock()  # one hello at a time, or there would be two sessions
        self.told_boot_id: str | None = None  # the life of the daemon that the worker knows of
        self._numbers = itertools.count(1)

    @property
    def socket_path(self) -> Path:
        """The daemon's worker socket."""
        return self.runtime_dir / "worker.sock"

    def next_number(self) -> int:
        """A call's number, which its answer echoes."""
        return next(self._numbers)

    def hello(self) -> worker.Hello:
        """The first call of a connection; it takes the session up if there is one."""
        return worker.Hello(
            worker=self.name,
            pid=os.getpid(),
            lock=self.lock.name,
            layout=self.layout,
            session=None if self.welcome is None else self.welcome.session,
        )

    def unreachable(self, waited_s: float) -> FerryError:
        """Nobody answered."""
        return FerryError(
            Code.DAEMON_UNREACHABLE, f"no answer at {self.socket_path} for {waited_s:g} s"
        )


class Connection:
    """A DEALER socket of one session. Threads may share it; each call takes it for itself."""

    def __init__(self, session: Session, *, tells: bool = True) -> None:
        """``tells``: whether this connection's calls are to tell of a daemon's restart."""
        self._session = session
        self._tells = tells
        self._pid = os.getpid()
        self._guard = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, FRAME_BYTES_MAX),
            (zmq.RECONNECT_IVL, 20),
            (zmq.RECONNECT_IVL_MAX, 500),
            (zmq.HANDSHAKE_IVL, 2000),
        ):
            self._socket.setsockopt(option, value)
        self._socket.connect(f"ipc://{session.socket_path}")

    def close(self) -> None:
        """Drop the connection; the session may live on in others."""
        if os.getpid() == self._pid:
            with self._guard:
                self._socket.close(linger=0)
                self._context.term()

    def call(self, call: Any, wait_s: float = CALL_S) -> Any:
        """Make a call; repeat it until it is answered, at most ``wait_s`` long.

        Every call is safe to repeat. Raises FerryError: the daemon's refusal, daemon_unreachable,
        or daemon_restarted if the daemon no longer knows the session.
        """
        if os.getpid() != self._pid:
            raise FerryError(
                Code.INTERNAL, "a client does not survive a fork; connect in the child"
            )
        with self._guard:
            reply = self._exchange(call, wait_s)
            if _is_refused(reply, Code.HELLO_FIRST):
                self._say_hello()
                reply = self._exchange(call, wait_s)
        if isinstance(reply, worker.Failure):
            raise reply.error.raised()
        return reply

    def hello(self) -> worker.Welcome:
        """Join the daemon, or take the session up again on this connection."""
        with self._guard:
            return self._say_hello()

    def _say_hello(self) -> worker.Welcome:
        with self._session.joining:
            return self._join(self._session)

    def _join(self, session: Session) -> worker.Welcome:
        reply = self._exchange(session.hello(), HELLO_S if session.welcome is None else CALL_S)
        if _is_refused(reply, Code.UNKNOWN_SESSION):
            session.welcome = None
            reply = self._exchange(session.hello(), HELLO_S)
        if isinstance(reply, worker.Failure):
            raise reply.error.raised()
        assert isinstance(reply, worker.Welcome), reply
        session.welcome = reply
        if self._tells:
            told, session.told_boot_id = session.told_boot_id, reply.boot_id
            if told not in (None, reply.boot_id):
                raise FerryError(
                    Code.DAEMON_RESTARTED, "the daemon's earlier life, its pool and transfers ended"
                )
        return reply

    def _exchange(self, call: Any, wait_s: float) -> Any:
        number = self._session.next_number()
        frame = worker.CALLS.encode(call, number)
        held_s = getattr(call, "wait_s", 0.0)  # the daemon itself lets a poll wait
        until_s = time.monotonic() + wait_s + held_s
        while time.monotonic() < until_s:
            self._send(frame)
            again_s = min(until_s, time.monotonic() + REPEAT_S + held_s)
            reply = self._await(number, again_s)
            if reply is not None:
                return reply
        raise self._session.unreachable(wait_s)

    def _send(self, frame: bytes) -> None:
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return  # the queue is full: the daemon is away; the next repeat may fare better

    def _await(self, number: int, until_s: float) -> Any:
        while (left_s := until_s - time.monotonic()) > 0:
            self._socket.rcvtimeo = max(1, int(left_s * 1000))  # cheaper than a poll before it
            try:
                frame = self._socket.recv()
            except zmq.Again:
                return None
            reply = worker.REPLIES.decode(frame)
            if reply.call == number:
                return reply  # others are late answers to calls that were repeated
        return None


class Heart(threading.Thread):
    """Beats on a connection of its own, so that a busy worker is not taken for a lost one."""

    def __init__(self, session: Session, beat_s: float) -> None:
        super().__init__(name="kvferry-heartbeat", daemon=True)
        self._connection = Connection(session, tells=False)
        self._beat_s = beat_s
        self._stopped = threading.Event()

    def run(self) -> None:
        """Beat until stopped; a daemon that is away is tried again at the next beat."""
        while not self._stopped.wait(self._beat_s):
            try:
                self._connection.call(worker.Heartbeat(), wait_s=REPEAT_S)
            except FerryError:
                continue  # the worker's own calls tell it
        self._connection.close()

    def stop(self) -> None:
        """Stop beating."""
        self._stopped.set()
        self.join()


def _is_refused(reply: Any, code: Code) -> bool:
    return isinstance(reply, worker.Failure) and reply.error.code == code
