"""Pools whose memory is lost: with an earlier life of the daemon, or by a device's failed copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_proto.errors import Code, FerryError

if TYPE_CHECKING:
    from kvferry_daemon.core.blocks import PoolBook
    from kvferry_daemon.core.node import Node


class LostPools:
    """A lost pool's transfers fail, and their sessions can do no more than let go.

    The driver does not say what becomes of memory that is freed while a worker has it open. So it is
    freed, and the pool made anew, when the sessions of all who had it open are over.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._dead = ""  # why the device is of no use to this process

    def on_broken(self, event: out.PoolBroken) -> None:
        """A copy failed. Other pools go on, if they can: theirs would fail by themselves."""
        node = self._node
        if not event.usable:
            self._dead = event.message
        book = node.books.get(event.pool_id)
        if book is None or book.lost:
            return  # several threads were copying
        book.lost = event.message
        node.counters["pools_broken"] += 1
        for key, transfer in node.transfers.items():
            if transfer.opening.pool_id == event.pool_id:
                node.post(key, ev.Fail(Code.DEVICE_FAILED, self._what_to_do(event.message)))

    def on_not_made(self, event: out.PoolNotMade) -> str:
        """Take note if no pool can be made any more; return what its workers are told."""
        if event.usable:
            return event.message
        self._dead = event.message
        return self._what_to_do(event.message)

    def _what_to_do(self, message: str) -> str:
        if self._dead:
            return f"{message}; the daemon has lost the device and must be restarted"
        return f"{message}; its workers must close their clients and connect again"

    def check_device(self) -> None:
        """Raise FerryError(device_failed) if no pool can be made any more."""
        if self._dead:
            raise FerryError(Code.DEVICE_FAILED, self._what_to_do(self._dead))

    def check_book(self, book: PoolBook) -> None:
        """Raise FerryError(device_failed) if no transfer can be opened in this pool."""
        if book.lost:
            raise FerryError(Code.DEVICE_FAILED, self._what_to_do(book.lost))

    def clear(self, book: PoolBook) -> None:
        """Make room for another pool in a lost one's place; FerryError if somebody still has it."""
        node = self._node
        workers = sum(one.pool_id == book.pool_id for one in node.sessions.values())
        if workers or book.pool.free_blocks < book.pool.blocks:
            raise FerryError(
                Code.DEVICE_FAILED,
                f"{book.lost}; the pool is made anew once all who have it open ({workers} workers) "
                "have closed their clients or ended",
            )
        if not book.pool.blocks:
            return  # of an earlier life
        for transfer in node.transfers.values():
            if transfer.opening.pool_id == book.pool_id:
                node.boards.forget(transfer)
        node.boards.drop(book.pool_id)
        node.effects.append(out.DropPool(book.pool_id))
        book.empty()
