"""What operators read: status and transfers, made from the node's books."""

from __future__ import annotations

import os
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.source import SourceTransfer
from kvferry_proto import control
from kvferry_proto.states import Role, StallReason
from kvferry_proto.versions import OURS
from kvferry_proto.worker import Snapshot

if TYPE_CHECKING:
    from kvferry_daemon.core.blocks import PoolBook
    from kvferry_daemon.core.node import AnyTransfer, Node


def status(
    node: Node,
    call: int,
    runtime_dir: str,
    placement: control.PlacementStatus,
    loop: control.LoopStatus,
    now_s: float,
) -> control.Status:
    """The daemon as a whole. Costs a walk over all transfers; only operators ask."""
    states = Counter(t.state for t in node.transfers.values())
    states.update(s.state for s in node.tombstones.snapshots())
    stalls = Counter(t.stall for t in node.transfers.values())
    return control.Status(
        call=call,
        version=our_version(),
        wire_versions=(OURS.low, OURS.high),
        boot_id=node.settings.boot_id,
        pid=os.getpid(),
        uptime_s=round(now_s - node.started_s, 3),
        draining=node.draining,
        peer_address=node.settings.peer_address,
        runtime_dir=runtime_dir,
        placement=placement,
        loop=loop,
        workers=len(node.sessions),
        blocks_total=sum(book.pool.blocks for book in node.books.values()),
        blocks_free=sum(book.pool.free_blocks for book in node.books.values()),
        transfers={state.name.lower(): states[state] for state in sorted(states)},
        stalls={stall.value: stalls[stall] for stall in sorted(filter(None, stalls))},
        counters=dict(sorted(node.counters.items())),
        pools=[_pool(node, book) for book in node.books.values()],
        peers=[_peer(node, address) for address in sorted(node.sinks.peers)],
    )


def _pool(node: Node, book: PoolBook) -> control.PoolStatus:
    pool = book.pool
    return control.PoolStatus(
        device=book.device,
        path=book.path,
        block_bytes=book.layout.block_bytes,
        block_size_tokens=book.layout.block_size_tokens,
        blocks_total=pool.blocks,
        blocks_free=pool.free_blocks,
        blocks_leased=sum(pool.leased_blocks(role) for role in Role),
        blocks_quarantined=pool.quarantined_blocks,
        source_blocks=book.source_blocks,
        sink_blocks=book.sink_blocks,
        largest_run_blocks=pool.largest_run,
        workers=sum(s.pool_id == book.pool_id for s in node.sessions.values()),
        planes=[plane.name for plane in book.layout.planes],
    )


def _peer(node: Node, address: str) -> control.PeerStatus:
    peer = node.sinks.peers[address]
    return control.PeerStatus(
        address=address,
        state=peer.state,
        boot_id=peer.boot_id,
        streams_open=len(peer.streams_open),
        transport=peer.transport or "",
        why=peer.why,
        detail=peer.detail,
    )


def transfers(node: Node, request: control.GetTransfers, now_s: float) -> control.Transfers:
    """Transfers that are live or remembered, newest last."""
    wanted = request.transfer_id
    rows = [
        _remembered(snapshot)
        for snapshot in node.tombstones.snapshots()
        if wanted in (None, snapshot.transfer_id)
    ]
    rows += [
        _live(node, transfer, now_s)
        for transfer in node.transfers.values()
        if wanted in (None, transfer.key.transfer_id)
    ]
    shown = rows[-request.limit :]
    return control.Transfers(call=request.call, transfers=shown, more=len(rows) - len(shown))


def _remembered(snapshot: Snapshot) -> control.TransferStatus:
    return control.TransferStatus(snapshot=snapshot, worker="", ended=True)


def _live(node: Node, transfer: AnyTransfer, now_s: float) -> control.TransferStatus:
    session = node.sessions.get(transfer.opening.session)
    source = transfer.opening.source
    return control.TransferStatus(
        snapshot=_as_it_is(transfer),
        worker=session.name if session else "",
        source=source,
        transport=_transport(node, transfer),
        age_s=round(now_s - transfer.opened_s, 3),
        idle_s=round(now_s - transfer.progress_s, 3),
        blocks=transfer.window.blocks,
        ended=transfer.ended,
        workers=_workers(node, transfer),
        behind=_behind(transfer),
    )


def _as_it_is(transfer: AnyTransfer) -> Snapshot:
    """A snapshot without what a group's ranks are shown later, or see of themselves alone."""
    shown = transfer.snapshot()
    if transfer.ranks.size == 1:
        return shown
    return shown.model_copy(
        update={
            "state": transfer.state,
            "stall": transfer.stall,
            "sent_tokens": transfer.sent_tokens,
            "available_tokens": transfer.available_tokens,
        }
    )


def _workers(node: Node, transfer: AnyTransfer) -> list[str]:
    """The names of a group's workers, by rank."""
    if transfer.ranks.size == 1:
        return []
    sessions = [node.sessions.get(secret) for secret in transfer.ranks.sessions]
    return [session.name if session else "" for session in sessions]


def _behind(transfer: AnyTransfer) -> list[int]:
    """The ranks that a group waits for."""
    ranks = transfer.ranks
    numbers = range(ranks.size)
    if ranks.size == 1:
        return []
    if ranks.missing and not transfer.ended:
        return ranks.missing
    shown, true = transfer.snapshot(), _as_it_is(transfer)
    if (shown.state, shown.stall, shown.sent_tokens) != (true.state, true.stall, true.sent_tokens):
        lowest = min(ranks[number].acted_at for number in numbers if ranks[number].session)
        return [n for n in numbers if ranks[n].session and ranks[n].acted_at == lowest]
    if transfer.ended:
        here = [n for n in numbers if ranks[n].session and not ranks[n].released]
        return here if transfer.window.blocks else []
    if transfer.stall is StallReason.WAITING_FOR_RESUME and isinstance(transfer, SinkTransfer):
        return [n for n in numbers if ranks[n].level_tokens < transfer.sent_tokens]
    if transfer.stall is StallReason.WAITING_FOR_INPUT and isinstance(transfer, SourceTransfer):
        lowest = ranks.lowest_tokens
        return [n for n in numbers if ranks[n].level_tokens == lowest]
    return []


def _transport(node: Node, transfer: AnyTransfer) -> str:
    """Empty before a data connection to the other side was asked for."""
    if isinstance(transfer, SourceTransfer):
        if transfer.sink != node.settings.boot_id:
            return node.sources.transports.get(transfer.sink or "", "")
        sink = node.transfers.get(transfer.key._replace(role=Role.SINK))
        if isinstance(sink, SinkTransfer):
            transfer = sink
    elif transfer.opening.source is not None:
        peer = node.sinks.peers.get(transfer.opening.source)
        return (peer.transport if peer else None) or ""
    return "handoff" if not isinstance(transfer, SinkTransfer) or transfer.takes_over else "copy"


def our_version() -> str:
    """The installed version."""
    try:
        return version("kvferry")
    except PackageNotFoundError:
        return "unknown"
