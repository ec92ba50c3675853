"""Copies within this daemon: what a sink here expects, out of the blocks of a source here.

Threads do them: the event loop goes on meanwhile, and so do others, since bytes are moved without
the GIL. It is like a stream in all but the connection: a claim is taken by the thread or taken back
from it, never both; every extent that is served ends with ChunkSent. So nothing needs to be closed
to be sure that nobody touches a block any more.
"""

import asyncio
import ctypes
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.logs import about
from kvferry_daemon.memory.device_pool import DevicePlace
from kvferry_daemon.transports.tcp.bridge import LoopBridge
from kvferry_daemon.transports.tcp.events import Enter, stay
from kvferry_daemon.transports.tcp.staging import (
    NewBuffer,
    Place,
    Staging,
    payload_bytes_of,
    plain_buffer,
)
from kvferry_proto.peer import PARTS_MAX

THREADS = 2  # they come with the first copies; one moves 15 to 20 GB/s, both not twice as much
log = logging.getLogger(__name__)


class _Claim(NamedTuple):
    key: StreamKey
    place: Place


class Copies:
    """Brings claims and served extents together; posts what became of them as node events."""

    def __init__(
        self,
        feed: Callable[[out.NodeEvent], None],
        enter: Enter = stay,
        new_buffer: NewBuffer = plain_buffer,
    ) -> None:
        """``enter`` is called by every thread that copies, before all else."""
        self._claims: dict[tuple[int, int], _Claim] = {}  # by handle and first token
        self._bridge: LoopBridge[out.NodeEvent] = LoopBridge(asyncio.get_running_loop(), feed)
        self._threads = ThreadPoolExecutor(THREADS, "kvferry-copy", enter)
        self._of_thread = threading.local()
        self._new_buffer = new_buffer

    def expect(self, effect: out.Expect, place: Place) -> None:
        """Claim an extent."""
        self._claims[effect.handle, effect.first_token] = _Claim(effect.key, place)

    def cancel(self, handle: int) -> list[tuple[StreamKey, int, int]]:
        """Take back the claims that no thread has begun; return where, handle and first token.

        ``dict.pop`` is atomic, so a claim is either taken back here or taken by a thread, which
        then ends it.
        """
        handles = range(handle, handle + PARTS_MAX)
        taken = [(at, self._claims.pop(at, None)) for at in list(self._claims) if at[0] in handles]
        return [(claim.key, *at) for at, claim in taken if claim is not None]

    def transmit(self, effect: out.Transmit, place: Place) -> None:
        """Copy an extent in its turn; one that nobody claims by then is left."""
        self._threads.submit(self._copy, effect, place)

    def close(self) -> None:
        """Wait for the copies that are under way; the others are not begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _copy(self, effect: out.Transmit, place: Place) -> None:
        key, handle, first_token = effect.key, effect.handle, effect.first_token
        claim = self._claims.pop((handle, first_token), None)
        size_bytes = payload_bytes_of(place)
        ended: out.NodeEvent | None = None
        if claim is not None:
            ended = out.ChunkReceived(key, handle, first_token, size_bytes)
            try:
                copy(place, claim.place, self._staging())
            except OSError as error:  # a device's
                log.error("cannot copy %s: %s", effect, error, extra=about(effect.owner))
                ended = out.ChunkMissed(key, handle, first_token)
            except Exception:
                log.exception("our own fault: cannot copy %s", effect, extra=about(effect.owner))
                ended = out.ChunkMissed(key, handle, first_token)
        sent = out.ChunkSent(key, effect.owner, effect.part, first_token, size_bytes)
        self._bridge.post(sent)  # first: an ack that follows from the other one frees the block
        if ended is not None:
            self._bridge.post(ended)

    def _staging(self) -> Staging:
        """The buffer of this thread."""
        staging = getattr(self._of_thread, "staging", None)
        if not isinstance(staging, Staging):
            staging = self._of_thread.staging = Staging(self._new_buffer)
        return staging


def copy(source: Place, sink: Place, staging: Staging) -> None:
    """Copy an extent's bytes; ValueError if there are not as many on both sides."""
    size_bytes = payload_bytes_of(source)
    if size_bytes != payload_bytes_of(sink):
        raise ValueError(f"{size_bytes} bytes into {payload_bytes_of(sink)}")
    if isinstance(source, list) and isinstance(sink, list):
        _copy_views(source, sink)
        return
    if (
        isinstance(source, DevicePlace)
        and isinstance(sink, DevicePlace)
        and source.pool.device is sink.pool.device
    ):
        source.copy_to(sink)
        return
    buffer = staging.view(size_bytes)
    if isinstance(source, list):
        _copy_views(source, [buffer])
    else:
        source.gather(buffer)
    if isinstance(sink, list):
        _copy_views([buffer], sink)
    else:
        sink.scatter(buffer)


def _copy_views(source: list[memoryview], sink: list[memoryview]) -> None:
    """Both are cut where blocks are no neighbours: each side in other places."""
    views = iter(sink)
    room = memoryview(b"")
    for piece in source:
        while piece:
            if not room:
                room = next(views)
            step = min(len(piece), len(room))
            ctypes.memmove(_address(room), _address(piece), step)  # releases the GIL
            piece, room = piece[step:], room[step:]


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
