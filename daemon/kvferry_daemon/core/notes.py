"""Collects what an event has changed, as rows for the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core.events import Key
from kvferry_daemon.core.records import (
    RECORDS,
    AuxRecord,
    OpeningRecord,
    PoolRecord,
    Record,
    Row,
    SessionRecord,
    StoneRecord,
)
from kvferry_daemon.core.session import Session

if TYPE_CHECKING:
    from kvferry_daemon.core.blocks import PoolBook
    from kvferry_daemon.core.node import AnyTransfer, Node
    from kvferry_daemon.core.opening import Opened


class Notes:
    """One a node. What is noted twice in an event is one row."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._rows: dict[str, bytes | None] = {}
        self._moved: dict[Key, None] = {}
        self._marks: dict[Key, tuple[object, ...]] = {}
        self._with_aux: set[Key] = set()

    def take(self) -> tuple[Row, ...]:
        """The rows of this event."""
        if self._moved:
            for key in self._moved:
                transfer = self._node.transfers.get(key)
                if transfer is not None:
                    self._rows[_name("transfer", key)] = RECORDS.encode(transfer.record())
            self._moved = {}
        if not self._rows:
            return ()
        rows, self._rows = self._rows, {}
        return tuple(rows.items())

    def moved(self, transfer: AnyTransfer) -> None:
        """A transfer has handled an event; note it if anything is different that must last."""
        mark = transfer.mark()
        if self._marks.get(transfer.key) == mark:
            return
        self._marks[transfer.key] = mark
        self._moved[transfer.key] = None
        if transfer.aux is not None and transfer.key not in self._with_aux:
            self._with_aux.add(transfer.key)
            self._put(_name("aux", transfer.key), AuxRecord(aux=transfer.aux))

    def opened(self, transfer: AnyTransfer, opened: Opened) -> None:
        """A transfer has been opened."""
        opening = transfer.opening
        record = OpeningRecord.model_construct(
            kind="opening",
            role=opening.key.role,
            transfer_id=opening.key.transfer_id,
            attempt=opening.key.attempt,
            session=opening.session,
            pool_id=opening.pool_id,
            call=opened.call,
            aux_digest=opened.aux_digest,
            window_tokens=opening.window_tokens,
            source=opening.source,
            max_tokens=opening.max_tokens,
            chunk_tokens=opening.chunk_tokens,
        )
        self._put(_name("opening", opening.key), record)

    def forgotten(self, key: Key) -> None:
        """A transfer is over; its opening stays as long as its tombstone."""
        self._marks.pop(key, None)
        self._moved.pop(key, None)
        self._rows[_name("transfer", key)] = None
        if key in self._with_aux:
            self._with_aux.discard(key)
            self._rows[_name("aux", key)] = None

    def stone(self, key: Key) -> None:
        """A tombstone is new, or has changed."""
        stone = self._node.tombstones.get(key)
        assert stone is not None, key
        record = StoneRecord.model_construct(
            kind="stone",
            snapshot=stone.snapshot,
            sessions=list(stone.sessions),
            until_s=max(0.0, stone.until_s),
            sink_daemon=stone.sink_daemon,
        )
        self._put(_name("stone", key), record)

    def stone_gone(self, key: Key) -> None:
        """A tombstone has expired."""
        self._rows[_name("stone", key)] = None
        if key not in self._node.transfers:
            self._rows[_name("opening", key)] = None

    def session(self, session: Session) -> None:
        """A worker has joined."""
        record = SessionRecord(
            secret=session.secret,
            name=session.name,
            pid=session.pid,
            lock=session.lock,
            pool_id=session.pool_id,
            user=session.user,
        )
        self._put(f"session:{session.secret}", record)

    def session_gone(self, secret: str) -> None:
        """A worker is dead."""
        self._rows[f"session:{secret}"] = None

    def pool(self, book: PoolBook) -> None:
        """A pool has come into being."""
        record = PoolRecord(
            pool_id=book.pool_id,
            layout=book.layout,
            blocks=book.pool.blocks,
            source_blocks=book.source_blocks,
            sink_blocks=book.sink_blocks,
            device=book.device,
        )
        self._put(f"pool:{book.pool_id}", record)

    def pool_gone(self, pool_id: str) -> None:
        """A pool has been dropped."""
        self._rows[f"pool:{pool_id}"] = None

    def known(self, transfer: AnyTransfer) -> None:
        """The ledger has this transfer already, as it is."""
        self._marks[transfer.key] = transfer.mark()
        if transfer.aux is not None:
            self._with_aux.add(transfer.key)

    def _put(self, name: str, record: Record) -> None:
        self._rows[name] = RECORDS.encode(record)


def _name(kind: str, key: Key) -> str:
    return f"{kind}:{key.role.value}:{key.attempt}:{key.transfer_id}"
