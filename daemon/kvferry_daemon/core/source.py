"""The source side of one attempt: it holds what the worker made ready, and serves ranges of it.

It serves an extent at most once on one stream connection, so a repeated pull costs nothing. A
block is free again once the sink has acknowledged it, the worker has marked it ready, and no
thread reads it any more.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from kvferry_daemon.core import events as ev
from kvferry_daemon.core.extents import ExtentSet
from kvferry_daemon.core.pool import Lease
from kvferry_daemon.core.readiness import check_ready, total_mismatch
from kvferry_daemon.core.records import TransferRecord
from kvferry_daemon.core.transfer import NEVER_S, Aux, Opening, Transfer
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.peer import Pull, Want
from kvferry_proto.states import StallReason, State

READING_MAX = 1024  # four times what a sink claims at once; every event looks at each of them


class SourceTransfer(Transfer):
    """See the module's first lines.

    ``available_tokens`` is what the worker marked ready, ``sent_tokens`` what the sink has
    acknowledged: it will never ask for anything below again.
    """

    LIVE: ClassVar[dict[type, Callable[[Any, Any], None]]]
    ENDED: ClassVar[dict[type, Callable[[Any, Any], None]]]

    def __init__(self, opening: Opening, timing: ev.Timing, now_s: float) -> None:
        super().__init__(opening, timing, now_s)
        self.available_tokens = opening.start_tokens
        self.sink: str | None = None  # boot id of the daemon that pulls, in this life of it
        self.sink_daemon: str | None = None
        self._began = False  # it has had a block
        self._number = 0
        self._lease_until_s = NEVER_S
        self._reading: set[tuple[ev.StreamKey, int, int]] = set()  # (key, first token, part)
        self._served: dict[ev.StreamKey, dict[int, ExtentSet]] = {}  # by part
        self._drain_at_s = NEVER_S
        self._told: tuple[object, ...] = ()

    # --- what others may ask ---

    @property
    def _first_level(self) -> int:
        return self.opening.start_tokens  # ready is what was there before

    def _available_to(self, rank: int) -> int:
        return self.ranks[rank].level_tokens

    def _visible(self) -> tuple[object, ...]:
        return (*super()._visible(), self.ranks.levels)

    @property
    def servable_tokens(self) -> int:
        """What may be asked for: whole blocks, and the part full last one once it is the last."""
        if self._is_complete():
            return self.available_tokens
        size = self.opening.block_size_tokens
        return self.available_tokens // size * size

    @property
    def target_tokens(self) -> int:
        """The edge up to which the window may be topped up."""
        edge = self.window.base_tokens + self.opening.window_tokens
        return edge if self.total_tokens is None else min(edge, self.total_tokens)

    @property
    def wake_at_s(self) -> float:
        if not self.ended:
            return min(self._lease_until_s, self._stalled_at_s)
        return self._drain_at_s

    @property
    def forgettable(self) -> bool:
        return self.ended and not self.window.blocks and not self._reading

    @property
    def chunks_under_way(self) -> int:
        """Asked for, and not sent yet: somebody reads its blocks."""
        return len(self._reading)

    @property
    def streams(self) -> list[ev.StreamKey]:
        """The connections that something was asked for on, and that have not ended."""
        return list(self._served)

    # --- what must last ---

    def mark(self) -> tuple[object, ...]:
        return (*super().mark(), self.sink_daemon, self._began)

    def _record(self) -> dict[str, Any]:
        return super()._record() | {"sink_daemon": self.sink_daemon, "began": self._began}

    def take_up(self, record: TransferRecord, leases: tuple[Lease, ...], aux: Aux | None) -> None:
        super().take_up(record, leases, aux)
        self.sink_daemon = record.sink_daemon
        self._began = record.began
        if self.sink_daemon is not None and not self.ended:
            self._lease_until_s = self.now_s + self.timing.lease_s

    # --- settling ---

    def _is_complete(self) -> bool:
        ready = self.available_tokens == self.total_tokens and self.ranks.know_total
        return ready and self._is_aux_told()

    def _is_aux_told(self) -> bool:
        return not self.opening.aux_names or self.aux is not None

    def _is_done(self, rank: int) -> bool:
        """Whether a worker has no more to write; in a group another one may tell the aux values."""
        ready = self.ranks[rank].level_tokens == self.total_tokens
        return ready and (self._is_aux_told() or self.ranks.size > 1)

    def _settle(self) -> None:
        self._fail_if_stalled()
        if not self.ended and self.now_s >= self._lease_until_s:
            silent_s = self.timing.lease_s
            self._fail(Code.LEASE_EXPIRED, f"the sink's daemon was silent for {silent_s:g} s")
        if self.ended:
            return
        if self.sink is not None:
            moving = self.servable_tokens > self.opening.start_tokens
            self.state = State.TRANSFERRING if moving else State.WAITING_FOR_INPUT
        self._drop_acked()
        self._cut_tail()
        self._ask_for_blocks()
        self._tell_news()
        self.stall = self._why_waiting()

    def _drop_acked(self) -> None:
        """Free what is acknowledged, no longer written by the worker, and no longer read."""
        size = self.opening.block_size_tokens
        firsts = [first for _, first, _ in self._reading]
        floor = min([self.sent_tokens, self.available_tokens, *firsts])
        base = floor // size * size
        if base > self.window.base_tokens:
            fronts = self.window.drop_to(base)
            if fronts:
                self._emit(ev.Free(tuple(fronts)))

    def _cut_tail(self) -> None:
        """Free what lies behind the end: by its total the worker says that it writes there no more.

        A sink keeps such blocks: its worker may have plans for them.
        """
        if self.total_tokens is None or not self.ranks.know_total:
            return
        if self.window.edge_tokens > self.total_tokens:
            tails = self.window.cut_to(self.total_tokens)
            if tails:
                self._emit(ev.FreeTail(tails))

    def _ask_for_blocks(self) -> None:
        """Room to write in. One that has just given its last block back goes first.

        So it gets that one back at least: it never waits with nothing for others, whose sinks may
        be waiting for room that its own sink holds.
        """
        size = self.opening.block_size_tokens
        edge = self.window.edge_tokens
        blocks = max(0, -(-(self.target_tokens - edge) // size))
        if self.released or not self.ranks.complete:
            blocks = 0
        self._want(blocks, urgent=self._began and blocks > 0 and not self.window.blocks)

    def _tell_news(self) -> None:
        """Tell the sink at once; if that gets lost, its next pull asks again."""
        if self.sink is not None and self._told != (news := self._news()):
            self._told = news
            self._emit(ev.SendProgress(self._number, self.sink))

    def _news(self) -> tuple[object, ...]:
        failed = self.state is State.FAILED
        return (self.servable_tokens, self.total_tokens, self.aux is None, failed)

    def _why_waiting(self) -> StallReason | None:
        if self.sink is None or not self.ranks.complete:
            return StallReason.WAITING_FOR_PEER
        if self._reading:
            return None
        if self.servable_tokens > self.sent_tokens:
            return StallReason.WAITING_FOR_RESUME  # the sink asks for no more yet
        if self.window.edge_tokens <= self.available_tokens and not self._is_complete():
            return StallReason.WAITING_FOR_BLOCKS
        return StallReason.WAITING_FOR_INPUT

    # --- moves ---

    def _on_tick(self, event: ev.Tick) -> None:
        super()._on_tick(event)
        self._lease_until_s = max(self._lease_until_s, event.sink_heard_s + self.timing.lease_s)

    def _on_slept(self, event: ev.Slept) -> None:
        super()._on_slept(event)
        self._lease_until_s += event.for_s

    def _on_granted(self, event: ev.Granted) -> None:
        self._began = True
        super()._on_granted(event)

    def _on_granted_ended(self, event: ev.Granted) -> None:
        self._emit(ev.Free(event.leases))

    def _on_ready(self, event: ev.ReadyTo) -> None:
        check_ready(self, event)
        rank = self.ranks[event.rank]
        mismatch = total_mismatch(self, event)
        if mismatch is not None:
            self._fail(Code.TOTAL_MISMATCH, mismatch)
            return
        if event.aux is not None:
            self.aux = event.aux
        grew = event.ready_tokens > rank.level_tokens
        rank.level_tokens = max(rank.level_tokens, event.ready_tokens)
        self.available_tokens = self.ranks.lowest_tokens
        if event.total_tokens is not None:
            grew |= self.total_tokens is None
            self.total_tokens = rank.total_tokens = event.total_tokens
        if grew:
            self._progressed()

    def _on_pulled(self, event: ev.Pulled) -> None:
        pull = event.pull
        wrong = self.what_is_wrong(event)
        if wrong is not None:
            self._emit(ev.SendProgress(pull.number, event.sink, ErrorInfo.of(*wrong)))
            return
        if self.sink_daemon is None:
            self.sink_daemon = event.daemon
            self._progressed()
        if self.sink != event.sink:
            self.sink = event.sink  # its numbers begin anew
            self._number = 0
        self._lease_until_s = self.now_s + self.timing.lease_s
        self._number = max(self._number, pull.number)
        self._ack(pull.acked_tokens)
        if event.shape is not None:
            self.shape = event.shape
        for want in pull.want:
            self._serve(event.sink, pull, want)
        self._told = self._news()
        self._emit(ev.SendProgress(pull.number, event.sink))

    def what_is_wrong(self, event: ev.Pulled) -> tuple[Code, str] | None:
        """Why a pull is refused, if it is."""
        pull, start = event.pull, self.opening.start_tokens
        if self.sink_daemon not in (None, event.daemon):
            return Code.SINK_TAKEN, "another sink daemon receives this attempt"
        if pull.start_tokens < start:
            return (
                Code.START_MISMATCH,
                f"the sink starts at {pull.start_tokens}, the source only has {start} onwards",
            )
        if pull.acked_tokens > max(self.servable_tokens, pull.start_tokens):
            return Code.PEER_PROTOCOL, f"acked {pull.acked_tokens} tokens that were never served"
        return None

    def _ack(self, acked_tokens: int) -> None:
        if acked_tokens > self.sent_tokens:
            self.sent_tokens = self.partial_sent_tokens = acked_tokens
            self._progressed()

    def _serve(self, sink: str, pull: Pull, want: Want) -> None:
        first, end = want.first_token, want.first_token + want.tokens
        size = self.shape.wire_block_tokens
        if first % size or (end % size and end != self.total_tokens):
            return  # asked for token by token, a window would be a million pieces
        if first < max(self.window.base_tokens, self.sent_tokens) or end > self.servable_tokens:
            return  # an old pull, or one that asks beyond what was told
        if want.part >= len(self.shape.ranks) or len(self._reading) >= READING_MAX:
            return
        key = ev.StreamKey(sink, want.stream, want.connection)
        served = self._served.setdefault(key, {}).setdefault(want.part, ExtentSet())
        if list(served.gaps(first, end)) != [(first, end)]:
            return  # it is on its way on this very connection
        served.add(first, end)
        self._reading.add((key, first, want.part))
        place = self.window.cover(first, want.tokens, self.shape.ranks[want.part])
        self._emit(ev.Serve(key, pull.handle, first, want.tokens, place, want.part))

    def _on_sent(self, event: ev.Sent) -> None:
        self._reading.discard((event.key, event.first_token, event.part))

    def _on_stream_down(self, event: ev.StreamDown) -> None:
        """Nothing more goes out on that connection, and no thread of it reads a block."""
        self._served.pop(event.key, None)
        self._reading = {one for one in self._reading if one[0] != event.key}

    def _on_give_over(self, event: ev.GiveOver) -> None:
        """Hand ready blocks to a sink of this daemon; as they go, they count as acknowledged."""
        size = self.opening.block_size_tokens
        self._ack(min(event.first_token, self.servable_tokens))
        self._drop_acked()
        if self.window.base_tokens != event.first_token:
            return
        edge = min(event.first_token + event.blocks * size, self.servable_tokens)
        leases = self.window.drop_to(-(-edge // size) * size)
        if leases:
            self._emit(ev.HandOver(tuple(leases), edge - event.first_token))
        self._ack(edge)

    def _on_done(self, event: ev.Done) -> None:
        if event.state is State.SUCCESS:
            self._end(State.SUCCESS)
        else:
            said = f"{event.error.code}: {event.error.message}" if event.error else "no reason"
            self._fail(Code.SINK_FAILED, said)

    def _on_done_ended(self, event: ev.Done) -> None:
        """A lease that ran out is a guess; the sink's own word corrects it."""
        guessed = self.error is not None and self.error.code == Code.LEASE_EXPIRED
        if guessed and event.state is State.SUCCESS:
            self.state, self.error = State.SUCCESS, None

    def _on_release(self, event: ev.Release) -> None:
        """Before the end of the payload it gives the transfer up; after it, it is good-bye."""
        self.ranks.let_go(event.rank)
        if not self._is_done(event.rank):
            ready = self.ranks[event.rank].level_tokens
            by = self._by(event.rank)
            self._fail(Code.RELEASED_EARLY, f"{by}released by its worker with {ready} ready")
        elif self.released and not self._is_aux_told():
            names = sorted(self.opening.aux_names)
            self._fail(Code.AUX_MISSING, f"all ranks have released, and none has told aux {names}")

    def _on_worker_lost_live(self, event: ev.WorkerLost) -> None:
        if not self._is_done(event.rank):
            self._on_worker_lost(event)
        elif event.dead:
            self.ranks.let_go(event.rank)

    # --- the end ---

    def _on_end(self) -> None:
        if self._reading:
            self._drain_at_s = self.now_s + self.timing.drain_s
        self._tell_news()

    def _settle_ended(self) -> None:
        if not self._reading:
            self._drain_at_s = NEVER_S
        written = self.released or self._is_complete()  # the worker writes there no more
        if written and not self._reading:
            self._free_all()
        else:
            self._quarantine()
            self.stall = StallReason.DRAINING if self.window.blocks else None
        if self.now_s >= self._drain_at_s:
            self._drain_at_s = self.now_s + self.timing.drain_s
            for key in sorted({key for key, _, _ in self._reading}):
                self._emit(ev.CloseStream(key))

    def _on_late_pull(self, event: ev.Pulled) -> None:
        is_its_own = event.daemon == self.sink_daemon
        self._emit(ev.SendProgress(event.pull.number, event.sink, None, is_its_own))


SourceTransfer.LIVE = {
    ev.Tick: SourceTransfer._on_tick,
    ev.Slept: SourceTransfer._on_slept,
    ev.Joined: SourceTransfer._on_joined,
    ev.Promised: SourceTransfer._on_promised,
    ev.Granted: SourceTransfer._on_granted,
    ev.ReadyTo: SourceTransfer._on_ready,
    ev.Pulled: SourceTransfer._on_pulled,
    ev.Sent: SourceTransfer._on_sent,
    ev.StreamDown: SourceTransfer._on_stream_down,
    ev.GiveOver: SourceTransfer._on_give_over,
    ev.Done: SourceTransfer._on_done,
    ev.Release: SourceTransfer._on_release,
    ev.Fail: SourceTransfer._on_fail,
    ev.WorkerLost: SourceTransfer._on_worker_lost_live,
}
SourceTransfer.ENDED = {
    ev.Tick: SourceTransfer._on_tick,
    ev.Joined: SourceTransfer._on_joined_ended,
    ev.Granted: SourceTransfer._on_granted_ended,
    ev.Pulled: SourceTransfer._on_late_pull,
    ev.Sent: SourceTransfer._on_sent,
    ev.StreamDown: SourceTransfer._on_stream_down,
    ev.Done: SourceTransfer._on_done_ended,
    ev.Release: SourceTransfer._on_release_ended,
    ev.WorkerLost: SourceTransfer._on_worker_lost_ended,
}
