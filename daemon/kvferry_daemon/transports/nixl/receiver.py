"""The sink's end of a connection on which blocks are offered, and read by NIXL."""

import contextlib
import socket
import threading
from collections.abc import Hashable
from functools import partial

from kvferry_daemon.transports.nixl.poller import Poller
from kvferry_daemon.transports.tcp.events import Drained, Enter, Post, Received, Rejected, stay
from kvferry_daemon.transports.tcp.receiver import Claim, StreamReceiver
from kvferry_daemon.transports.tcp.staging import NewBuffer, plain_buffer
from kvferry_proto.chunk import BadChunk
from kvferry_proto.offer import (
    POOL_BLOCKS_MAX,
    ByeFrame,
    OfferFrame,
    PoolFrame,
    ReadFrame,
    StoodFrame,
    read_frame,
    read_runs,
)

POOLS_MAX = 64  # shown on one connection: bounds what a source can make us keep


class OfferReceiver(StreamReceiver):
    """Reads what is offered and claimed; it has arrived once the source says that it stood."""

    def __init__(
        self,
        sock: socket.socket,
        key: Hashable,
        post: Post,
        poller: Poller,
        enter: Enter = stay,
        new_buffer: NewBuffer = plain_buffer,
    ) -> None:
        self._poller = poller
        self._pools: dict[int, PoolFrame] = {}
        self._pools_shown = self._blocks_shown = 0
        self._taken: dict[tuple[int, int], Claim] = {}  # read; until it is known to have stood
        self._closing = False
        self._under_way = 0
        self._quiet = threading.Condition()
        super().__init__(sock, key, post, enter, new_buffer)

    def close(self) -> None:
        """End the connection, but say so to the source only once no read is under way."""
        self._closing = True
        with contextlib.suppress(OSError):  # it is down already; the thread says so itself
            self._sock.shutdown(socket.SHUT_RD)

    def _take(self, header: bytearray) -> None:
        if self._closing:  # what had come by then can still be received
            raise BadChunk("closed by us")
        found = read_frame(header)
        if found is None:
            super()._take(header)
            return
        frame, size = found
        body = bytearray(size)
        if size:
            self._must_fill([memoryview(body)])
        match frame:
            case PoolFrame():
                self._take_pool(frame._replace(metadata=bytes(body)))
            case OfferFrame():
                self._take_offer(frame, body)
            case StoodFrame():
                self._take_stood(frame)
            case _:
                raise BadChunk(f"a source does not send {type(frame).__name__}")

    def _take_pool(self, pool: PoolFrame) -> None:
        """Whoever reads there keeps it, and 24 bytes of each block, until the connection ends.

        A source shows its pool again when it has shut somebody out: then another connection goes on.
        """
        self._pools_shown += 1
        self._blocks_shown += pool.blocks
        if self._pools_shown > POOLS_MAX or self._blocks_shown > POOL_BLOCKS_MAX:
            shown = f"{self._pools_shown} of {self._blocks_shown} blocks together"
            raise BadChunk(f"too many pools were shown: {shown}")
        self._pools[pool.number] = pool

    def _take_offer(self, offer: OfferFrame, body: bytearray) -> None:
        pool = self._pools.get(offer.pool)
        if pool is None:
            raise BadChunk(f"an offer from pool {offer.pool}, which was not shown")
        runs = read_runs(body, pool.blocks)
        place = (offer.handle, offer.first_token)
        claim = self._claims.get(place)
        offered = sum([blocks for _, blocks in runs])
        fits = (
            claim is not None
            and claim.tokens == offer.tokens
            and claim.blocks is not None
            and claim.blocks.total == offered
        )
        claim = self._claims.pop(place, None) if fits else None
        if claim is None:
            self._say_read(*place)
            self._post(Drained(self._key, 0))
            return
        assert claim.blocks is not None
        with self._quiet:
            self._under_way += 1
        self._poller.read(self, claim.blocks, (pool, runs), partial(self._on_read, place, claim))

    def _on_read(self, place: tuple[int, int], claim: Claim, why: str | None) -> None:
        """On the poller's thread: nothing is written into those blocks any more."""
        try:
            if why is None:
                self._taken[place] = claim  # only now may a "stood" count
                self._say_read(*place)
            else:
                self._post(Rejected(self._key, *place, why))
                self.close()
        finally:
            with self._quiet:
                self._under_way -= 1
                self._quiet.notify()

    def _say_read(self, handle: int, first_token: int) -> None:
        """64 bytes, of which as many fit the socket as there are claims; else it is sick."""
        word = ReadFrame(handle, first_token).pack()
        try:
            whole = self._sock.send(word, socket.MSG_DONTWAIT) == len(word)
        except OSError:
            whole = False
        if not whole:
            self.close()

    def _take_stood(self, frame: StoodFrame) -> None:
        claim = self._taken.pop((frame.handle, frame.first_token), None)
        if claim is not None:  # else it was not read: there was no claim any more
            self._post(Received(self._key, *frame, claim.payload_bytes))

    def _drain_reads(self) -> None:
        """A read that does not end keeps its blocks: neither time nor silence is a proof."""
        with self._quiet:
            self._quiet.wait_for(lambda: not self._under_way)
        self._poller.part(self)
        with contextlib.suppress(OSError):  # the source is gone; then there is nobody to tell
            self._sock.send(ByeFrame().pack(), socket.MSG_DONTWAIT)
            self._sock.shutdown(socket.SHUT_WR)
