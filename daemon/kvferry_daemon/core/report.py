"""What operators read: status and transfers, made from the node's books."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from kvferry_daemon.core.session import Session
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.source import SourceTransfer
from kvferry_proto import control
from kvferry_proto.control import SESSIONS_SHOWN_MAX
from kvferry_proto.states import Role, StallReason
from kvferry_proto.versions import OURS
from kvferry_proto.worker import Snapshot

if TYPE_CHECKING:
    from kvferry_daemon.core.blocks import PoolBook
    from kvferry_daemon.core.node import AnyTransfer, Node

SINK_SHOWN_S = 600.0


def status(
    node: Node,
    call: int,
    runtime_dir: str,
    placement: control.PlacementStatus,
    loop: control.LoopStatus,
    log_level: str,
    now_s: float,
) -> control.Status:
    """The daemon as a whole. It walks over no transfers: of what it costs, free runs alone grow."""
    states, stalls = +node.tombstones.states, Counter[StallReason]()
    for kind, count in node.census.kinds.items():
        states[kind.state] += count
        if kind.stall is not None:
            stalls[kind.stall] += count
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
        stalls={stall.value: stalls[stall] for stall in sorted(stalls)},
        counters=dict(sorted(node.counters.items())),
        pools=[_pool(node, book) for book in node.books.values()],
        peers=[_peer(node, address) for address in sorted(node.sinks.peers)],
        unsettled=node.census.unsettled,
        log_level=log_level,
        sinks=_sinks(node, now_s),
        sessions=[_worker(one) for one in list(node.sessions.values())[-SESSIONS_SHOWN_MAX:]],
    )


def _worker(session: Session) -> control.WorkerStatus:
    return control.WorkerStatus(
        name=session.name,
        user=session.user,
        pool=session.pool_id,
        transfers=len(session.keys),
        lost=session.lost,
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
        blocks_leased=pool.leased_blocks,
        blocks_quarantined=pool.quarantined_blocks,
        source_blocks=book.source_blocks,
        sink_blocks=book.sink_blocks,
        largest_run_blocks=pool.largest_run,
        workers=sum(s.pool_id == book.pool_id for s in node.sessions.values()),
        planes=[plane.name for plane in book.layout.planes],
        source_held_blocks=book.held(Role.SOURCE),
        sink_held_blocks=book.held(Role.SINK),
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


def _sinks(node: Node, now_s: float) -> list[control.SinkStatus]:
    """Who pulls from us. One that has nothing to pull falls silent, and is left out some time later."""
    lost_s, streams = node.settings.timing.lost_s, node.sources.streams_of()
    heard = node.sources.daemons.last_heard(now_s - SINK_SHOWN_S, control.SINKS_SHOWN_MAX)
    return [
        control.SinkStatus(
            address=one.address,
            state="up" if now_s - one.heard_s < lost_s else "silent",
            heard_s=round(max(0.0, now_s - one.heard_s), 3),
            name=one.peer,
            streams_open=streams[one.boot_id],
            transport=node.sources.transports.get(one.boot_id, ""),
        )
        for one in heard
    ]


def transfers(node: Node, request: control.GetTransfers, now_s: float) -> control.Transfers:
    """Transfers that are live or remembered, in the order that is asked for.

    Only those that are shown are made into rows: a row costs more than to look at a transfer.
    """
    stones = [s for s in node.tombstones.snapshots() if _fits_ended(s, request)]
    live = [t for t in node.transfers.values() if _fits(node, t, request, now_s)]
    if request.sort in ("age", "idle"):
        live.reverse()  # of those that came in one turn the later ones are the younger
    if request.sort != "opened":
        stones.sort(key=lambda snapshot: snapshot.sent_tokens if request.sort == "sent" else 0)
        live.sort(key=ORDERS[request.sort])
    shown = live[-request.limit :]
    room = request.limit - len(shown)
    rows = [remembered_row(snapshot) for snapshot in (stones[-room:] if room else [])]
    rows += [live_row(node, transfer, now_s) for transfer in shown]
    more = len(stones) + len(live) - len(rows)
    return control.Transfers(call=request.call, transfers=rows, more=more)


def blocks_of(transfer: AnyTransfer) -> int:
    """What it holds of its pool, for all its ranks."""
    return transfer.window.blocks * transfer.ranks.size


ORDERS: dict[control.Sort, Callable[[AnyTransfer], float]] = {
    "age": lambda transfer: -transfer.opened_s,
    "idle": lambda transfer: -transfer.progress_s,
    "sent": lambda transfer: transfer.sent_tokens,
    "blocks": blocks_of,
}


def _fits_ended(seen: Snapshot, request: control.GetTransfers) -> bool:
    """What a tombstone does not tell fits nothing that asks for it."""
    if (request.stall, request.worker, request.peer, request.age_s, request.idle_s) != (None,) * 5:
        return False
    return (
        request.transfer_id in (None, seen.transfer_id)
        and request.state in (None, seen.state)
        and request.role in (None, seen.role)
    )


def _fits(node: Node, transfer: AnyTransfer, request: control.GetTransfers, now_s: float) -> bool:
    key = transfer.key
    return (
        request.transfer_id in (None, key.transfer_id)
        and request.state in (None, transfer.state)
        and request.role in (None, key.role)
        and request.stall in (None, transfer.stall)
        and (request.peer is None or request.peer in _addresses(node, transfer))
        and (request.age_s is None or now_s - transfer.opened_s >= request.age_s)
        and (request.idle_s is None or now_s - transfer.progress_s >= request.idle_s)
        and (request.worker is None or request.worker in _worker_names(node, transfer))
    )


def _addresses(node: Node, transfer: AnyTransfer) -> set[str]:
    """What the other side's daemon may be called."""
    address = transfer.opening.source or sink_of(node, transfer) or ""
    return {address, address.partition("?")[0]} - {""}


def sink_of(node: Node, transfer: AnyTransfer) -> str | None:
    """The daemon that pulls from a source, as far as it is known; None if it is this one, or none."""
    if not isinstance(transfer, SourceTransfer):
        return None
    daemon = node.sources.daemons.get(transfer.sink)
    return None if daemon is None else daemon.address or daemon.peer or None


def _worker_names(node: Node, transfer: AnyTransfer) -> list[str]:
    sessions = [node.sessions.get(secret) for secret in transfer.ranks.sessions]
    return [session.name if session else "" for session in sessions]


def remembered_row(snapshot: Snapshot) -> control.TransferStatus:
    """A transfer that has ended and of which a tombstone is left."""
    return control.TransferStatus(snapshot=snapshot, worker="", ended=True)


def live_row(node: Node, transfer: AnyTransfer, now_s: float) -> control.TransferStatus:
    """One that still is in the books."""
    session = node.sessions.get(transfer.opening.session)
    source = transfer.opening.source
    return control.TransferStatus(
        snapshot=_as_it_is(transfer),
        worker=session.name if session else "",
        user=session.user if session else None,
        source=source,
        sink=sink_of(node, transfer),
        transport=_transport(node, transfer),
        age_s=round(now_s - transfer.opened_s, 3),
        idle_s=round(now_s - transfer.progress_s, 3),
        blocks=blocks_of(transfer),
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
    return [] if transfer.ranks.size == 1 else _worker_names(node, transfer)


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


@cache
def our_version() -> str:
    """The installed version. Looked up once: it is parsed out of a file, which takes a millisecond."""
    try:
        return version("kvferry")
    except PackageNotFoundError:
        return "unknown"
