"""Where a transfer is and why, in words: its timeline, what it waits for, and what usually helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvferry_daemon.core import history
from kvferry_daemon.core.report import blocks_of, live_row, remembered_row, sink_of
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.source import SourceTransfer
from kvferry_proto import control
from kvferry_proto.states import Role, StallReason, State

if TYPE_CHECKING:
    from kvferry_daemon.core.node import AnyTransfer, Node
    from kvferry_daemon.core.tombstones import Tombstone

NEAR_LOOKED_AT = 500  # ids that are compared letter by letter
HOLDERS_MAX = 5
USERS_NAMED = 4  # of those that may touch a transfer's blocks: a name may have 128 characters
Advice = tuple[str, str]  # what it waits for, and what usually helps; {other}: the other daemon

WAITS: dict[tuple[Role, StallReason], Advice] = {
    (Role.SINK, StallReason.WAITING_FOR_PEER): (
        "the source's daemon, or a data connection to it",
        "see its line in `kvferry status` for why; check that daemon, the address and the network",
    ),
    (Role.SINK, StallReason.WAITING_FOR_SOURCE): (
        "the source's daemon to know this id and attempt: its worker has not called send",
        (
            "check that the router gave both sides the same id, attempt and source address, and that "
            "prefill has begun"
        ),
    ),
    (Role.SINK, StallReason.WAITING_FOR_INPUT): (
        "the source's worker to make more tokens ready",
        "explain the same id at {other}; prefill may be queued, slow or gone",
    ),
    (Role.SINK, StallReason.WAITING_FOR_BLOCKS): (
        "free blocks in this daemon's pool",
        (
            "let those that hold them resume, release or end; else raise budget_bytes, or lower "
            "window_tokens or source_share"
        ),
    ),
    (Role.SINK, StallReason.WAITING_FOR_RESUME): (
        "its own worker: the window is full, and it has to take tokens over and resume",
        "look at the decode worker named here: is it busy, blocked, or does it not poll?",
    ),
    (Role.SOURCE, StallReason.WAITING_FOR_PEER): (
        "a sink's daemon to ask for it",
        (
            "check that the decode worker called receive with this daemon's address, this id and "
            "attempt; explain the id there"
        ),
    ),
    (Role.SOURCE, StallReason.WAITING_FOR_INPUT): (
        "its own worker to make more tokens ready, or for the sink to say that it has all",
        "look at the prefill worker named here: is the request queued, running or gone?",
    ),
    (Role.SOURCE, StallReason.WAITING_FOR_BLOCKS): (
        "free blocks in this daemon's pool",
        "let those that hold them be received or end; else raise budget_bytes or source_share",
    ),
    (Role.SOURCE, StallReason.WAITING_FOR_RESUME): (
        "the sink to ask for more: its window is full, or it has no blocks",
        "explain the same id at {other} and see what it waits for there",
    ),
    (Role.SINK, StallReason.DRAINING): (
        "whoever may still touch its blocks, though it has ended",
        "end the worker named here, or let it release; the blocks come back once it has",
    ),
    (Role.SOURCE, StallReason.DRAINING): (
        "whoever may still touch its blocks, though it has ended",
        "end the worker named here, or let it release; the blocks come back once it has",
    ),
}
GROUP: Advice = (
    "ranks of its group that have not come",
    "start the ranks named as behind, or abort the transfer and use attempt + 1",
)


def explain(node: Node, request: control.Explain, now_s: float) -> control.Explanation:
    """Every attempt of an id, oldest first; near ids if there is none."""
    wanted = request.transfer_id
    found = [_ended(stone, now_s) for stone in node.tombstones.of(wanted)]
    found += [
        _live(node, transfer, now_s)
        for key, transfer in node.transfers.items()
        if key.transfer_id == wanted
    ]
    shown = found[-control.EXPLAINED_MAX :]
    near = [] if found else near_ids(node, wanted)
    return control.Explanation(call=request.call, transfers=shown, near=near)


def near_ids(node: Node, wanted: str) -> list[str]:
    """Known ids that may be meant: one mistake leaves the first or the last half as it was.

    So only few are compared letter by letter: there may be 36,000, and the loop waits.
    """
    ids = {key.transfer_id: None for key in node.transfers}
    ids.update((stone.transfer_id, None) for stone in node.tombstones.snapshots())
    half = max(1, len(wanted) // 2)
    first, last = wanted[:half], wanted[-half:]
    likely = [one for one in ids if one.startswith(first) or one.endswith(last) or wanted in one]
    return difflib.get_close_matches(wanted, likely[-NEAR_LOOKED_AT:], control.NEAR_MAX, 0.5)


def _live(node: Node, transfer: AnyTransfer, now_s: float) -> control.Explained:
    stall, past = transfer.stall, transfer.history
    block = transfer.opening.block_size_tokens
    start_s = now_s - transfer.opened_s
    waits_for, helps = _advice(node, transfer)
    error = transfer.error
    return control.Explained(
        seen=live_row(node, transfer, now_s),
        moments=list(_timeline(transfer.key.role, past.moments(), start_s, block)),
        moments_lost=past.lost,
        stalled_s=None if stall is None else round(now_s - past.stall_since_s, 3),
        waits_for=waits_for,
        helps=helps or (error.remedy if error else ""),
        holding=_holding(node, transfer),
        holders=_holders(node, transfer),
    )


def _ended(stone: Tombstone, now_s: float) -> control.Explained:
    shown, left = stone.snapshot, stone.left
    moments: list[control.Moment] = []
    if left is not None:
        past = history.read(left.records)
        moments = list(_timeline(shown.role, past, now_s - left.opened_s, left.block_tokens))
    return control.Explained(
        seen=remembered_row(shown),
        moments=moments,
        moments_lost=left.lost if left else 0,
        helps=shown.error.remedy if shown.error else "",
    )


def _advice(node: Node, transfer: AnyTransfer) -> Advice:
    if transfer.stall is None:
        return "", ""
    if not transfer.ended and transfer.ranks.missing:
        return GROUP
    waits_for, helps = WAITS[transfer.key.role, transfer.stall]
    return waits_for, helps.format(other=_other_side(node, transfer))


def _other_side(node: Node, transfer: AnyTransfer) -> str:
    """Whom to ask there, by name if it is known."""
    is_sink = isinstance(transfer, SinkTransfer)
    address = transfer.opening.source if is_sink else sink_of(node, transfer)
    daemon = "the source's daemon" if is_sink else "the sink's daemon"
    return f"{daemon}, {address}," if address else daemon


# --- the timeline ---


def _timeline(
    role: Role, moments: Iterator[history.Moment], start_s: float, block_tokens: int
) -> Iterator[control.Moment]:
    """``start_s``: how long ago the transfer was opened."""
    before = None
    for moment in moments:
        yield control.Moment(
            ago_s=round(max(0.0, start_s - moment.after_s), 3),
            what="; ".join(_changes(role, before, moment)),
            state=moment.state,
            stall=moment.stall,
            sent_tokens=moment.sent_tokens,
            available_tokens=moment.available_tokens,
            base_tokens=moment.base_tokens,
            allocated_tokens=moment.blocks * block_tokens,
        )
        before = moment


def _changes(role: Role, before: history.Moment | None, now: history.Moment) -> list[str]:
    """What differs, as an operator would say it."""
    if before is None:
        began = "opened" if now.state is State.BOOTSTRAPPING else "earlier changes are not kept"
        return [began, f"state {_name(now.state)}", *_why(now)]
    said = []
    if now.last_resume_at != before.last_resume_at:
        said.append(f"resume({now.last_resume_at}) accepted")
    if now.available_tokens != before.available_tokens:
        who = "the source has" if role is Role.SINK else "its worker marked ready"
        said.append(f"{who} tokens up to {now.available_tokens}")
    if now.knows_total and not before.knows_total:
        said.append("the total is known")
    if now.sent_tokens != before.sent_tokens:
        how = "received" if role is Role.SINK else "acknowledged"
        said.append(f"tokens up to {now.sent_tokens} {how}")
    said += _blocks(before, now)
    if now.state is not before.state:
        said.append(f"state {_name(now.state)}")
    if now.stall is not before.stall:
        said += _why(now) or ["moves again"]
    return said or ["news"]


def _blocks(before: history.Moment, now: history.Moment) -> list[str]:
    more = now.blocks - before.blocks
    if more > 0:
        return [f"{more} blocks more, {now.blocks} held from token {now.base_tokens}"]
    if more < 0:
        return [f"{-more} blocks freed, {now.blocks} held from token {now.base_tokens}"]
    if now.base_tokens != before.base_tokens:
        return [f"as many blocks freed as granted, {now.blocks} held from {now.base_tokens}"]
    return []


def _why(now: history.Moment) -> list[str]:
    return [] if now.stall is None else [now.stall.value.replace("_", " ")]


def _name(state: State) -> str:
    return state.name.title().replace("_", "")


# --- blocks ---


def _holding(node: Node, transfer: AnyTransfer) -> str:
    """Who may touch the blocks that it has."""
    window = transfer.window
    if not window.blocks:
        return "it holds no blocks"
    held = f"{window.blocks} blocks from token {window.base_tokens}"
    if transfer.ranks.size > 1:
        held += f" of each of {transfer.ranks.size} ranks"
    users = _workers_in(node, transfer)
    if isinstance(transfer, SinkTransfer) and transfer.chunks_under_way:
        users.append(f"{transfer.chunks_under_way} chunks that are on their way into them")
    if isinstance(transfer, SourceTransfer) and transfer.chunks_under_way:
        users.append(f"{transfer.chunks_under_way} chunks that are read from them")
    kept = "quarantined, kept for" if transfer.quarantined else "used by"
    return f"{held}, {kept} {', '.join(users) or 'nobody any more'}"


def _workers_in(node: Node, transfer: AnyTransfer) -> list[str]:
    """Workers that have not released, and are not known to be dead."""
    ranks = transfer.ranks
    secrets = [ranks[number].session for number in range(ranks.size) if not ranks[number].released]
    sessions = [node.sessions.get(secret) for secret in secrets if secret]
    users = [
        f"worker {one.name or '?'} (pid {one.kernel_pid})" for one in sessions if one is not None
    ]
    left_out = len(users) - USERS_NAMED
    return [*users[:USERS_NAMED], f"and {left_out} more workers"] if left_out > 0 else users


def _holders(node: Node, transfer: AnyTransfer) -> list[control.Holder]:
    """Those others with most blocks of the pool and role that it waits for."""
    if transfer.stall is not StallReason.WAITING_FOR_BLOCKS:
        return []
    role, pool_id = transfer.key.role, transfer.opening.pool_id
    others = [
        one
        for key, one in node.transfers.items()
        if key.role is role and one.opening.pool_id == pool_id and one is not transfer
    ]
    others = sorted(filter(blocks_of, others), key=blocks_of, reverse=True)
    return [
        control.Holder(
            transfer_id=one.key.transfer_id,
            role=role,
            attempt=one.key.attempt,
            blocks=blocks_of(one),
            stall=one.stall,
        )
        for one in others[:HOLDERS_MAX]
    ]
