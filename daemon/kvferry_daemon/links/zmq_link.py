"""One ZeroMQ socket on the event loop, drained on its file descriptor.

The descriptor is edge-triggered: after every send and receive EVENTS has to be looked at again,
or the socket falls silent. (Measured faster than zmq.asyncio: fewer tasks a message.)
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from collections.abc import Set as AbstractSet
from time import monotonic
from typing import Any

import zmq

from kvferry_proto.codec import FRAME_BYTES_MAX

TURN_S = 0.001  # of messages in one go; then other sockets and timers get their turn
SILENT_S = 1  # then the kernel asks the other one's kernel
UNHEARD_MS = 3000  # bytes that it has not confirmed for so long end the connection
NOW = int(zmq.NOBLOCK)  # numbers: to combine two of libzmq's enums costs more than to send
NOW_AND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
# The property of a message that the doorkeeper's answer set; as bytes, or it is encoded each time.
USER: Any = b"User-Id"
FROM: Any = b"__fd"  # the descriptor of the connection that it came by
ADDRESS: Any = b"Peer-Address"
LARGE_BYTES = 1 << 10  # some ten calls: what is longer can take milliseconds
QUEUED_MAX = 64  # messages of a connection that we have not read: then its sender is held up
FRAMES_MAX = 16  # ours have two, the route included; what libzmq asks the doorkeeper has nine


class Heard:
    """Who has sent messages by a link, and what was sent: by route, if it is a ROUTER's."""

    def __init__(self) -> None:
        self.senders: dict[bytes, int] = {}  # descriptors of their connections
        self.told: Counter[bytes] = Counter()  # bytes

    def told_to(self) -> dict[int, int]:
        """Bytes by descriptor, of those who have asked meanwhile; the loop may go on counting."""
        return {one: self.told[route] for route, one in list(self.senders.items())}


class ZmqLink:
    """Hands whole messages to ``on_message(frames)``; never blocks."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_message: Callable[[list[bytes]], None],
        *,
        names_users: bool = False,
        throw_out: Callable[[int, str], None] | None = None,
        is_unwanted: Callable[[bytes, str], bool] | None = None,
        cut_off: AbstractSet[int] = frozenset(),
    ) -> None:
        """``names_users``: the socket is guarded; see ``user``.

        ``is_unwanted`` is asked of each large message, by its route and user, before it is copied: one
        that is unwanted costs the loop ten microseconds, so what comes in is not faster than we are.

        ``cut_off``: descriptors of connections that were cut. libzmq goes on with one, and keeps its
        answers, until all is read that has come by it, so that is dropped; a queue's worth of it may
        still be read once the number is free again.

        ``throw_out`` is told the descriptor of a connection that sends messages of no end, and the
        address of whoever opened it: it may have ended by then.
        """
        self._socket = socket
        self._names_users = names_users
        self.user = ""  # who sent the message that is being handed over, as the doorkeeper knows it
        self._on_message = on_message
        self._throw_out = throw_out
        self._is_unwanted = is_unwanted
        self._cut_off = cut_off
        self._skipping = False  # the rest of a message that has far too many frames
        self.heard: Heard | None = None  # while somebody wants to know
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._is_drain_due = False
        self._draining = False
        self._closed = False
        self.messages = self.turns = 0  # received, and turns that brought some
        self.dropped = 0  # messages that could not be sent: the peer is gone or does not read
        self._loop.add_reader(self._descriptor, self._drain)
        self._drain_soon()

    def send(self, *frames: bytes) -> bool:
        """Send one message if it can be sent now; the protocol repeats what is lost."""
        try:
            for frame in frames[:-1]:
                self._socket.send(frame, NOW_AND_MORE)
            self._socket.send(frames[-1], NOW)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.dropped += 1
            return False
        finally:
            self._drain_soon()
        heard = self.heard
        if heard is not None:
            heard.told[frames[0] if len(frames) > 1 else b""] += len(frames[-1])
        return True

    def close(self) -> None:
        """Stop reading and close; unsent messages are dropped."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._descriptor)
            self._socket.close(linger=0)

    def _drain_soon(self) -> None:
        if not self._is_drain_due and not self._draining and not self._closed:
            self._is_drain_due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._is_drain_due = False
        self._draining = True  # a send from within needs no drain of its own: we look again below
        is_empty = False
        until_s = monotonic() + TURN_S  # the loop's own clock stands still within a turn
        before = self.messages
        try:
            while not self._closed:
                try:
                    frames = self._received()
                except zmq.Again:
                    is_empty = True
                    return
                if frames:
                    self.messages += 1
                    self._on_message(frames)
                if monotonic() >= until_s:
                    return
        finally:
            self._draining = False
            self.turns += self.messages > before
            if not is_empty:  # there may be more, also behind a message that raised
                self._drain_soon()

    def _received(self) -> list[bytes]:
        """One message: the frames of a message are there together. Nothing: some were skipped."""
        if self._skipping:
            return self._skip()
        frame = self._socket.recv(NOW, copy=False)
        frames = [frame]
        while frame.more and len(frames) < FRAMES_MAX:
            frame = self._socket.recv(NOW, copy=False)
            frames.append(frame)
        self._skipping = frame.more
        if self._cut_off and int(frame.get(FROM)) in self._cut_off:
            return []
        if frame.more and self._throw_out is not None:
            self._throw_out(int(frame.get(FROM)), str(frame.get(ADDRESS)))
        heard = self.heard  # once: the watch of memory takes it back from its thread
        if heard is not None:
            heard.senders[frames[0].bytes if len(frames) > 1 else b""] = int(frame.get(FROM))
        if self._names_users:  # by its connection: a route says less, it may be taken over
            self.user = frame.get(USER)
        asked = self._is_unwanted
        if asked is not None and is_large(frames) and asked(frames[0].bytes, self.user):
            return []
        return [one.bytes for one in frames]

    def _skip(self) -> list[bytes]:
        """There may be millions; others get their turn between some of them."""
        for _ in range(FRAMES_MAX):
            if not self._socket.recv(NOW, copy=False).more:
                self._skipping = False
                break
        return []


def is_large(frames: Sequence[Sized]) -> bool:
    """Whether a message may take long to read and to act on."""
    return sum(map(len, frames)) > LARGE_BYTES


def make_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket with the options that all our links share.

    A host that is gone is found out by the kernel, not by libzmq's heartbeats: where a connection
    ends while its queue is full, libzmq aborts the process at the next of those (docs/decisions/0014).
    """
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
    socket.setsockopt(zmq.RCVHWM, QUEUED_MAX)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, SILENT_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, SILENT_S)
    socket.setsockopt(zmq.TCP_MAXRT, UNHEARD_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return socket
