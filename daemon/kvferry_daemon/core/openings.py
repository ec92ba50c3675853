"""How workers open transfers: at first, again, as one more rank of a group, or as a retry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core import events as ev
from kvferry_daemon.core.aux_values import difference, digest_of
from kvferry_daemon.core.opening import Opened, opening_of, timing_of
from kvferry_daemon.core.readiness import check_ready
from kvferry_daemon.core.session import Session
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.source import SourceTransfer
from kvferry_daemon.core.tenants import are_one, not_yours, tenant_in
from kvferry_daemon.core.transfer import Transfer
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError, exhausted
from kvferry_proto.states import Role

if TYPE_CHECKING:
    from kvferry_daemon.core.node import Node

OF_A_RANK = {"call", "rank", "traceparent"}  # what each worker says for itself, each time
OF_A_GROUPS_RANK = OF_A_RANK | {"total_tokens", "aux"}


class Openings:
    """Knows what was opened with what, and whose it is."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._opened: dict[ev.Key, Opened] = {}  # by the first rank

    def open(self, session: Session, call: worker.Send | worker.Receive, role: Role) -> None:
        """Open a transfer, join its group, or find that this worker has done so before."""
        node = self._node
        key = ev.Key(role, call.transfer_id, call.attempt)
        self._check_tenant(session, key)
        newest = node.current.get((role, call.transfer_id), -1)
        if call.attempt < newest:
            raise FerryError(Code.STALE_ATTEMPT, f"attempt {newest} is known already")
        self._check_retry(session, key, newest)
        if self._is_repeated(session, key, call):
            if isinstance(call, worker.Send) and call.world_size > 1:
                node.check_aux(key, call.aux)
                node.run_now(key, _told(call))  # its own: no parameters of the group
            return
        if key in node.transfers or node.tombstones.get(key) is not None:
            self._join(session, key, call)
            return
        book = node.books[session.pool_id]
        node.workers.check_pool(book)
        opening = opening_of(key, session, book, node.settings, call)  # refuses bad numbers
        if node.draining:
            raise FerryError(Code.DRAINING, "no new transfers are taken")
        if len(node.transfers) >= node.settings.transfers_max:
            raise exhausted(f"{len(node.transfers)} transfers are open already")
        if len(session.keys) >= node.settings.worker_transfers_max:
            raise exhausted(f"this worker has {len(session.keys)} transfers open")
        timing, now_s = timing_of(call, node.settings), node.now_s
        opened = Opened.by(call, book.pool_id)
        if isinstance(call, worker.Receive):
            if opening.source is None:
                self._check_tenant(session, key._replace(role=Role.SOURCE))
            node.sinks.check_room(opening.source, session)
            self._supersede(key, newest)
            self.know(key, opened)
            node.open(SinkTransfer(opening, timing, now_s), opened)
            node.sinks.attach(key)
            return
        source = SourceTransfer(opening, timing, now_s)
        told = _told(call)
        check_ready(source, told)
        node.aux_books.check(opening, told.aux)
        self._supersede(key, newest)
        self.know(key, opened)
        node.open(source, opened)
        node.run_now(key, told)
        node.sources.unmet.replay(key)

    def know(self, key: ev.Key, opened: Opened) -> None:
        """A transfer was opened, now or in an earlier life, for a pool of its tenant."""
        self._opened[key] = opened

    def _pool_of(self, key: ev.Key) -> str | None:
        opened = self._opened.get(key)
        return None if opened is None else opened.pool_id

    def are_strangers(self, key: ev.Key, other: ev.Key) -> bool:
        """Whether two tenants have opened these: nothing may pass between them here."""
        pool_id, others = self._pool_of(key), self._pool_of(other)
        return pool_id is not None and others is not None and not are_one(pool_id, others)

    def may_end(self, source: ev.Key, sink: ev.Key) -> bool:
        """Whether a sink's end is told to its source here.

        With tenants not to one that nobody has opened yet: it may become another tenant's.
        """
        pool_id = self._pool_of(sink)
        if pool_id is not None and tenant_in(pool_id) and source not in self._opened:
            return False
        return not self.are_strangers(source, sink)

    def _check_tenant(self, session: Session, key: ev.Key) -> None:
        """Raise FerryError if another tenant has opened this, be it over or not."""
        if not are_one(self._pool_of(key) or session.pool_id, session.pool_id):
            raise not_yours(key.transfer_id)

    def _check_retry(self, session: Session, key: ev.Key, newest: int) -> None:
        """A higher attempt ends the one before it, which only its own user may do."""
        older = key._replace(attempt=newest)
        before = self._node.transfers.get(older)
        if before is None or before.ended:
            return
        self._check_tenant(session, older)  # also where the session is gone
        owner = self._node.sessions.get(before.opening.session)
        if owner is not None and not owner.belongs_to(session.user):
            raise FerryError(Code.NOT_YOUR_TRANSFER, f"attempt {newest} was opened by another user")

    def _supersede(self, key: ev.Key, newest: int) -> None:
        """A higher attempt has come: the one before it ends."""
        old = key._replace(attempt=newest)
        if old in self._node.transfers:
            message = f"attempt {key.attempt} took over"
            self._node.run_now(old, ev.Fail(Code.SUPERSEDED, message))

    def _is_repeated(
        self, session: Session, key: ev.Key, call: worker.Send | worker.Receive
    ) -> bool:
        """Whether this worker has opened it before; FerryError if it was not quite this."""
        owner = self._owner(key, call.rank)
        if owner is None or (not owner and key in self._opened):
            return False
        different = self._difference(key, call)
        if owner not in ("", session.secret) and call.world_size > 1 and not different:
            raise FerryError(
                Code.RANK_TAKEN, f"rank {call.rank} of {key.transfer_id!r} is another session's"
            )
        self.check_owner(session, key, call.rank)
        if different:
            raise FerryError(Code.PARAMETERS_DIFFER, different)
        return True

    def _join(self, session: Session, key: ev.Key, call: worker.Send | worker.Receive) -> None:
        """One more rank of a group: it must have come for the same."""
        node = self._node
        ranks = self._opened[key].call.world_size
        different = self._difference(key, call)
        if call.rank >= ranks and not different:
            raise FerryError(Code.BAD_RANK, f"rank {call.rank} of a group of {ranks}")
        transfer = node.transfers.get(key)
        if transfer is not None and transfer.opening.pool_id != session.pool_id:
            ours = node.books[transfer.opening.pool_id].layout
            layouts = ours.first_difference(node.books[session.pool_id].layout)
            different = different or f"the layouts differ in {layouts}"
        if different:
            raise FerryError(Code.GROUP_DIFFERS, f"of the ranks before and this one {different}")
        if transfer is None:
            return  # over: the snapshot says how
        told = _told(call) if isinstance(call, worker.Send) else None
        if told is not None and isinstance(transfer, SourceTransfer) and not transfer.ended:
            check_ready(transfer, told)  # who is refused has not come
            node.check_aux(key, told.aux)
        node.run_now(key, ev.Joined(call.rank, session.secret))
        node.note("joined", session, key)
        if told is not None:
            node.run_now(key, told)
        if key in node.transfers:  # else its time was up, and it is forgotten by now
            session.keys[key] = None

    def forget(self, key: ev.Key) -> None:
        """The tombstone of a transfer is gone."""
        self._opened.pop(key, None)

    def _difference(self, key: ev.Key, now: worker.Send | worker.Receive) -> str:
        """The first parameter that the same call, or another rank's, must not have changed."""
        if key not in self._opened:
            return ""
        before, aux_digest, _ = self._opened[key]
        own = OF_A_RANK if before.world_size == now.world_size == 1 else OF_A_GROUPS_RANK
        for name in type(before).model_fields:
            if name not in own | {"aux"} and getattr(before, name) != getattr(now, name):
                return f"{name} was {getattr(before, name)}, now {getattr(now, name)}"
        if "aux" in own or isinstance(now, worker.Receive) or aux_digest == digest_of(now.aux):
            return ""
        transfer = self._node.transfers.get(key)
        return difference(None if transfer is None else transfer.aux, now.aux)

    def _owner(self, key: ev.Key, rank: int) -> str | None:
        """Whose a rank is; empty if nobody has come for it, None without such a transfer."""
        transfer = self._node.transfers.get(key)
        if transfer is not None:
            return transfer.ranks[rank].session if rank < transfer.ranks.size else ""
        stone = self._node.tombstones.get(key)
        return None if stone is None else stone.owner(rank)

    def _is_lost(self, key: ev.Key, owner: str | None) -> bool:
        """Whether it failed with its pool, and its session too: its worker asks in a new one."""
        thing = self._node.transfers.get(key) or self._node.tombstones.get(key)
        if not owner or owner in self._node.sessions or thing is None:
            return False
        error = thing.error if isinstance(thing, Transfer) else thing.snapshot.error
        return error is not None and error.code in (Code.POOL_LOST, Code.DEVICE_FAILED)

    def check_owner(self, session: Session, key: ev.Key, rank: int) -> None:
        """Raise FerryError unless a rank of a transfer is this worker's."""
        self._check_tenant(session, key)
        owner = self._owner(key, rank)
        if owner == session.secret or self._is_lost(key, owner):
            return
        if owner is None or (not owner and key in self._node.transfers):
            which = f" rank {rank}" if rank else ""
            raise FerryError(
                Code.UNKNOWN_TRANSFER,
                f"no {key.role} transfer {key.transfer_id!r} attempt {key.attempt}{which} here",
            )
        if owner:
            raise FerryError(
                Code.NOT_YOUR_TRANSFER, f"{key.transfer_id!r} was opened by another session"
            )


def _told(call: worker.Send) -> ev.ReadyTo:
    """What a source's rank says of itself as it comes."""
    return ev.ReadyTo(call.start_tokens, call.total_tokens, call.aux, call.rank)
