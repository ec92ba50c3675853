"""Hello: a worker's session, and the pool that comes into being for its layout."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.blocks import PoolBook
from kvferry_daemon.core.boards import board_path
from kvferry_daemon.core.lost_pools import LostPools
from kvferry_daemon.core.pool import LEASES_OF_A_LIFE, BlockPool
from kvferry_daemon.core.session import Session
from kvferry_daemon.core.tenants import are_one, pool_id_of, process_of, tenant_of
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError, exhausted
from kvferry_proto.layout import Layout
from kvferry_proto.versions import agree

if TYPE_CHECKING:
    from kvferry_daemon.core.node import Node


SESSIONS_OF_ONE_MAX = 128  # of one process: as many as it may have connections
TENANT_SHARE = 4  # of all sessions that there may be, one tenant has a part of so many at most


class Welcomer:
    """Answers hellos, at once or when their pool has been made."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.lost_pools = LostPools(node)
        self._being_made: dict[str, tuple[Layout, int, dict[bytes, out.WorkerCalled]]] = {}

    def on_hello(self, event: out.WorkerCalled, hello: worker.Hello) -> None:
        """Refuse, welcome, or wait for the pool."""
        route = event.route
        agree(hello.versions)
        if not event.lock_held:
            raise FerryError(Code.WORKER_NOT_LOCKED, f"nobody holds a flock on {hello.lock!r}")
        self._check_session(event, hello)
        pool_id = self._pool_id(event, hello)
        book = self._node.books.get(pool_id)
        if book is not None and (not book.lost or hello.session is not None):
            self._welcome(event, hello)
        elif pool_id in self._being_made:
            waiting = self._being_made[pool_id][2]
            waiting[route] = event
        else:
            self.lost_pools.check_device()
            if book is not None:
                self.lost_pools.clear(book)
            blocks = self._blocks_for(pool_id, hello.layout)
            self._being_made[pool_id] = (hello.layout, blocks, {route: event})
            self._node.effects.append(out.MakePool(pool_id, hello.layout, blocks))

    def _pool_id(self, event: out.WorkerCalled, hello: worker.Hello) -> str:
        """The pool of this layout that is this user's: whose it is, no word of a worker says."""
        return pool_id_of(hello.layout, tenant_of(event.user, self._node.settings.tenancy))

    def _check_lock(self, hello: worker.Hello) -> None:
        """One lock, one worker: if it came back under the old name, nobody could see it was dead."""
        node = self._node
        if any(
            one.lock == hello.lock
            for sessions in (node.sessions, node.workers.dying)
            for one in sessions.values()
        ):
            raise FerryError(
                Code.WORKER_NOT_LOCKED, f"{hello.lock!r} belongs to another session; take a new one"
            )

    def _check_room(self, event: out.WorkerCalled) -> None:
        """One more session, here or waiting for its pool; one process, one tenant leaves others room."""
        settings, user = self._node.settings, event.user
        users = [session.user for session in self._node.sessions.values()]
        for _, _, waiting in self._being_made.values():
            users += [one.user for route, one in waiting.items() if route != event.route]
        if len(users) >= settings.workers_max:
            raise exhausted(f"{len(users)} workers are here")
        counts, process = Counter(users), process_of(user)  # few, of whoever comes without an end
        own = sum(count for one, count in counts.items() if process_of(one) == process)
        if own >= SESSIONS_OF_ONE_MAX:
            raise exhausted(f"{own} workers are here of this process, or of its user's containers")
        if settings.tenancy == "off":
            return
        tenant = tenant_of(user, settings.tenancy)
        own = sum(n for one, n in counts.items() if tenant_of(one, settings.tenancy) == tenant)
        if own >= max(1, settings.workers_max // TENANT_SHARE):
            raise exhausted(f"{own} workers are here of this user")

    def _check_session(self, event: out.WorkerCalled, hello: worker.Hello) -> None:
        sessions = self._node.sessions
        if hello.session is None:
            if self._repeated(event, hello) is None:
                self._check_lock(hello)
                self._check_room(event)
            return
        session = sessions.get(hello.session)
        if session is None or not session.belongs_to(event.user):
            raise FerryError(Code.UNKNOWN_SESSION, "this daemon knows no such session of yours")
        if session.pool_id != self._pool_id(event, hello) or session.lock != hello.lock:
            raise FerryError(
                Code.PARAMETERS_DIFFER, "a session keeps the layout and lock of its first hello"
            )

    def _blocks_for(self, pool_id: str, layout: Layout) -> int:
        """How many blocks the pool gets; FerryError(pool_refused) with the numbers if too few."""
        settings = self._node.settings
        size = layout.block_size_tokens
        window = -(-settings.window_tokens // size)
        blocks = self._room_for(pool_id, layout)
        if max(self._quotas(blocks)) < window:
            self._drop_unused()
            blocks = self._room_for(pool_id, layout)
        largest = max(self._quotas(blocks))
        if largest < window:
            left = self._bytes_left(pool_id)
            raise FerryError(
                Code.POOL_REFUSED,
                f"a window of {settings.window_tokens} tokens needs {window} blocks of "
                f"{layout.block_bytes} bytes, {window * layout.block_bytes} in all; {left} of the "
                f"budget's {settings.budget_bytes} bytes are left, which gives a pool of {blocks} "
                f"blocks, at most {largest} for one role",
            )
        return blocks

    def _bytes_left(self, pool_id: str) -> int:
        """What a new pool may take: of all there is, and of what its tenant may have."""
        settings = self._node.settings
        used = [
            (book.pool_id, book.layout.block_bytes * book.pool.blocks)
            for book in self._node.books.values()
        ]
        used += [
            (one, layout.block_bytes * blocks)
            for one, (layout, blocks, _) in self._being_made.items()
        ]
        left = settings.budget_bytes - sum(size for _, size in used)
        if settings.tenant_budget_bytes is None:
            return left
        its_own = sum(size for one, size in used if are_one(one, pool_id))
        return min(left, settings.tenant_budget_bytes - its_own)

    def _room_for(self, pool_id: str, layout: Layout) -> int:
        blocks = max(0, self._bytes_left(pool_id)) // layout.block_bytes
        most_tokens = self._node.settings.pool_tokens
        if most_tokens is not None:
            blocks = min(blocks, most_tokens // layout.block_size_tokens)
        return blocks

    def _drop_unused(self) -> None:
        """Pools that no worker and no transfer uses make room for others."""
        node = self._node
        used = {session.pool_id for session in node.sessions.values()}
        used |= {transfer.opening.pool_id for transfer in node.transfers.values()}
        used |= self._being_made.keys()  # anew, in the place of one that was lost
        for pool_id in [one for one in node.books if one not in used]:
            del node.books[pool_id]
            node.notes.pool_gone(pool_id)
            node.boards.drop(pool_id)
            node.effects.append(out.DropPool(pool_id))

    def _quotas(self, blocks: int) -> tuple[int, int]:
        source = round(blocks * self._node.settings.source_share)
        return source, blocks - source

    def on_pool_made(self, event: out.PoolMade) -> None:
        """Open the books and welcome all who waited."""
        layout, blocks, waiting = self._being_made.pop(event.pool_id)
        source, sink = self._quotas(blocks)
        last_lease_id = self._node.settings.life * LEASES_OF_A_LIFE
        pool = BlockPool(blocks, source, sink, last_lease_id)
        device = self._node.settings.device
        book = PoolBook(event.pool_id, event.path, device, layout, pool, source, sink, event.memory)
        self._node.books[event.pool_id] = book
        self._node.notes.pool(book)
        for hello in waiting.values():
            self._node.workers.on_call(hello)

    def on_pool_not_made(self, event: out.PoolNotMade) -> None:
        """Tell all who waited why there is no pool."""
        _, _, waiting = self._being_made.pop(event.pool_id)
        message = self.lost_pools.on_not_made(event)
        for route, hello in waiting.items():
            self._node.workers.refuse(route, hello.call.call, FerryError(event.code, message))

    def _welcome(self, event: out.WorkerCalled, hello: worker.Hello) -> None:
        node, route = self._node, event.route
        book = node.books[self._pool_id(event, hello)]
        session = node.sessions.get(hello.session or "") or self._repeated(event, hello)
        session = session or self._new_session(event, hello, book)
        session.heard_s, session.lost = node.now_s, False
        node.workers.bind(route, event.user, session)
        node.effects.append(
            out.ToWorker(
                route,
                worker.Welcome(
                    call=hello.call,
                    version=agree(hello.versions),
                    boot_id=node.settings.boot_id,
                    session=session.secret,
                    pool=worker.PoolInfo(
                        path=book.path if book.memory is None else "",
                        blocks=book.pool.blocks,
                        block_bytes=book.layout.block_bytes,
                        window_tokens=node.settings.window_tokens,
                        board=board_path(book.path),
                        device=book.memory,
                    ),
                    heartbeat_s=node.settings.timing.heartbeat_s,
                    peer_address=node.settings.peer_address,
                ),
            )
        )

    def _repeated(self, event: out.WorkerCalled, hello: worker.Hello) -> Session | None:
        """A first hello that was said again, on the same connection, is the same session."""
        session = self._node.workers.session_at(event.route, event.user)
        if session is None or session.lock != hello.lock:
            return None
        return session if session.pool_id == self._pool_id(event, hello) else None

    def _new_session(self, event: out.WorkerCalled, hello: worker.Hello, book: PoolBook) -> Session:
        node = self._node
        secret = node.new_secret().hex()
        session = Session(
            secret, hello.worker, hello.pid, hello.lock, book.pool_id, node.now_s, event.user
        )
        node.sessions[secret] = session
        node.notes.session(session)
        node.effects.append(out.WatchWorker(secret, hello.lock))
        return session
