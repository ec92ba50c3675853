"""The sink side of one attempt: it asks, receives, and gives blocks back as they are taken over.

Progress is ``sent_tokens``: the gapless prefix of extents that were claimed, verified and
committed. Asking is level-triggered: every pull says what is wanted now, and a timer repeats it.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from kvferry_daemon.core import events as ev
from kvferry_daemon.core.claims import Claims
from kvferry_daemon.core.extents import ExtentSet
from kvferry_daemon.core.news import what_is_wrong
from kvferry_daemon.core.pool import Lease
from kvferry_daemon.core.records import Shown, TransferRecord
from kvferry_daemon.core.transfer import NEVER_S, Aux, Opening, Transfer
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.peer import Want
from kvferry_proto.states import StallReason, State

ACK_PARTS = 8  # an ack travels at least every window/8 tokens, so that the source can slide too


class SinkTransfer(Transfer):
    """See the module's first lines."""

    LIVE: ClassVar[dict[type, Callable[[Any, Any], None]]]
    ENDED: ClassVar[dict[type, Callable[[Any, Any], None]]]

    def __init__(self, opening: Opening, timing: ev.Timing, now_s: float) -> None:
        super().__init__(opening, timing, now_s)
        self.peer_up = self.peer_met = opening.source is None
        self.takes_over = opening.source is None  # blocks of its source, unless it hears otherwise
        self.known_at: int | None = None  # the pull number current at the first real answer
        self._heard = False  # a real answer in this life: the shape is what the source has, too
        self.done_noted = False
        self._number = 0
        self._acked = -1
        self._take_parts()
        self._shows_layout = False
        self._asked_at = 0  # the snapshot number under which `_shown_ask` was shown first
        self._shown_ask = super()._ask
        self._resend_at_s = now_s  # a pull is due at once
        self._resend_s = timing.resend_s
        self._pulled_at_s = now_s
        self._drain_at_s = NEVER_S

    def _take_parts(self) -> None:
        """The payload comes in the parts of ``shape``; all have what is counted as sent."""
        parts = len(self.shape.ranks)
        self._committed = [ExtentSet() for _ in range(parts)]
        self._claims = Claims(self.opening.chunk_tokens, parts)
        if self.sent_tokens > self.opening.start_tokens:
            for part in self._committed:
                part.add(self.opening.start_tokens, self.sent_tokens)

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

    @property
    def chunks_under_way(self) -> int:
        """Claimed, and not in place yet: somebody may write into its blocks."""
        return len(self._claims)

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
        if not pulled and (self.now_s >= self._resend_at_s or self._ack_is_due()):
            again = self.now_s >= self._resend_at_s
            self._pull(self._claims.wants if again else ())
            if again:
                self._repeat_later()
            else:  # an ack tells nothing of the claims: their repeat is not put off
                self._resend_at_s = min(self._resend_at_s, self.now_s + self._resend_s)
        self.stall = self._why_waiting()

    def _is_whole(self) -> bool:
        aux_here = not self.opening.aux_names or self.aux is not None
        return self.total_tokens is not None and aux_here

    def _advance_state(self) -> None:
        if self.state is State.BOOTSTRAPPING and self.known_at is not None:
            self.state = State.WAITING_FOR_INPUT
        if self.state is State.WAITING_FOR_INPUT and self._edge_to_fetch() > self.sent_tokens:
            self.state = State.TRANSFERRING

    def _edge_to_fetch(self) -> int:
        """What the source has, in whole blocks of the wire.

        One of ours may be larger than all that the source has room for, so it is filled bit by bit.
        """
        available = self.available_tokens
        if available != self.total_tokens:
            available -= available % self.shape.wire_block_tokens
        return min(available, self.target_tokens)

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

    def _claim(self) -> bool:
        """Claim what the window has room for and the source has; say whether it was pulled."""
        if not self.peer_up or not self._claims.has_stream or not self._heard:
            return False
        limit = min(self.window.edge_tokens, self._edge_to_fetch())
        fresh = []
        for part, rank in enumerate(self.shape.ranks):
            for key, want in self._claims.make(self.sent_tokens, limit, part):
                place = self.window.cover(want.first_token, want.tokens, rank)
                self._emit(ev.Claim(key, want.first_token, want.tokens, place, part))
                fresh.append(want)
        if fresh:
            self._resend_s = self.timing.resend_s
            self._pull(tuple(fresh))
            self._repeat_later()
        return bool(fresh)

    def _ack_is_due(self) -> bool:
        news = self.sent_tokens - max(self._acked, self.opening.start_tokens)
        step = max(1, self.opening.window_tokens // ACK_PARTS)
        return self.known_at is not None and (news >= step or (news > 0 and not self._claims))

    def _pull(self, want: tuple[Want, ...]) -> None:
        self._number += 1
        self._acked = self.sent_tokens
        self._pulled_at_s = self.now_s
        self._emit(ev.SendPull(self._number, self.sent_tokens, want, self._shows_layout))

    def _repeat_later(self) -> None:
        self._resend_at_s = self.now_s + self._resend_s
        self._resend_s = min(self._resend_s * 2, self.timing.resend_max_s)

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

    def _on_peer_up(self, _event: ev.PeerUp) -> None:
        self.peer_up = self.peer_met = True
        self._resend_soon()

    def _on_news_lost(self, _event: ev.NewsLost) -> None:
        self._resend_soon()

    def _on_peer_down(self, _event: ev.PeerDown) -> None:
        self.peer_up = False

    def _on_stream_up(self, event: ev.StreamUp) -> None:
        self._claims.stream_up(event.key)

    def _on_stream_down(self, event: ev.StreamDown) -> None:
        """A claim is bound to its connection, so it ends here and may be made anew elsewhere."""
        self._claims.stream_down(event.key)

    def _on_shaped(self, event: ev.Shaped) -> None:
        """It may come again: a source that was started anew does not know our layout any more."""
        if event.shape != self.shape:
            if self._claims:
                self._fail(Code.LAYOUT_MISMATCH, "the source's layout or ranks have changed")
                return
            streams = self._claims.streams
            self.shape = event.shape
            self._take_parts()
            for key in streams:
                self._claims.stream_up(key)
        self._shows_layout = True
        self._resend_at_s = self.now_s

    def _on_copied(self, event: ev.Copied) -> None:
        """The two have met; said again it changes nothing."""
        if not self.takes_over:
            return
        self.takes_over = False
        self.shape = event.shape
        self._take_parts()
        self._claims.stream_up(event.key)

    def _on_missed(self, event: ev.Missed) -> None:
        self._claims.drop(event.key, event.first_token, event.part)

    def _on_received(self, event: ev.Received) -> None:
        tokens = self._claims.fulfil(event.key, event.first_token, event.part)
        assert tokens is not None, event  # I4: the transport posts only what it found claimed
        self._committed[event.part].add(event.first_token, event.first_token + tokens)
        self._committed_more()

    def _on_took_over(self, event: ev.TookOver) -> None:
        first = self.window.edge_tokens
        self.window.add(event.leases)
        for part in self._committed:
            part.add(first, first + event.tokens)
        self._committed_more()

    def _on_late_took_over(self, event: ev.TookOver) -> None:
        self._emit(ev.Free(event.leases))

    def _committed_more(self) -> None:
        """Progress is what every part has without a gap."""
        ends = [part.prefix_end(self.sent_tokens) for part in self._committed]
        self.sent_tokens = min(ends)
        self._progressed()

    def _on_room_again(self, _event: ev.RoomAgain) -> None:
        """Settling tries again."""

    def _on_heard(self, event: ev.Heard) -> None:
        news = event.progress
        if news.number > self._number:
            return  # an answer to a pull that was never sent
        if not news.known:
            if self.known_at is not None and news.number > self.known_at:
                self._fail(Code.SOURCE_LOST, "the source daemon no longer knows this attempt")
            elif news.number == self._number:
                if news.will_tell:
                    self._rest()
                else:  # not, or no longer
                    soon_s = self.now_s + self.timing.resend_max_s
                    self._resend_at_s = min(self._resend_at_s, soon_s)
            return
        self._shows_layout = False
        self._heard = True
        if self.known_at is None:
            self.known_at = self._number
            self._progressed()
        wrong = what_is_wrong(self, news)
        if wrong is not None:
            self._fail(*wrong)
            return
        told = self.total_tokens is None and news.total_tokens is not None
        if told or news.available_tokens > self.available_tokens:
            self._progressed()
        if news.number == self._number and not self._claims:
            self._rest()
        self.available_tokens = max(self.available_tokens, news.available_tokens)
        self.total_tokens = news.total_tokens if self.total_tokens is None else self.total_tokens
        self.aux = news.aux if self.aux is None else self.aux

    def _rest(self) -> None:
        """Nothing is under way, and the source tells what is new by itself."""
        self._resend_s = self.timing.resend_s
        self._resend_at_s = self._pulled_at_s + self.timing.lease_s

    def _resend_soon(self) -> None:
        self._resend_s = self.timing.resend_s
        self._resend_at_s = min(self._resend_at_s, self.now_s + self._resend_s)
        if not self._heard:
            self._resend_at_s = self.now_s

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
