"""The source's end of a connection on which blocks are offered, and read by NIXL."""

import contextlib
import os
import select
import socket
from collections.abc import Hashable
from typing import NamedTuple

from kvferry_daemon.transports.nixl.poller import Poller
from kvferry_daemon.transports.tcp.events import Enter, Post, Sent, stay
from kvferry_daemon.transports.tcp.sender import SendJob, StreamSender
from kvferry_daemon.transports.tcp.staging import NewBuffer, payload_bytes_of, plain_buffer
from kvferry_proto.chunk import BadChunk
from kvferry_proto.offer import (
    FRAME_BYTES,
    ByeFrame,
    OfferFrame,
    PoolFrame,
    ReadFrame,
    StoodFrame,
    read_frame,
)

USER_TIMEOUT_MS = 20_000  # then the kernel gives up what nobody has acknowledged


class _Offered(NamedTuple):
    job: SendJob
    payload_bytes: int
    pool: PoolFrame


class OfferSender(StreamSender):
    """Offers whole blocks and sends the rest as chunks; an offer is over when the sink says so.

    The end of the connection is no proof that nobody reads. That the sink says *bye* or closes its
    end is: it does so only behind its last read, and the kernel does it for one that died. Else
    the pool's registration is revoked.
    """

    def __init__(
        self,
        sock: socket.socket,
        key: Hashable,
        post: Post,
        checksum: bool,
        poller: Poller,
        enter: Enter = stay,
        new_buffer: NewBuffer = plain_buffer,
    ) -> None:
        self._poller = poller
        self._pools: dict[str, int] = {}  # shown on this connection, under which number
        self._offers: dict[tuple[int, int], _Offered] = {}
        self._heard = bytearray()
        self._closing = False
        self._bye = False  # the sink's last word, or the end of its stream
        self._lost = False  # the connection broke, and the end of its stream proves nothing
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        super().__init__(sock, key, post, checksum, enter, new_buffer)

    def close(self) -> None:
        """Send no more. It ends at once, or when the sink has ended what it reads."""
        self._closing = True
        with contextlib.suppress(OSError):  # it is down already; the thread says so itself
            self._sock.shutdown(socket.SHUT_WR)
        self._wake_up()

    def _wait(self) -> bool:
        """Sleep until there is a job, hearing the sink meanwhile; False at the end."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._closing:
            self._asleep = True
            jobs = bool(self._jobs)
            for descriptor, _ in poller.poll(0 if jobs else None):
                if descriptor != self._sock.fileno():
                    os.eventfd_read(self._wake)
                elif not self._hear():
                    return False
            if jobs:
                self._asleep = False
                return True
        return False

    def _hear(self) -> bool:
        """Take what the sink says; False if it says nothing more."""
        try:
            self._take_words(self._sock.recv(1 << 16))
        except (OSError, BadChunk):  # the socket says so once, and looks ended from then on
            self._lost = True
            raise
        return not self._bye

    def _take_words(self, data: bytes) -> None:
        self._heard += data
        while len(self._heard) >= FRAME_BYTES:
            found = read_frame(self._heard[:FRAME_BYTES])
            del self._heard[:FRAME_BYTES]
            match found[0] if found else None:
                case ReadFrame(handle, first_token):
                    self._on_read(handle, first_token)
                case ByeFrame():
                    self._bye = True
                case other:
                    raise BadChunk(f"a sink does not send {type(other).__name__}")
        self._bye |= not data

    def _on_read(self, handle: int, first_token: int) -> None:
        offered = self._offers.pop((handle, first_token), None)
        if offered is None:
            raise BadChunk(f"token {first_token} was read, but not offered")
        try:
            with contextlib.suppress(BrokenPipeError):  # one of the two has ended it
                self._send_all([StoodFrame(handle, first_token).pack()])
        finally:  # it was read, whether the sink hears that it stood or not
            self._end(offered)

    def _end(self, offered: _Offered) -> None:
        job = offered.job
        assert job.blocks is not None
        self._poller.answered(job.blocks.pool_id)
        self._post(Sent(self._key, job.owner, job.first_token, offered.payload_bytes))

    def _send_queued(self) -> None:
        """Offer the next extent, or send it where its blocks are not whole or not registered."""
        if self._goes_as_chunk(self._jobs[0]):
            super()._send_queued()
            return
        job = self._jobs.popleft()
        assert job.blocks is not None
        if (job.handle, job.first_token) in self._offers:
            self._lost = True
            raise BadChunk(f"handle {job.handle} names two extents at token {job.first_token}")
        pool = self._poller.frame_of(job.blocks.pool_id)
        if pool is None:  # it has just been shut, and comes back
            self._jobs.appendleft(job)
            return
        frames: list[bytes | memoryview] = []
        if self._pools.get(job.blocks.pool_id) != pool.number:
            self._pools[job.blocks.pool_id] = pool.number
            frames.append(pool.pack())
        offer = OfferFrame(job.handle, job.first_token, job.tokens, pool.number, job.blocks.runs)
        frames.append(offer.pack())
        self._offers[job.handle, job.first_token] = _Offered(job, payload_bytes_of(job.place), pool)
        self._poller.offered(job.blocks.pool_id)
        self._send_all(frames)

    def _send_all(self, buffers: list[bytes | memoryview]) -> None:
        try:
            super()._send_all(buffers)
        except BrokenPipeError:
            raise
        except OSError:  # the socket says so once, and looks ended from then on
            self._lost = True
            raise

    def _goes_as_chunk(self, job: SendJob) -> bool:
        return job.blocks is None or self._poller.frame_of(job.blocks.pool_id) is None

    def _drain_offers(self) -> None:
        """Hear of every offer, or of the sink's end; where neither can be, let nobody read."""
        self._closing = True
        with contextlib.suppress(OSError):  # the sink is gone, which is what we are about to see
            self._sock.shutdown(socket.SHUT_WR)
        while self._offers and not self._bye and not self._lost:
            with contextlib.suppress(OSError, BadChunk):  # then it is lost
                self._hear()
        if self._lost and not self._bye:
            jobs = [(one.job.blocks, one.pool.number) for one in self._offers.values()]
            pools = {(blocks.pool_id, number) for blocks, number in jobs if blocks is not None}
            for pool_id, number in pools:
                self._poller.revoke(pool_id, number).result()
        for offered in self._offers.values():
            assert offered.job.blocks is not None
            self._poller.answered(offered.job.blocks.pool_id)
        self._offers.clear()
