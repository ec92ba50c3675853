"""The verbs of the worker socket: sessions, ownership, and what each call may do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.answers import check_fits, least_bytes, once_each
from kvferry_daemon.core.deeds import Deed
from kvferry_daemon.core.openings import Openings
from kvferry_daemon.core.owed import Loss
from kvferry_daemon.core.polls import WaitingPoll
from kvferry_daemon.core.session import Session
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.welcome import Welcomer
from kvferry_proto import worker
from kvferry_proto.codec import FRAME_BYTES_MAX
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.states import TERMINAL, Role

if TYPE_CHECKING:
    from kvferry_daemon.core.node import AnyTransfer, Node

Named = worker.Send | worker.Ready | worker.Receive | worker.Resume | worker.Release | worker.Abort
AnyCall = worker.Hello | worker.Batch | worker.Poll | worker.Heartbeat | Named
ROUTES_MAX = 64  # a client has up to 33; ZeroMQ gives a reconnect a new one
PLACED_MAX = 128  # snapshots that only tell a slot: a frame has room for them beside the news
NEWLINES = re.compile(r"[\r\n]+")


class WorkerDesk:
    """Answers workers."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._welcomer = Welcomer(node)
        self._routes: dict[bytes, tuple[str, str]] = {}  # route -> session's secret, user
        self.openings = Openings(node)
        self.dying: dict[str, Session] = {}  # dead, and not all of their transfers are told
        self.on_pool_made = self._welcomer.on_pool_made
        self.on_pool_not_made = self._welcomer.on_pool_not_made
        self.on_pool_broken = self._welcomer.lost_pools.on_broken
        self.check_pool = self._welcomer.lost_pools.check_book

    # --- calls ---

    def on_call(self, event: out.WorkerCalled) -> None:
        """Answer one call; a refusal is an answer too and changes nothing."""
        call = event.call
        reply: out.WorkerReply | None
        try:
            if isinstance(call, worker.Hello):
                self._welcomer.on_hello(event, call)
                return
            session = self._session_of(event.route, event.user)
            session.heard_s, session.lost = self._node.now_s, False
            if isinstance(call, worker.Batch):
                self._say(event.route, self._batch(session, event.route, call))
                return
            reply = self._answer(session, event.route, call, may_wait=True)
            if reply is not None:
                check_fits(reply)
        except FerryError as error:
            self._note_refused(event.user, call, error)
            reply = self._failure(call.call, error)
        if reply is not None:
            self._say(event.route, reply)

    def refuse(self, route: bytes, call: int, error: FerryError) -> None:
        """Answer a call that waited with an error."""
        self._say(route, self._failure(call, error))

    def bind(self, route: bytes, user: str, session: Session) -> None:
        """Calls from this connection are the session's from now on; old connections go."""
        session.routes[route] = None
        self._routes[route] = session.secret, user
        while len(session.routes) > ROUTES_MAX:
            oldest = next(iter(session.routes))
            del session.routes[oldest]
            self._routes.pop(oldest, None)

    def _say(self, route: bytes, reply: out.WorkerReply) -> None:
        self._node.effects.append(out.ToWorker(route, reply))

    def _failure(self, call: int, error: FerryError) -> worker.Failure:
        self._node.counters[f"refused_{error.code.value}"] += 1
        return worker.Failure(call=call, error=ErrorInfo.of_error(error))

    def _note_refused(self, user: str, call: AnyCall, error: FerryError) -> None:
        deed = Deed(
            "refused",
            user,
            asked=call.kind,
            transfer_id=getattr(call, "transfer_id", ""),
            attempt=getattr(call, "attempt", None),
            code=error.code.value,
            why=error.message,
        )
        self._node.deeds.append(deed)

    def session_at(self, route: bytes, user: str) -> Session | None:
        """The session of this connection. Who took the route of another one over has none."""
        secret, bound_user = self._routes.get(route, ("", ""))
        return self._node.sessions.get(secret) if user == bound_user else None

    def _session_of(self, route: bytes, user: str) -> Session:
        session = self.session_at(route, user)
        if session is None:
            raise FerryError(Code.HELLO_FIRST, "this connection belongs to no session")
        return session

    def _batch(self, session: Session, route: bytes, batch: worker.Batch) -> worker.BatchReply:
        """Make its calls, all of them; what is answered fits into a frame."""
        replies: list[worker.Snapshots | worker.Failure] = []
        room_bytes = FRAME_BYTES_MAX
        for call in batch.calls:
            replies.append(self._one_of_batch(session, route, call, room_bytes))
            room_bytes -= least_bytes(replies[-1])
        return worker.BatchReply(call=batch.call, replies=replies)

    def _one_of_batch(
        self, session: Session, route: bytes, call: worker.Verb, room_bytes: int
    ) -> worker.Snapshots | worker.Failure:
        try:
            reply = self._answer(session, route, call, may_wait=False)
            assert reply is not None
            check_fits(reply, room_bytes)
        except FerryError as error:
            self._note_refused(session.user, call, error)
            return self._failure(call.call, error)
        return reply

    def _answer(
        self, session: Session, route: bytes, call: worker.Verb, *, may_wait: bool
    ) -> worker.Snapshots | None:
        match call:
            case worker.Poll():
                return self._poll(session, route, call, may_wait=may_wait)
            case worker.Heartbeat():
                return worker.Snapshots(call=call.call)
            case worker.Send():
                self.openings.open(session, call, Role.SOURCE)
                key = ev.Key(Role.SOURCE, call.transfer_id, call.attempt)
            case worker.Receive():
                self.openings.open(session, call, Role.SINK)
                key = ev.Key(Role.SINK, call.transfer_id, call.attempt)
            case worker.Ready():
                key = self._current(session, call, Role.SOURCE)
                self._node.check_aux(key, call.aux)
                told = ev.ReadyTo(call.ready_tokens, call.total_tokens, call.aux, call.rank)
                self._node.run_now(key, told)
            case worker.Resume():
                key = self._current(session, call, Role.SINK)
                self._resume(session, key, call)
            case worker.Release():
                key = self._named(session, call, call.role)
                self._node.run_now(key, ev.Release(call.rank))
            case worker.Abort():
                key = self._named(session, call, call.role)
                reason = NEWLINES.sub(" ", call.reason) or "no reason given"
                who = f"{call.role}, rank {call.rank}" if call.rank else call.role
                transfer = self._node.transfers.get(key)
                if transfer is not None and not transfer.ended:
                    self._node.note("aborted", session, key, reason)
                self._node.run_now(key, ev.Fail(Code.ABORTED, f"by its {who}: {reason}"))
        return worker.Snapshots(call=call.call, transfers=[self._snapshot(key, call.rank)])

    # --- finding ---

    def _named(self, session: Session, call: Named, role: Role) -> ev.Key:
        key = ev.Key(role, call.transfer_id, call.attempt)
        self.openings.check_owner(session, key, call.rank)
        return key

    def _current(self, session: Session, call: Named, role: Role) -> ev.Key:
        newest = self._node.current.get((role, call.transfer_id), -1)
        if call.attempt < newest:
            raise FerryError(Code.STALE_ATTEMPT, f"attempt {newest} is known already")
        return self._named(session, call, role)

    def _snapshot(self, key: ev.Key, rank: int) -> worker.Snapshot:
        transfer = self._node.transfers.get(key)
        if transfer is not None:
            return transfer.snapshot(rank)
        stone = self._node.tombstones.get(key)
        assert stone is not None, key
        return stone.shown_to(rank)

    def _resume(self, session: Session, key: ev.Key, call: worker.Resume) -> None:
        node, sent_tokens = self._node, call.sent_tokens
        transfer = node.transfers.get(key)
        if not isinstance(transfer, SinkTransfer):
            return  # ended and given back: the snapshot says so
        rank = transfer.ranks[call.rank]
        before = rank.level_tokens
        node.run_now(key, ev.ResumeAt(sent_tokens, call.rank))
        after = rank.level_tokens
        what = "accepted" if after != before else "repeated" if sent_tokens == before else "stale"
        node.counters[f"resumes_{what}"] += 1
        if what == "accepted":
            node.note("resumed", session, key)

    # --- polls ---

    def _poll(
        self, session: Session, route: bytes, call: worker.Poll, *, may_wait: bool
    ) -> worker.Snapshots | None:
        snapshots, refused, after = [], [], {}
        live, placed = False, 0
        for watched in once_each(call.transfers):
            key = ev.Key(watched.role, watched.transfer_id, watched.attempt)
            try:
                snapshot = self._shown(session, key, watched, board=call.board)
            except FerryError as error:
                refused.append(self._refused(watched, error))
                continue
            after[key, watched.rank] = watched.after
            live |= snapshot.state not in TERMINAL
            if snapshot.snapshot > watched.after:
                snapshots.append(snapshot)
            elif call.board and snapshot.slot is not None and placed < PLACED_MAX:
                snapshots.append(snapshot)
                placed += 1
        if snapshots or refused or not live or not may_wait or call.wait_s == 0:
            return worker.Snapshots(call=call.call, transfers=snapshots, refused=refused)
        until_s = self._node.now_s + call.wait_s
        number = self._node.polls.add(WaitingPoll(session.secret, route, call.call, after, until_s))
        self._node.timers.schedule(number, until_s)
        return None

    def _shown(
        self, session: Session, key: ev.Key, watched: worker.Watched, *, board: bool
    ) -> worker.Snapshot:
        """What a poll sees of one transfer; FerryError if it may not. Most polls are only this."""
        transfers, rank = self._node.transfers, watched.rank
        transfer = transfers.get(key)
        if transfer is None or not transfer.ranks.is_of(rank, session.secret):
            self.openings.check_owner(session, key, rank)
        if transfer is not None and transfer.ranks.size > 1:
            self._has_acted(key, transfer, watched)
            transfer = transfers.get(key)
        if transfer is None:
            return self._snapshot(key, rank)
        if board:
            self._node.boards.give(transfer, rank)
        return transfer.snapshot(rank)

    def _has_acted(self, key: ev.Key, transfer: AnyTransfer, watched: worker.Watched) -> None:
        """A rank that polls behind a snapshot is through with it."""
        seen = min(watched.after, transfer.version)
        if seen > transfer.ranks[watched.rank].acted_at:
            self._node.run_now(key, ev.ActedOn(seen, watched.rank))

    def _refused(self, watched: worker.Watched, error: FerryError) -> worker.Refused:
        return worker.Refused(
            role=watched.role,
            transfer_id=watched.transfer_id,
            attempt=watched.attempt,
            rank=watched.rank,
            error=ErrorInfo.of_error(error),
        )

    def answer_poll(self, poll: WaitingPoll, *, is_full: bool) -> int:
        """Answer a poll that waited, with all that has changed by now; return how large that is.

        ``is_full``: with nothing, as if its time was up.
        """
        reply = worker.Snapshots(call=poll.call, transfers=[] if is_full else self._news_of(poll))
        try:
            check_fits(reply)
        except FerryError as error:
            self.refuse(poll.route, poll.call, error)
            return 0
        self._say(poll.route, reply)
        return least_bytes(reply)

    def _news_of(self, poll: WaitingPoll) -> list[worker.Snapshot]:
        seen = [
            (self._snapshot(key, rank), after)
            for (key, rank), after in poll.after.items()
            if self._exists(key)
        ]
        return [snapshot for snapshot, after in seen if snapshot.snapshot > after]

    def _exists(self, key: ev.Key) -> bool:
        return key in self._node.transfers or self._node.tombstones.get(key) is not None

    # --- workers that go ---

    def notice_silence(self) -> None:
        """A worker that does not beat is lost; that proves nothing about its blocks."""
        node = self._node
        lost_s = node.settings.timing.lost_s
        for session in node.sessions.values():
            if not session.lost and node.now_s - session.heard_s >= lost_s:
                session.lost = True
                self._lose(session, dead=False, why=f"silent for {lost_s:g} s")

    def on_slept(self, for_s: float) -> None:
        """We stood still ourselves: the beats of that time are still to be read."""
        for session in self._node.sessions.values():
            session.heard_s += for_s

    def on_lock_dropped(self, event: out.LockDropped) -> None:
        """The process is gone: nobody maps its blocks any more.

        Its session is gone at once, but in the ledger only with the last of its transfers: a later
        life of ours finds it dead anew, and tells the others.
        """
        node = self._node
        session = node.sessions.pop(event.session, None)
        if session is None:
            return
        for route in session.routes:
            self._routes.pop(route, None)
        self.dying[event.session] = session
        self._lose(session, dead=True, why="its process has ended")

    def _lose(self, session: Session, *, dead: bool, why: str) -> None:
        name, keys = session.name or f"pid {session.pid}", session.keys
        loss = Loss(session.secret, dead, f"worker {name}: {why}", len(keys))
        self._node.tell(keys, loss)
        self._forget_once_told(loss)

    def tell_loss(self, key: ev.Key, loss: Loss) -> None:
        """One of its transfers hears of it."""
        transfer = self._node.transfers.get(key)
        for rank in transfer.ranks.of(loss.session) if transfer else ():
            self._node.apply(key, ev.WorkerLost(loss.dead, loss.message, rank))
        loss.untold -= 1
        self._forget_once_told(loss)

    def _forget_once_told(self, loss: Loss) -> None:
        if loss.dead and not loss.untold:
            del self.dying[loss.session]
            self._node.notes.session_gone(loss.session)
            self._node.effects.append(out.ForgetWorker(loss.session))
