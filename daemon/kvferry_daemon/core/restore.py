"""A node as an earlier life left it: pools, workers, transfers and tombstones, from the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allocator import Run
from kvferry_daemon.core.blocks import PoolBook
from kvferry_daemon.core.opening import Opened, timing_of
from kvferry_daemon.core.past import LedgerWrong, Past
from kvferry_daemon.core.pool import LEASES_OF_A_LIFE, BlockPool, Lease, PoolError
from kvferry_daemon.core.records import HOST, PoolRecord, SessionRecord, StoneRecord, TransferRecord
from kvferry_daemon.core.session import Session
from kvferry_daemon.core.settings import Settings
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.source import SourceTransfer
from kvferry_daemon.core.tombstones import Tombstone
from kvferry_daemon.core.transfer import Opening
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import Role

if TYPE_CHECKING:
    from kvferry_daemon.core.node import AnyTransfer, Node


def restore(node: Node, past: Past) -> None:
    """Fill a fresh node. Raises LedgerWrong; the node is of no use then."""
    past.check()
    try:
        for pool in past.pools:
            _restore_pool(node, past, pool)
        for session in past.sessions:
            if node.books[session.pool_id].lost:
                node.notes.session_gone(session.secret)  # it says hello anew, to open what is new
            else:
                _restore_session(node, session)
        for key, record in past.transfers.items():
            _restore_transfer(node, past, key, record)
        for key, stone in sorted(past.stones.items(), key=lambda item: item[1].until_s):
            _restore_stone(node, past, key, stone)
        for book in node.books.values():
            book.pool.check()
    except (ValueError, AssertionError, PoolError) as error:
        raise LedgerWrong(str(error)) from error
    for key, transfer in node.transfers.items():
        lost = node.books[transfer.opening.pool_id].lost
        if lost:
            node.post(key, ev.Fail(Code.POOL_LOST, lost))
        node.post(key, ev.Tick(node.now_s))
        node.sinks.attach(key)


def _restore_pool(node: Node, past: Past, record: PoolRecord) -> None:
    if record.device != HOST:
        ended = f"the pool was in {record.device}, and ended with the daemon's life before"
        _lose_pool(node, record, ended)
        return
    if record.pool_id in past.lost:
        _lose_pool(node, record, f"the pool is lost: {past.lost[record.pool_id]}")
        return
    last_lease_id = node.settings.life * LEASES_OF_A_LIFE
    pool = BlockPool(record.blocks, record.source_blocks, record.sink_blocks, last_lease_id)
    book = PoolBook(
        record.pool_id,
        node.settings.pool_path(record.pool_id),
        record.device,
        record.layout,
        pool,
        record.source_blocks,
        record.sink_blocks,
    )
    node.books[record.pool_id] = book
    leases = [
        lease
        for key, transfer in past.transfers.items()
        if past.openings[key].pool_id == record.pool_id
        for lease in _leases(book, key, transfer)
    ]
    pool.take_up(leases)


def _lose_pool(node: Node, record: PoolRecord, lost: str) -> None:
    """Its memory is gone; its books stay for its transfers."""
    path = node.settings.pool_path(record.pool_id)
    pool = BlockPool(0, 0, 0)
    node.books[record.pool_id] = PoolBook(
        record.pool_id, path, record.device, record.layout, pool, 0, 0, lost=lost
    )
    node.counters["pools_lost"] += 1


def _leases(book: PoolBook, key: ev.Key, record: TransferRecord) -> tuple[Lease, ...]:
    owner = book.owner(key)
    return tuple(
        Lease(lease_id, owner, key.role, Run(first, blocks))
        for lease_id, first, blocks in record.leases
    )


def _restore_session(node: Node, record: SessionRecord) -> None:
    session = Session(
        record.secret,
        record.name,
        record.pid,
        record.lock,
        record.pool_id,
        node.now_s,  # it has a while to say that it lives
        record.user,
    )
    node.sessions[record.secret] = session
    node.effects.append(out.WatchWorker(record.secret, record.lock))


def _restore_transfer(node: Node, past: Past, key: ev.Key, record: TransferRecord) -> None:
    told = past.openings[key]
    if told.call.rank >= told.call.world_size:
        raise LedgerWrong(f"{key} is rank {told.call.rank} of {told.call.world_size}")
    book = node.books[told.pool_id]
    if book.lost:
        record = record.model_copy(update={"leases": [], "quarantined": False})
    opening = Opening(
        key=key,
        session=told.session,
        pool_id=told.pool_id,
        window_tokens=told.window_tokens,
        block_size_tokens=book.layout.block_size_tokens,
        start_tokens=told.call.start_tokens,
        source=told.source,
        max_tokens=told.max_tokens,
        aux_names=book.layout.aux,
        chunk_tokens=told.chunk_tokens,
        rank=told.call.rank,
        world_size=told.call.world_size,
        traceparent=told.call.traceparent,
    )
    kind = SinkTransfer if key.role is Role.SINK else SourceTransfer
    transfer: AnyTransfer = kind(opening, _timing(told.call, node.settings), node.now_s)
    aux = past.aux.get(key)
    leases = _leases(book, key, record)
    transfer.take_up(record, leases, None if aux is None else aux.aux)
    if record.quarantined:
        for lease in leases:
            book.pool.quarantine(lease)
    node.transfers[key] = transfer
    node.census.changed(transfer)
    name = (key.role, key.transfer_id)
    node.current[name] = max(key.attempt, node.current.get(name, 0))
    node.workers.openings.know(key, Opened.noted(told))
    node.notes.known(transfer)
    node.aux_books.note(transfer)
    for session in transfer.ranks.sessions:
        if session in node.sessions:
            node.sessions[session].keys[key] = None
    if not transfer.ended:
        node.chronicle.opened(transfer, again=True)


def _timing(call: worker.Send | worker.Receive, settings: Settings) -> ev.Timing:
    try:
        return timing_of(call, settings)
    except FerryError:  # the limits are others now
        return settings.timing


def _restore_stone(node: Node, past: Past, key: ev.Key, record: StoneRecord) -> None:
    until_s = min(record.until_s, node.now_s + node.settings.timing.tombstone_s)
    sessions = tuple(record.sessions)
    stone = Tombstone(record.snapshot, sessions, until_s, sink_daemon=record.sink_daemon)
    node.tombstones.put(key, stone)
    opening = past.openings.get(key)
    if opening is not None:
        node.workers.openings.know(key, Opened.noted(opening))
        name = (key.role, key.transfer_id)
        node.current[name] = max(key.attempt, node.current.get(name, 0))
