"""Deliberate mistakes in the core, each one that somebody could make: the simulator must see all.

A mutant is a function that patches the core through pytest's MonkeyPatch. Its docstring says what
the mistake is.
"""

from typing import Any

import pytest

from kvferry_daemon.core import effects_of, here
from kvferry_daemon.core import events as ev
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allocator import CLEAN, MIXED, RunAllocator
from kvferry_daemon.core.boards import Boards
from kvferry_daemon.core.claims import Claims
from kvferry_daemon.core.effects_of import EffectDesk
from kvferry_daemon.core.extents import ExtentSet
from kvferry_daemon.core.openings import Openings
from kvferry_daemon.core.peers import Peer
from kvferry_daemon.core.pool import BlockPool, Grant
from kvferry_daemon.core.ranks import Ranks
from kvferry_daemon.core.records import TransferRecord
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.sink_desk import SinkDesk
from kvferry_daemon.core.source import SourceTransfer
from kvferry_daemon.core.source_desk import SourceDesk
from kvferry_proto.errors import Code
from kvferry_proto.states import Role
from sim.life import Life


def resume_by_blocks(patch: pytest.MonkeyPatch) -> None:
    """A resume is told apart by the blocks of the window, not by sent_tokens."""
    right = SinkTransfer._on_resume
    shown: dict[int, object] = {}

    def wrong(self: SinkTransfer, event: ev.ResumeAt) -> None:
        blocks = self.window.runs()
        if event.sent_tokens <= self.sent_tokens and shown.get(id(self)) == blocks:
            return
        shown[id(self)] = blocks
        right(self, event)

    _move(patch, SinkTransfer, ev.ResumeAt, wrong)


def silent_duplicate(patch: pytest.MonkeyPatch) -> None:
    """What was asked for once is not asked for again."""

    def wrong(self: Claims) -> tuple[()]:
        return ()

    patch.setattr(Claims, "wants", property(wrong))


def free_on_send(patch: pytest.MonkeyPatch) -> None:
    """A source's block goes when it was sent, not when it was acknowledged."""
    right = SourceTransfer._on_sent

    def wrong(self: SourceTransfer, event: ev.Sent) -> None:
        served = self._served.get(event.key, {}).get(event.part)
        right(self, event)
        if served is not None and event.first_token <= self.sent_tokens:
            self._ack(served.prefix_end(event.first_token))

    _move(patch, SourceTransfer, ev.Sent, wrong)


def free_without_drain(patch: pytest.MonkeyPatch) -> None:
    """A sink's blocks go at its end, whoever still writes there."""
    right = SinkTransfer._settle_ended

    def wrong(self: SinkTransfer) -> None:
        if self.released:
            self._free_all()
        right(self)

    patch.setattr(SinkTransfer, "_settle_ended", wrong)


def quarantine_by_timer(patch: pytest.MonkeyPatch) -> None:
    """After a while nobody touches the blocks of an ended transfer any more, surely."""
    right = SinkTransfer._settle_ended

    def wrong(self: SinkTransfer) -> None:
        right(self)
        if self.now_s >= self._ended_s + self.timing.resend_s:
            self._free_all()

    patch.setattr(SinkTransfer, "_settle_ended", wrong)


def old_chunk(patch: pytest.MonkeyPatch) -> None:
    """Attempts of one id share a handle, so a chunk of the old one is taken for the new one's."""
    right = SinkDesk.handle_of
    handles: dict[tuple[int, str], int] = {}

    def wrong(self: SinkDesk, key: ev.Key) -> int:
        fresh = right(self, key)
        handle = handles.setdefault((id(self), key.transfer_id), fresh)
        self._handles[key] = handle
        self._keys[handle] = key
        return handle

    def forget(self: SinkDesk, key: ev.Key) -> None:
        transfer = self._node.transfers[key]
        self._sinks_of.get(transfer.opening.source or "", {}).pop(key, None)

    patch.setattr(SinkDesk, "handle_of", wrong)
    patch.setattr(SinkDesk, "forget", forget)


def inherited_progress(patch: pytest.MonkeyPatch) -> None:
    """A retry goes on where the attempt before it had come to."""
    right = Openings._supersede

    def wrong(self: Openings, key: ev.Key, newest: int) -> None:
        old = self._node.transfers.get(key._replace(attempt=newest))
        if isinstance(old, SinkTransfer):
            reached[key] = old.sent_tokens
        right(self, key, newest)

    reached: dict[ev.Key, int] = {}
    begin = SinkTransfer.__init__

    def inherit(self: SinkTransfer, opening: Any, timing: ev.Timing, now_s: float) -> None:
        begin(self, opening, timing, now_s)
        self.sent_tokens = max(self.sent_tokens, reached.get(opening.key, 0))

    patch.setattr(Openings, "_supersede", wrong)
    patch.setattr(SinkTransfer, "__init__", inherit)


def count_before_bytes(patch: pytest.MonkeyPatch) -> None:
    """What is asked for is as good as there."""
    right = SinkTransfer._emit

    def wrong(self: SinkTransfer, effect: ev.Effect) -> None:
        right(self, effect)
        if isinstance(effect, ev.Claim):
            end = effect.first_token + effect.tokens
            self._committed[effect.part].add(effect.first_token, end)
            self._committed_more()

    patch.setattr(SinkTransfer, "_emit", wrong)


def unbound_claim(patch: pytest.MonkeyPatch) -> None:
    """What does not come soon is asked for on another connection, while the first may bring it."""
    right = SinkTransfer._claim

    def wrong(self: SinkTransfer) -> bool:
        if self.now_s >= self._resend_at_s:
            for (part, first_token), (key, _) in list(self._claims._made.items()):
                self._claims.drop(key, first_token, part)
        return right(self)

    patch.setattr(SinkTransfer, "_claim", wrong)


def highest_acked(patch: pytest.MonkeyPatch) -> None:
    """The highest token received is acknowledged, not the gapless prefix."""
    right = SinkTransfer._pull

    def wrong(self: SinkTransfer, want: tuple[Any, ...]) -> None:
        prefix, parts = self.sent_tokens, self._committed
        self.sent_tokens = max([prefix, *(end for part in parts for _, end in _runs(part))])
        right(self, want)
        self.sent_tokens = prefix

    patch.setattr(SinkTransfer, "_pull", wrong)


def done_once(patch: pytest.MonkeyPatch) -> None:
    """The end is told once; should it get lost, the source is left to its lease."""
    right = SinkTransfer._on_end

    def wrong(self: SinkTransfer) -> None:
        right(self)
        self.done_noted = True

    patch.setattr(SinkTransfer, "_on_end", wrong)


def unfloored_resume(patch: pytest.MonkeyPatch) -> None:
    """A resume inside of a block frees that block."""
    right = SinkTransfer._on_resume

    def wrong(self: SinkTransfer, event: ev.ResumeAt) -> None:
        before = self.last_resume_at
        right(self, event)
        size = self.opening.block_size_tokens
        base = min(-(-event.sent_tokens // size) * size, self.window.edge_tokens)
        moved = self.last_resume_at != before and self.opening.max_tokens is None
        if moved and base > self.window.base_tokens:
            self._emit(ev.Free(tuple(self.window.drop_to(base))))

    _move(patch, SinkTransfer, ev.ResumeAt, wrong)


def old_unknown(patch: pytest.MonkeyPatch) -> None:
    """Any `unknown` after the first answer means that the source is lost, however old it is."""
    right = SinkTransfer._on_heard

    def wrong(self: SinkTransfer, event: ev.Heard) -> None:
        if not event.progress.known and self.known_at is not None:
            self._fail(Code.SOURCE_LOST, "unknown")
            return
        right(self, event)

    _move(patch, SinkTransfer, ev.Heard, wrong)


def writer_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A source's blocks go at its end, though its worker still fills them."""
    right = SourceTransfer._settle_ended

    def wrong(self: SourceTransfer) -> None:
        if not self._reading:
            self._free_all()
        right(self)

    patch.setattr(SourceTransfer, "_settle_ended", wrong)


def reader_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A source's acknowledged block goes, though a thread still reads it for another connection."""
    right = SourceTransfer._drop_acked

    def wrong(self: SourceTransfer) -> None:
        reading, self._reading = self._reading, set()
        right(self)
        self._reading = reading

    patch.setattr(SourceTransfer, "_drop_acked", wrong)


def never_again(patch: pytest.MonkeyPatch) -> None:
    """A pull is said once; should it get lost, both sides wait."""

    def wrong(self: SinkTransfer) -> None:
        self._resend_at_s = float("inf")

    patch.setattr(SinkTransfer, "_repeat_later", wrong)


def not_zeroed(patch: pytest.MonkeyPatch) -> None:
    """Blocks change owner with what is in them."""
    right = BlockPool.grant

    def wrong(self: BlockPool, owner: int, role: Role, blocks: int) -> Grant:
        return right(self, owner, role, blocks)._replace(dirty=())

    patch.setattr(BlockPool, "grant", wrong)


def half_blocks(patch: pytest.MonkeyPatch) -> None:
    """A block that is not full yet counts as full once it is ready to its last token but one."""

    def wrong(self: SourceTransfer) -> int:
        size = self.opening.block_size_tokens
        return (self.available_tokens + 1) // size * size

    patch.setattr(SourceTransfer, "servable_tokens", property(wrong))


def seen_before_ledger(patch: pytest.MonkeyPatch) -> None:
    """Answers, pulls and acknowledgements go out at once; the ledger follows."""
    right = Life._perform_once_written

    def wrong(self: Life, effects: list[out.NodeEffect]) -> None:
        self._perform([one for one in effects if not isinstance(one, out.Write)])
        right(self, [one for one in effects if isinstance(one, out.Write)])

    patch.setattr(Life, "_perform_once_written", wrong)


def free_is_clean(patch: pytest.MonkeyPatch) -> None:
    """A later life takes what is free for what nobody ever had."""
    right = RunAllocator._put

    def wrong(self: RunAllocator, first: int, size: int, tag: int) -> None:
        right(self, first, size, CLEAN if tag == MIXED else tag)

    patch.setattr(RunAllocator, "_put", wrong)


def done_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A later life thinks that the source knows of the end already."""
    right = SinkTransfer.take_up

    def wrong(self: SinkTransfer, *args: Any) -> None:
        right(self, *args)
        self.done_noted |= self.ended

    patch.setattr(SinkTransfer, "take_up", wrong)


def fastest_part(patch: pytest.MonkeyPatch) -> None:
    """Progress of a group is what any of its ranks has."""

    def wrong(self: SinkTransfer) -> None:
        self.sent_tokens = max(part.prefix_end(self.sent_tokens) for part in self._committed)
        self._progressed()

    patch.setattr(SinkTransfer, "_committed_more", wrong)


def fastest_rank(patch: pytest.MonkeyPatch) -> None:
    """What one rank of a group has reached holds for all: ready, or resumed."""
    patch.setattr(
        Ranks, "lowest_tokens", property(lambda self: max(r.level_tokens for r in self._ranks))
    )


def one_released(patch: pytest.MonkeyPatch) -> None:
    """When one rank of a group has let go, all have."""
    patch.setattr(Ranks, "released", property(lambda self: any(r.released for r in self._ranks)))


def total_of_one(patch: pytest.MonkeyPatch) -> None:
    """When one rank of a group has told the total, no other writes beyond it, surely."""
    patch.setattr(Ranks, "know_total", True)


def shown_at_once(patch: pytest.MonkeyPatch) -> None:
    """Each rank of a group is shown what there is when it polls."""
    patch.setattr(Ranks, "have_acted", lambda self, snapshot: True)


def shown_before_death(patch: pytest.MonkeyPatch) -> None:
    """A later life shows a group at once what its earlier one held back."""
    right = SinkTransfer.take_up

    def wrong(self: SinkTransfer, record: TransferRecord, *args: Any) -> None:
        right(self, record.model_copy(update={"shown": None}), *args)

    patch.setattr(SinkTransfer, "take_up", wrong)


def news_not_missed(patch: pytest.MonkeyPatch) -> None:
    """A sink does not look at what its link says went before."""

    def wrong(self: Peer, _before: int, news: int) -> None:
        self._news = max(self._news, news)

    patch.setattr(Peer, "_count", wrong)


def any_ping_renews(patch: pytest.MonkeyPatch) -> None:
    """A ping renews all leases: those of other daemons, and of the earlier lives of its own."""

    def wrong(self: SourceDesk, _sink: str | None) -> float:
        return max((one.heard_s for one in self.daemons._by_boot.values()), default=0.0)

    patch.setattr(SourceDesk, "heard_s", wrong)


def slot_not_kept(patch: pytest.MonkeyPatch) -> None:
    """A slot is written when it is given, and no more."""
    patch.setattr(Boards, "changed", lambda self, transfer: None)


def slot_before_ledger(patch: pytest.MonkeyPatch) -> None:
    """What is in memory only is written at once; the ledger follows."""
    right = Life._perform_once_written

    def wrong(self: Life, effects: list[out.NodeEffect]) -> None:
        slots = (out.ShowSlot, out.ClearSlot)
        self._perform([one for one in effects if isinstance(one, slots)])
        right(self, [one for one in effects if not isinstance(one, slots)])

    patch.setattr(Life, "_perform_once_written", wrong)


def closing_is_a_proof(patch: pytest.MonkeyPatch) -> None:
    """What is copied within a daemon is over when somebody has waited for long enough."""
    right = EffectDesk._close_stream

    def wrong(self: EffectDesk, transfer: Any, effect: ev.CloseStream) -> None:
        if effect.key.is_here:
            self._node.post(transfer.key, ev.StreamDown(effect.key))
        right(self, transfer, effect)

    patch.setattr(EffectDesk, "_close_stream", wrong)


def takes_over_whatever(patch: pytest.MonkeyPatch) -> None:
    """Blocks of one pool change owner, however many ranks there are on either side."""

    def wrong(source: Any, sink: Any) -> bool:
        return bool(source.opening.pool_id == sink.opening.pool_id)

    patch.setattr(here, "can_take_over", wrong)
    patch.setattr(effects_of, "can_take_over", wrong)


def _move(patch: pytest.MonkeyPatch, side: type[Any], event: type[Any], move: Any) -> None:
    """Replace what a side does with an event, live and ended."""
    name = side.LIVE[event].__name__
    patch.setattr(side, name, move)
    for table in (side.LIVE, side.ENDED):
        if event in table and table[event].__name__ == name:
            patch.setitem(table, event, move)


def _runs(extents: ExtentSet) -> list[tuple[int, int]]:
    return list(extents)


MUTANTS = (
    resume_by_blocks, silent_duplicate, free_on_send, free_without_drain, quarantine_by_timer,
    old_chunk, inherited_progress, count_before_bytes, unbound_claim, highest_acked, done_once,
    unfloored_resume, old_unknown, writer_forgotten, reader_forgotten, never_again, not_zeroed,
    half_blocks, seen_before_ledger, free_is_clean, done_forgotten, fastest_part, fastest_rank,
    one_released, total_of_one, shown_at_once, shown_before_death, news_not_missed,
    any_ping_renews, slot_not_kept, slot_before_ledger, closing_is_a_proof, takes_over_whatever,
)  # fmt: skip
