"""What a transfer wants done: inside the node at once, outside as an effect for the shell."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.blocks import PoolBook, Zeroing
from kvferry_daemon.core.here import can_take_over
from kvferry_proto.peer import Progress, Pull
from kvferry_proto.states import Role, State

if TYPE_CHECKING:
    from kvferry_daemon.core.node import AnyTransfer, Node
    from kvferry_daemon.core.sink import SinkTransfer
    from kvferry_daemon.core.source import SourceTransfer

CRUMBS_S = 0.02  # blocks are held back for so long at most: some round trips


class EffectDesk:
    """Performs the effects of transfers."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._zeroing: dict[int, Zeroing] = {}
        self._tickets = 0
        self._moves: dict[type, Callable[[Any, Any], None]] = {
            ev.WantBlocks: self._want_blocks,
            ev.Free: self._free,
            ev.FreeTail: self._free_tail,
            ev.Quarantine: self._quarantine,
            ev.Claim: self._claim,
            ev.CancelClaims: self._cancel_claims,
            ev.CloseStream: self._close_stream,
            ev.SendPull: self._send_pull,
            ev.TakeOver: self._take_over,
            ev.SendDone: self._send_done,
            ev.SendProgress: self._send_progress,
            ev.Serve: self._serve,
            ev.HandOver: self._hand_over,
        }

    def perform(self, transfer: AnyTransfer, effect: ev.Effect) -> None:
        """Do one thing that a transfer wants."""
        self._moves[type(effect)](transfer, effect)

    def on_missing(self, key: ev.Key, event: object) -> None:
        """An event for a transfer that is gone: only a local sink waits for an answer."""
        node = self._node
        if isinstance(event, ev.Pulled) and event.sink == node.settings.boot_id:
            progress = node.sources.unmet.answer(key, event)
            node.post(key._replace(role=Role.SINK), ev.Heard(progress))
        elif isinstance(event, ev.Done):
            node.sources.done_without_transfer(key, event)

    # --- blocks ---

    def _book(self, transfer: AnyTransfer) -> PoolBook:
        return self._node.books[transfer.opening.pool_id]

    def _want_blocks(self, transfer: AnyTransfer, effect: ev.WantBlocks) -> None:
        book = self._book(transfer)
        book.want(transfer.key, effect)
        self._hand_out(book)

    def _free(self, transfer: AnyTransfer, effect: ev.Free) -> None:
        book = self._book(transfer)
        for lease in effect.leases:
            book.pool.free_front(lease, lease.run.blocks)
        self._hand_out(book)

    def _free_tail(self, transfer: AnyTransfer, effect: ev.FreeTail) -> None:
        book = self._book(transfer)
        for lease in effect.leases:
            book.pool.free_tail(lease)
        self._hand_out(book)

    def _quarantine(self, transfer: AnyTransfer, effect: ev.Quarantine) -> None:
        for lease in effect.leases:
            self._book(transfer).pool.quarantine(lease)

    def forget(self, transfer: AnyTransfer) -> None:
        """A transfer is gone, and whatever was kept for it."""
        book = self._book(transfer)
        book.forget(transfer.key)
        self._hand_out(book)

    def hand_out_crumbs(self, pool_id: str) -> None:
        """No share came together in a while: those who hold the rest may not move at all."""
        del self._node.crumbs_due[pool_id]
        book = self._node.books.get(pool_id)
        if book is not None:
            self._hand_out(book, crumbs=True)

    def _hand_out(self, book: PoolBook, *, crumbs: bool = False) -> None:
        node, granted = self._node, False
        for key, grant in book.grants(node.owed.is_lost, crumbs=crumbs):
            granted = True
            blocks = sum(lease.run.blocks for lease in grant.leases)
            book.on_the_way(key, blocks)
            if not grant.dirty:
                node.post(key, ev.Granted(grant.leases))
                continue
            node.post(key, ev.Promised(blocks))
            self._tickets += 1
            self._zeroing[self._tickets] = Zeroing(key, grant.leases)
            node.effects.append(out.Zero(book.pool_id, grant.dirty, self._tickets))
        if not book.holds_back:
            node.crumbs_due.pop(book.pool_id, None)
        elif granted or book.pool_id not in node.crumbs_due:
            node.crumbs_due[book.pool_id] = node.now_s + CRUMBS_S
        for key in book.ready_to_try(node.owed.is_lost):
            node.post(key, ev.RoomAgain())

    def on_zeroed(self, event: out.Zeroed) -> None:
        """Nothing of another owner is left in these blocks."""
        key, leases = self._zeroing.pop(event.ticket)
        self._node.post(key, ev.Granted(leases, promised=True))

    # --- sink ---

    def _claim(self, transfer: SinkTransfer, effect: ev.Claim) -> None:
        node = self._node
        handle = node.sinks.handle_of(transfer.key) + effect.part
        node.meters.claimed(effect.key, handle, effect.first_token, node.now_s)
        chunk = (transfer.key, effect.part, effect.first_token, effect.tokens)
        node.chronicle.chunk_begun(effect.key, *chunk)
        node.effects.append(
            out.Expect(
                effect.key,
                transfer.opening.pool_id,
                handle,
                effect.first_token,
                effect.tokens,
                effect.place,
                _slices(transfer, effect.part),
            )
        )

    def _cancel_claims(self, transfer: SinkTransfer, _effect: ev.CancelClaims) -> None:
        handle = self._node.sinks.handle_of(transfer.key)
        self._node.effects.append(out.CancelExpected(handle))

    def _close_stream(self, transfer: AnyTransfer, effect: ev.CloseStream) -> None:
        if effect.key.is_here:
            return  # nobody but our own thread can be behind, and it says when it has ended
        if transfer.key.role is Role.SINK:
            self._node.sinks.close_stream(effect.key)
        else:
            self._node.effects.append(out.Expel(effect.key))

    def _send_pull(self, transfer: SinkTransfer, effect: ev.SendPull) -> None:
        node, key, opening = self._node, transfer.key, transfer.opening
        pull = Pull.model_construct(
            transfer_id=key.transfer_id,
            attempt=key.attempt,
            number=effect.number,
            handle=node.sinks.handle_of(key),
            layout_digest=self._book(transfer).layout.digest,
            start_tokens=opening.start_tokens,
            acked_tokens=effect.acked_tokens,
            world_size=opening.world_size,
            layout=self._book(transfer).layout if effect.show_layout else None,
            traceparent=opening.traceparent if transfer.known_at is None else None,
            want=list(effect.want),
        )
        if opening.source is None:
            node.here.pull(ev.Pulled(node.settings.boot_id, node.settings.daemon_id, pull))
        else:
            node.sinks.say_pull(opening.source, pull)

    def _send_done(self, transfer: SinkTransfer, _effect: ev.SendDone) -> None:
        node, key = self._node, transfer.key
        if transfer.opening.source is None:
            source_key = key._replace(role=Role.SOURCE)
            if node.workers.openings.may_end(source_key, key):
                node.post(source_key, ev.Done(transfer.state, transfer.error))
            node.post(key, ev.DoneNoted())
        else:
            node.sinks.say_done(transfer)

    def _take_over(self, transfer: SinkTransfer, effect: ev.TakeOver) -> None:
        """Hand-over within one pool: accounts change, no byte does."""
        node, book = self._node, self._book(transfer)
        source_key = transfer.key._replace(role=Role.SOURCE)
        node.pay(source_key)  # it may free blocks, which changes what room there is
        source = node.transfers.get(source_key)
        if source is None or not can_take_over(source, transfer):
            return  # its pull says so
        ranks = transfer.ranks.size
        reserve = 0 if transfer.opening.max_tokens is None else self._whole(transfer) * ranks
        blocks = book.room_to_take_over(transfer.key, effect.blocks * ranks, reserve) // ranks
        if blocks:  # at once: the room found may be gone when the queue comes to it
            node.apply(source_key, ev.GiveOver(effect.first_token, blocks))

    def _whole(self, transfer: SinkTransfer) -> int:
        """Blocks that are still to come."""
        size = transfer.opening.block_size_tokens
        return -(-(transfer.target_tokens - transfer.window.edge_tokens) // size)

    # --- source ---

    def _send_progress(self, transfer: SourceTransfer, effect: ev.SendProgress) -> None:
        node, key = self._node, transfer.key
        progress = Progress.model_construct(
            transfer_id=key.transfer_id,
            attempt=key.attempt,
            number=effect.number,
            known=True,
            state=State.FAILED if effect.error else transfer.state,
            error=effect.error or transfer.error,
            layout=None,
            **self._payload_told(transfer, effect),
        )
        if effect.sink == node.settings.boot_id:
            node.sinks.hear(key._replace(role=Role.SINK), progress)
        else:
            node.sources.say_progress(effect.sink, progress)

    def _payload_told(self, transfer: SourceTransfer, effect: ev.SendProgress) -> dict[str, Any]:
        """What of a payload is told: nothing with an error, nor to a sink that cannot have it."""
        if effect.error or transfer.error or not effect.is_its_own:
            return {}
        return {
            "available_tokens": transfer.servable_tokens,
            "total_tokens": transfer.total_tokens,
            "aux": transfer.aux,
        }

    def _serve(self, transfer: SourceTransfer, effect: ev.Serve) -> None:
        node = self._node
        if not (effect.key.is_here or node.sources.streams.reads(effect.key, transfer.key)):
            node.post(transfer.key, ev.StreamDown(effect.key))  # what it was asked on is closed
            return
        chunk = (transfer.key, effect.part, effect.first_token, effect.tokens)
        node.chronicle.chunk_begun(effect.key, *chunk)
        node.effects.append(
            out.Transmit(
                effect.key,
                transfer.key,
                effect.part,
                transfer.opening.pool_id,
                effect.handle + effect.part,
                effect.first_token,
                effect.tokens,
                effect.place,
                _slices(transfer, effect.part),
            )
        )

    def _hand_over(self, transfer: SourceTransfer, effect: ev.HandOver) -> None:
        node, book = self._node, self._book(transfer)
        sink_key = transfer.key._replace(role=Role.SINK)
        owner = book.owner(sink_key)
        leases = tuple(
            [
                book.pool.regrant(lease, lease.run.blocks, owner, Role.SINK)
                for lease in effect.leases
            ]
        )
        blocks = sum([lease.run.blocks for lease in leases])
        book.took_over(sink_key, blocks)
        book.on_the_way(sink_key, blocks)
        node.counters["blocks_handed_over"] += blocks
        node.post(sink_key, ev.TookOver(leases, effect.tokens))
        self._hand_out(book)  # the source's quota has room for others now


def _slices(transfer: AnyTransfer, part: int) -> out.Slices | None:
    shape = transfer.shape
    return None if shape.slices is None else out.Slices(shape.wire_block_tokens, shape.slices[part])
