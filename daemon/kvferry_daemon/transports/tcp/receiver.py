"""One thread that receives chunks from one connection straight into claimed blocks.

Slices of blocks come into a buffer first, and into the blocks once the bytes are known to be right.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Hashable
from typing import NamedTuple

import xxhash

from kvferry_daemon.transports.tcp.events import (
    Drained,
    Enter,
    Post,
    Received,
    Rejected,
    StreamDown,
    stay,
)
from kvferry_daemon.transports.tcp.staging import (
    Blocks,
    NewBuffer,
    Place,
    Staging,
    payload_bytes_of,
    pieces,
    plain_buffer,
)
from kvferry_proto.chunk import (
    HEADER_BYTES,
    TRAILER_BYTES,
    BadChunk,
    ChunkHeader,
    pack_trailer,
    read_header,
)

HASHED_STEP_BYTES = 1 << 20  # of one call before its hashing: the bytes are then still in cache
PLAIN_STEP_BYTES = 4 << 20  # without one: the fewer calls, the fewer turns at the GIL
SCRATCH_BYTES = 1 << 20
BUFFERS_MAX = 512  # of one recvmsg_into; the kernel's limit is 1024
log = logging.getLogger(__name__)


class Claim(NamedTuple):
    """What is expected, and where it goes."""

    tokens: int
    place: Place
    payload_bytes: int
    blocks: Blocks | None


class StreamReceiver:
    """Receives into claims of this very connection; everything else is read aside."""

    def __init__(
        self,
        sock: socket.socket,
        key: Hashable,
        post: Post,
        enter: Enter = stay,
        new_buffer: NewBuffer = plain_buffer,
    ) -> None:
        self._sock = sock
        self._key = key
        self._post = post
        self._enter = enter
        self._claims: dict[tuple[int, int], Claim] = {}
        self._scratch = memoryview(bytearray(0))
        self._staging = Staging(new_buffer)
        sock.settimeout(None)
        threading.Thread(target=self._run, name="kvferry-receive", daemon=True).start()

    def claim(
        self, handle: int, first_token: int, tokens: int, place: Place, blocks: Blocks | None = None
    ) -> None:
        """Expect an extent; its bytes go into ``place``: views are filled in order.

        ``blocks`` are the same where these are whole, for a sink that reads them itself.
        """
        claim = Claim(tokens, place, payload_bytes_of(place), blocks)
        self._claims[handle, first_token] = claim

    def cancel(self, handles: range) -> list[tuple[int, int]]:
        """Take back these handles' claims that were not begun; return (handle, first token).

        ``dict.pop`` is atomic, so a claim is either taken back here or taken by the thread, which
        then ends it with Received, Rejected or StreamDown.
        """
        keys = [key for key in list(self._claims) if key[0] in handles]
        return [key for key in keys if self._claims.pop(key, None) is not None]

    def close(self) -> None:
        """End the connection; a blocked receive ends too."""
        with contextlib.suppress(OSError):  # it is down already; the thread says so itself
            self._sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        self._enter()
        reason = "closed by the other side"
        header = bytearray(HEADER_BYTES)
        try:
            while self._fill([memoryview(header)]):
                self._take(header)
        except (OSError, BadChunk) as error:
            reason = str(error)
        except Exception as error:
            reason = f"our own fault: {error!r}"
            log.exception("stream %s: cannot receive", self._key)
        finally:
            self._drain_reads()
            self._claims.clear()
            self._sock.close()
            self._post(StreamDown(self._key, reason))

    def _take(self, header: bytearray) -> None:
        """What a header begins."""
        self._take_chunk(read_header(header))

    def _drain_reads(self) -> None:
        """Wait until nothing but this thread could touch a claimed block; here nothing could."""

    def _take_chunk(self, header: ChunkHeader) -> None:
        place = (header.handle, header.first_token)
        claim = self._claims.get(place)
        fits = claim is not None and (
            (claim.tokens, claim.payload_bytes) == (header.tokens, header.payload_bytes)
        )
        claim = self._claims.pop(place, None) if fits else None
        if claim is None:
            self._drain(header)
            return
        if isinstance(claim.place, list):
            whole = self._receive(header, claim.place)
        else:
            staged = self._staging.view(header.payload_bytes)
            whole = self._receive(header, [staged])
            if whole:
                claim.place.scatter(staged)
        if not whole:
            why = "the checksum of the payload is wrong"
            self._post(Rejected(self._key, header.handle, header.first_token, why))
            raise BadChunk(why)
        self._post(Received(self._key, header.handle, header.first_token, header.payload_bytes))

    def _receive(self, header: ChunkHeader, views: list[memoryview]) -> bool:
        """Fill the views, and the trailer with the last of them; say whether the bytes are right."""
        trailer = bytearray(TRAILER_BYTES if header.has_checksum else 0)
        digest = xxhash.xxh3_64() if header.has_checksum else None
        step_bytes = PLAIN_STEP_BYTES if digest is None else HASHED_STEP_BYTES
        batch: list[memoryview] = []
        size = 0
        for piece in pieces(views, step_bytes):
            if size + len(piece) > step_bytes or len(batch) >= BUFFERS_MAX:
                self._take_batch(batch, digest)
                batch, size = [], 0
            batch.append(piece)
            size += len(piece)
        self._must_fill([*batch, memoryview(trailer)] if trailer else batch)
        if digest is None:
            return True
        for piece in batch:
            digest.update(piece)
        return pack_trailer(digest.intdigest()) == bytes(trailer)

    def _take_batch(self, batch: list[memoryview], digest: "xxhash.xxh3_64 | None") -> None:
        self._must_fill(batch)
        if digest is not None:
            for piece in batch:
                digest.update(piece)

    def _drain(self, header: ChunkHeader) -> None:
        """Read a chunk aside that nobody claimed (any more)."""
        if not self._scratch:
            self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        left = header.payload_bytes + (TRAILER_BYTES if header.has_checksum else 0)
        while left:
            step = min(left, SCRATCH_BYTES)
            self._must_fill([self._scratch[:step]])
            left -= step
        self._post(Drained(self._key, header.payload_bytes))

    def _must_fill(self, views: list[memoryview]) -> None:
        if views and not self._fill(views):
            raise BadChunk("the connection ended inside a chunk")

    def _fill(self, views: list[memoryview]) -> bool:
        """Receive until the views are full; False if the connection ended before the first byte."""
        wanted = sum(map(len, views))
        got = self._sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
        if got == 0:
            return False
        while got < wanted:  # MSG_WAITALL may still be cut short by a signal
            rest, skip = [], got
            for view in views:
                rest.append(view[skip:])
                skip = max(0, skip - len(view))
            views = [view for view in rest if view]
            wanted -= got
            got = self._sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            if got == 0:
                raise BadChunk("the connection ended inside a chunk")
        return True
