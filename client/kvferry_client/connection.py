"""A blocking connection to the daemon: calls, repeats, replies. One thread uses it at a time."""

import os
import threading
import time
from typing import Any

import zmq

from kvferry_client.session import (
    CALL_S,
    HELLO_S,
    JOINS_MAX,
    REPEAT_S,
    Member,
    Session,
    check_same_pool,
    is_refused,
    waits,
)
from kvferry_client.views import Pool
from kvferry_proto import worker
from kvferry_proto.codec import FRAME_BYTES_MAX
from kvferry_proto.errors import Code, FerryError


def tune(socket: Any) -> None:
    """The options of a worker's DEALER socket."""
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.MAXMSGSIZE, FRAME_BYTES_MAX),
        (zmq.RECONNECT_IVL, 20),
        (zmq.RECONNECT_IVL_MAX, 500),
        (zmq.HANDSHAKE_IVL, 2000),
    ):
        socket.setsockopt(option, value)


class Connection:
    """A DEALER socket of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pid = os.getpid()
        self._member: Member | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        tune(self._socket)
        self._socket.connect(session.address)

    def close(self) -> None:
        """Drop the connection; the session may live on in others."""
        if os.getpid() == self._pid:
            self._socket.close(linger=0)
            self._context.term()

    def call(self, call: Any, wait_s: float = CALL_S, pool: Pool | None = None) -> Any:
        """Make a call; repeat it until it is answered, at most ``wait_s`` long.

        Every call is safe to repeat. ``pool``: the one that the call's transfer was opened on.
        Raises FerryError: the daemon's refusal, daemon_unreachable, or daemon_restarted if the
        transfer's session is no more.
        """
        if os.getpid() != self._pid:
            raise FerryError(
                Code.CLIENT_CLOSED, "a client does not survive a fork; connect in the child"
            )
        for _ in range(JOINS_MAX):
            check_same_pool(self._member, pool)
            reply = self._exchange(call, wait_s)
            if not is_refused(reply, Code.HELLO_FIRST):
                break
            self.join()
        if isinstance(reply, worker.Failure):
            raise reply.error.raised()
        return reply

    def beat(self) -> None:
        """Say that the worker lives, in the session that its other connections have."""
        reply = self._exchange(worker.Heartbeat(), 2 * REPEAT_S)
        if is_refused(reply, Code.HELLO_FIRST):
            self.follow()

    @property
    def pool(self) -> Pool:
        """Of the session that the last call was made in."""
        assert self._member is not None, "no call was answered yet"
        return self._member.pool

    def join(self) -> Member:
        """Join the daemon, or take the session up again on this connection."""
        with self._session.joining:
            for _ in range(JOINS_MAX):
                hello = self._session.hello()
                reply = self._exchange(hello, HELLO_S if hello.session is None else CALL_S)
                self._member = self._session.take(reply, hello)
                if self._member is not None:
                    return self._member
            raise reply.error.raised()

    def follow(self) -> None:
        """Take up the session that another connection has; FerryError if there is none."""
        hello = self._session.hello()
        if hello.session is None:
            raise FerryError(Code.UNKNOWN_SESSION, "nobody has joined yet")
        reply = self._exchange(hello, CALL_S)
        if isinstance(reply, worker.Failure):
            self._session.refused(reply, hello)
            raise reply.error.raised()

    def _exchange(self, call: Any, wait_s: float) -> Any:
        number = self._session.next_number()
        frame = worker.CALLS.encode(call, number)
        held_s = getattr(call, "wait_s", 0.0)  # the daemon itself lets a poll wait
        for patience_s in waits(wait_s, held_s):
            self._send(frame)
            reply = self._await(number, time.monotonic() + patience_s)
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
        self._connection = Connection(session)
        self._beat_s = beat_s
        self._stopped = threading.Event()

    def run(self) -> None:
        """Beat until stopped; a daemon that is away is tried again at the next beat."""
        while not self._stopped.wait(self._beat_s):
            try:
                self._connection.beat()
            except FerryError:
                continue  # the worker's own calls tell it
        self._connection.close()

    def stop(self) -> None:
        """Stop beating."""
        self._stopped.set()
        self.join()
