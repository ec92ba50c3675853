"""The sink side of one attempt: a window that is filled, and given back as it is taken over.

How it asks its source, and what it has of it, is in ``pulling``. Here is what its workers see: the
window, what they are shown, resumes, and the end.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from kvferry_daemon.core import events as ev
from kvferry_daemon.core.pool import Lease
from kvferry_daemon.core.pulling import PullingTransfer
from kvferry_daemon.core.records import Shown, TransferRecord
from kvferry_daemon.core.transfer import NEVER_S, Aux, Opening
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import StallReason, State


class SinkTransfer(PullingTransfer):
    """See the module's first lines."""

    LIVE: ClassVar[dict[type, Callable[[Any, Any], None]]]
    ENDED: ClassVar[dict[type, Callable[[Any, Any], None]]]

    def __init__(self, opening: Opening, timing: ev.Timing, now_s: float) -> None:
        super().__init__(opening, timing, now_s)
        self.done_noted = False
        self._asked_at = 0  # the snapshot number under which `_shown_ask` was shown first
        self._shown_ask = super()._ask
        self._drain_at_s = NEVER_S

    # --- what others may ask ---

    @property
    def _first_level(self) -> int:
        return -1  # no resume yet

    @property
    def target_tokens(self) -> int:
        """The edge up to which the window may be topped up."""
        opening = self.opening
        edge = opening.max_tokens
        if edge is None:
            edge = self.window.base_tokens + opening.window_tokens
        return edge if self.total_tokens is None else min(edge, self.total_tokens)

    @property
    def wake_at_s(self) -> float:
        if not self.ended:
            return min(self._resend_at_s, self._stalled_at_s)
        due_s = min(self._drain_at_s, NEVER_S if self.done_noted else self._resend_at_s)
        if self._aux_is_awaited:
            due_s = min(due_s, self._forget_s)
        if self.window.blocks and not self.quarantined:
            due_s = min(due_s, self._ended_s + self.timing.hold_s)
        return due_s

    @property
    def settled(self) -> bool:
        return super().settled and (self.done_noted or not self.peer_up)

    @property
    def forgettable(self) -> bool:
        told = self.done_noted or self.now_s >= self._forget_s or not self.peer_met
        is_read = told and not self._aux_is_awaited
        return self.ended and is_read and not self.window.blocks and not self._claims

    @property
    def _forget_s(self) -> float:
        """From then on nobody is waited for that holds no block."""
        return self._ended_s + self.timing.tombstone_s

    @property
    def _aux_is_awaited(self) -> bool:
        """Whether a worker may still come for the values: a tombstone has none."""
        unread = self._has_aux_to_read and not (self.released and self.ranks.complete)
        return unread and self.now_s < self._forget_s

    @property
    def _has_aux_to_read(self) -> bool:
        return self.state is State.SUCCESS and self.aux is not None

    # --- what must last ---

    def mark(self) -> tuple[object, ...]:
        return (*super().mark(), self.known_at is None, self.peer_met, self.done_noted)

    def _record(self) -> dict[str, Any]:
        more: dict[str, Any] = {
            "known": self.known_at is not None,
            "peer_met": self.peer_met,
            "done_noted": self.done_noted,
        }
        if self.ranks.size > 1:
            state, stall, sent_tokens = self._shown_ask
            more["shown"] = Shown(state=state, stall=stall, sent_tokens=sent_tokens)
        return super()._record() | more

    def take_up(self, record: TransferRecord, leases: tuple[Lease, ...], aux: Aux | None) -> None:
        super().take_up(record, leases, aux)
        self.known_at = 0 if record.known else None  # our numbers begin anew
        self.peer_met |= record.peer_met
        self.done_noted = record.done_noted
        self._take_parts()
        self._shown_ask = super()._ask
        if record.shown is not None:
            shown = record.shown
            self._shown_ask = (shown.state, shown.stall, shown.sent_tokens)
        self._asked_at = self.version
        self._seen = self._visible()

    # --- what a group is shown ---

    @property
    def _ask(self) -> tuple[State, StallReason | None, int]:
        return self._shown_ask

    def _publish(self) -> None:
        """Show what asks ranks to act once all have acted on what was shown before (I10).

        So ranks that poll at different moments take the same tokens over. A failure asks nothing;
        and who does not poll any more holds the others up no longer than the window is held.
        """
        now = super()._ask
        if now != self._shown_ask and (
            self.ranks.size == 1
            or self.state is State.FAILED
            or (self.ended and not self.window.blocks)
            or self.now_s >= self._ended_s + self.timing.hold_s
            or self.ranks.have_acted(self._asked_at)
        ):
            self._shown_ask = now
            self._asked_at = self.version + 1

    def _on_acted(self, event: ev.ActedOn) -> None:
        rank = self.ranks[event.rank]
        rank.acted_at = max(rank.acted_at, event.snapshot)

    # --- settling: what follows from the counters alone ---

    def _settle(self) -> None:
        if self._is_whole() and self.sent_tokens == self.total_tokens:
            self._end(State.SUCCESS)
            return
        self._fail_if_stalled()
        if self.ended:
            return
        self._advance_state()
        pulled = False
        if self.takes_over:
            self._take_over()
        else:
            self._ask_for_blocks()
            pulled = self._claim()
        if not pulled:
            self._pull_if_due()
        self.stall = self._why_waiting()

    def _is_whole(self) -> bool:
        aux_here = not self.opening.aux_names or self.aux is not None
        return self.total_tokens is not None and aux_here

    def _advance_state(self) -> None:
        if self.state is State.BOOTSTRAPPING and self.known_at is not None:
            self.state = State.WAITING_FOR_INPUT
        if self.state is State.WAITING_FOR_INPUT and self._edge_to_fetch() > self.sent_tokens:
            self.state = State.TRANSFERRING

    def _blocks_up_to(self, edge_tokens: int) -> int:
        size = self.opening.block_size_tokens
        return max(0, -(-(edge_tokens - self.window.edge_tokens) // size))

    def _ask_for_blocks(self) -> None:
        """Blocks are asked for only when the source has tokens for them.

        Were they held for tokens that do not exist yet, two daemons could each hold what the
        other one waits for. Whole mode reserves everything at that moment, or waits with nothing.
        """
        if self.available_tokens <= self.sent_tokens and not self.window.blocks:
            return
        if not self.ranks.complete:
            return
        whole = self.opening.max_tokens is not None
        edge = self.target_tokens if whole else self._edge_to_fetch()
        self._want(self._blocks_up_to(edge), whole=whole, urgent=not self.window.blocks)

    def _take_over(self) -> None:
        blocks = self._blocks_up_to(self._edge_to_fetch())
        if blocks and self.ranks.complete:
            self._emit(ev.TakeOver(self.window.edge_tokens, blocks))

    def _why_waiting(self) -> StallReason | None:
        if not self.peer_up or not self.ranks.complete:
            return StallReason.WAITING_FOR_PEER
        if self.known_at is None:
            return StallReason.WAITING_FOR_SOURCE
        if self.sent_tokens >= self.target_tokens and self.opening.max_tokens is None:
            return StallReason.WAITING_FOR_RESUME  # the payload goes on, or may go on
        if self.available_tokens <= self.sent_tokens:
            return StallReason.WAITING_FOR_INPUT
        if self.window.edge_tokens <= self.sent_tokens and not self._promised_blocks:
            return StallReason.WAITING_FOR_BLOCKS
        if not self._claims.has_stream and self.opening.source is not None:
            return StallReason.WAITING_FOR_PEER
        return None

    # --- moves ---

    def _on_granted_ended(self, event: ev.Granted) -> None:
        self._emit(ev.Free(event.leases))  # crossed our end; nobody was shown them

    def _on_took_over(self, event: ev.TookOver) -> None:
        first = self.window.edge_tokens
        self.window.add(event.leases)
        for part in self._committed:
            part.add(first, first + event.tokens)
        self._committed_more()

    def _on_late_took_over(self, event: ev.TookOver) -> None:
        self._emit(ev.Free(event.leases))

    def _on_room_again(self, _event: ev.RoomAgain) -> None:
        """Settling tries again."""

    def _on_resume(self, event: ev.ResumeAt) -> None:
        """Design section 3: a resume is a level; only a higher one moves anything."""
        at, rank, shown = event.sent_tokens, self.ranks[event.rank], self._shown_ask[2]
        if at > shown:
            raise FerryError(Code.RESUME_AHEAD, f"resume at {at}, but sent_tokens is {shown}")
        if at <= rank.level_tokens or at < self.partial_sent_tokens:
            return  # stale or repeated
        rank.level_tokens = at
        if at == shown:
            rank.acted_at = max(rank.acted_at, self._asked_at)
        self._progressed()
        lowest = self.ranks.lowest_tokens
        if lowest <= self.last_resume_at:
            return  # another rank of the group still needs what is below
        self.partial_sent_tokens = self.last_resume_at = at = lowest
        if self.opening.max_tokens is not None:
            return  # whole mode keeps everything until release
        size = self.opening.block_size_tokens
        fronts = self.window.drop_to(at // size * size)
        if fronts:
            self._emit(ev.Free(tuple(fronts)))

    # --- the end ---

    def _on_end(self) -> None:
        self._resend_s = self.timing.resend_s
        self._resend_at_s = self.now_s + self._resend_s
        self._emit(ev.SendDone())
        if self.opening.source is None:
            self._emit(ev.WantBlocks(0))  # what was set aside for it, though it asked for none
        if self._claims:
            self._drain_at_s = self.now_s + self.timing.drain_s
            self._emit(ev.CancelClaims())

    def _settle_ended(self) -> None:
        if not self._claims:
            self._drain_at_s = NEVER_S
        if self.released and not self._claims:
            self._free_all()
        elif self.state is State.FAILED or self.now_s >= self._ended_s + self.timing.hold_s:
            self._quarantine()
        if self.window.blocks and self.quarantined:
            self.stall = StallReason.DRAINING
        if self.now_s >= self._drain_at_s:
            self._drain_at_s = self.now_s + self.timing.drain_s
            for key in self._claims.streams_claimed:
                self._emit(ev.CloseStream(key))
        if not self.done_noted and self.now_s >= self._resend_at_s:
            self._resend_s = min(self._resend_s * 2, self.timing.resend_max_s)
            self._resend_at_s = self.now_s + self._resend_s
            self._emit(ev.SendDone())

    def _on_release(self, event: ev.Release) -> None:
        self.ranks.let_go(event.rank)
        message = f"{self._by(event.rank)}released by its worker at token {self.sent_tokens}"
        self._fail(Code.RELEASED_EARLY, message)

    def _on_joined_late(self, event: ev.Joined) -> None:
        """A payload without a token ended before all ranks had come."""
        if self._has_aux_to_read:
            self.ranks.join(event.rank, event.session)  # until it releases, as the others
        else:
            self._on_joined_ended(event)

    def _on_late_received(self, event: ev.Received) -> None:
        self._claims.fulfil(event.key, event.first_token, event.part)  # not committed: it is over

    def _on_done_noted(self, _event: ev.DoneNoted) -> None:
        self.done_noted = True


SinkTransfer.LIVE = {
    ev.Tick: SinkTransfer._on_tick,
    ev.Slept: SinkTransfer._on_slept,
    ev.Joined: SinkTransfer._on_joined,
    ev.ActedOn: SinkTransfer._on_acted,
    ev.Promised: SinkTransfer._on_promised,
    ev.Granted: SinkTransfer._on_granted,
    ev.PeerUp: SinkTransfer._on_peer_up,
    ev.PeerDown: SinkTransfer._on_peer_down,
    ev.NewsLost: SinkTransfer._on_news_lost,
    ev.StreamUp: SinkTransfer._on_stream_up,
    ev.StreamDown: SinkTransfer._on_stream_down,
    ev.Received: SinkTransfer._on_received,
    ev.Missed: SinkTransfer._on_missed,
    ev.TookOver: SinkTransfer._on_took_over,
    ev.RoomAgain: SinkTransfer._on_room_again,
    ev.Shaped: SinkTransfer._on_shaped,
    ev.Copied: SinkTransfer._on_copied,
    ev.Heard: SinkTransfer._on_heard,
    ev.ResumeAt: SinkTransfer._on_resume,
    ev.Release: SinkTransfer._on_release,
    ev.Fail: SinkTransfer._on_fail,
    ev.WorkerLost: SinkTransfer._on_worker_lost,
}
SinkTransfer.ENDED = {
    ev.Tick: SinkTransfer._on_tick,
    ev.Joined: SinkTransfer._on_joined_late,
    ev.ActedOn: SinkTransfer._on_acted,
    ev.Granted: SinkTransfer._on_granted_ended,
    ev.StreamDown: SinkTransfer._on_stream_down,
    ev.Received: SinkTransfer._on_late_received,
    ev.Missed: SinkTransfer._on_missed,
    ev.TookOver: SinkTransfer._on_late_took_over,
    ev.ResumeAt: SinkTransfer._on_resume,  # of a window that is still held
    ev.Release: SinkTransfer._on_release_ended,
    ev.WorkerLost: SinkTransfer._on_worker_lost_ended,
    ev.DoneNoted: SinkTransfer._on_done_noted,
}
