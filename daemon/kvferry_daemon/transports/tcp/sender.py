"""One thread that sends chunks out of the pool over one connection."""

import contextlib
import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

import xxhash

from kvferry_daemon.transports.tcp.events import Enter, Post, Sent, StreamDown, stay
from kvferry_daemon.transports.tcp.staging import (
    Blocks,
    NewBuffer,
    Place,
    Staging,
    payload_bytes_of,
    pieces,
    plain_buffer,
)
from kvferry_proto.chunk import BadChunk, ChunkHeader, pack_trailer

HASHED_STEP_BYTES = 1 << 20  # of one sendmsg behind its hashing: the bytes are then still in cache
PLAIN_STEP_BYTES = 4 << 20  # without one: the fewer calls, the fewer turns at the GIL
BUFFERS_MAX = 512  # of one sendmsg, and a trailer; the kernel's limit is 1024
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SendJob:
    """An extent to send: its bytes are read from ``place`` until Sent or StreamDown.

    ``owner`` comes back with Sent; ``handle`` is the other side's and goes out in the header.
    """

    owner: Hashable
    handle: int
    first_token: int
    tokens: int
    place: Place
    blocks: Blocks | None = None  # where these are whole


class StreamSender:
    """Sends jobs in order; ``close`` ends it at once, and StreamDown proves that it has ended."""

    def __init__(
        self,
        sock: socket.socket,
        key: Hashable,
        post: Post,
        checksum: bool,
        enter: Enter = stay,
        new_buffer: NewBuffer = plain_buffer,
    ) -> None:
        self._sock = sock
        self._key = key
        self._post = post
        self._enter = enter
        self._checksum = checksum
        self._step_bytes = HASHED_STEP_BYTES if checksum else PLAIN_STEP_BYTES
        self._jobs: deque[SendJob] = deque()
        self._staging = Staging(new_buffer)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.Lock()  # who writes to it must know that it is still open
        self._asleep = False
        self._over = False
        sock.settimeout(None)
        threading.Thread(target=self._run, name="kvferry-send", daemon=True).start()

    def put(self, job: SendJob) -> None:
        """Queue an extent."""
        self._jobs.append(job)
        if self._asleep:
            self._wake_up()

    def _wake_up(self) -> None:
        with self._wake_lock:
            if not self._over:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the connection; a blocked send ends too."""
        with contextlib.suppress(OSError):  # it is down already; the thread says so itself
            self._sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        self._enter()
        reason = "closed by the other side"
        try:
            while self._wait():
                self._send_queued()
        except OSError as error:
            reason = error.strerror or str(error)
        except BadChunk as error:
            reason = str(error)
        except Exception as error:
            reason = f"our own fault: {error!r}"
            log.exception("stream %s: cannot send", self._key)
        finally:
            self._drain_offers()
            with self._wake_lock:
                self._over = True
                os.close(self._wake)
            self._jobs.clear()
            self._sock.close()
            self._post(StreamDown(self._key, reason))

    def _drain_offers(self) -> None:
        """Wait until nobody reads a block for this connection; here only this thread does."""

    def _wait(self) -> bool:
        """Sleep until there is a job; False once the other side has closed."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN | select.POLLRDHUP)
        poller.register(self._wake, select.POLLIN)
        while not self._jobs:
            self._asleep = True
            if self._jobs:
                break
            for descriptor, _ in poller.poll():
                if descriptor == self._sock.fileno():
                    return False  # sinks say nothing on a stream: this is its end
                os.eventfd_read(self._wake)
        self._asleep = False
        return True

    def _send_queued(self) -> None:
        """Send what is queued, several small chunks in one call, up to about a step."""
        buffers: list[bytes | memoryview] = []
        size, sent, staged = 0, [], False
        while self._jobs and size < self._step_bytes // 2 and self._goes_as_chunk(self._jobs[0]):
            if staged:
                break  # its buffer must leave first
            job = self._jobs.popleft()
            payload_bytes = payload_bytes_of(job.place)
            header = ChunkHeader(
                job.handle, job.first_token, job.tokens, payload_bytes, self._checksum
            )
            buffers.append(header.pack())
            digest = xxhash.xxh3_64() if self._checksum else None
            if isinstance(job.place, list):
                views = job.place
            else:
                views, staged = [self._staging.view(payload_bytes)], True
                job.place.gather(views[0])
            for piece in pieces(views, self._step_bytes):
                if size + len(piece) > self._step_bytes or len(buffers) >= BUFFERS_MAX:
                    self._send_all(buffers)
                    buffers, size = [], 0
                if digest is not None:
                    digest.update(piece)
                buffers.append(piece)
                size += len(piece)
            if digest is not None:
                buffers.append(pack_trailer(digest.intdigest()))
            sent.append(Sent(self._key, job.owner, job.first_token, payload_bytes))
        self._send_all(buffers)
        for event in sent:  # now: blocks that have left must not count as being read
            self._post(event)

    def _goes_as_chunk(self, _job: SendJob) -> bool:
        return True

    def _send_all(self, buffers: list[bytes | memoryview]) -> None:
        left = sum(map(len, buffers))
        while True:
            done = self._sock.sendmsg(buffers)
            left -= done
            if not left:
                return
            buffers = _behind(buffers, done)  # a signal cut it short: go on where it stopped


def _behind(buffers: list[bytes | memoryview], done: int) -> list[bytes | memoryview]:
    """What is left of the buffers after their first ``done`` bytes."""
    rest: list[bytes | memoryview] = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(memoryview(buffer)[done:])
        done = max(0, done - len(buffer))
    return rest
