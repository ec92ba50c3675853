"""SinkTransfer while it moves: resumes, pulls and claims.

test_sink_table.py has every event in every state, test_sink_news.py what a source may say, and
test_sink_end.py how it all ends.
"""

from dataclasses import replace
from typing import Any, TypeVar

import pytest

from core.test_sink_table import (
    BLOCK,
    KEY,
    OTHER,
    WINDOW,
    after,
    granted,
    heard,
    outcome,
    sink_in,
)
from kvferry_daemon.core import events as ev
from kvferry_daemon.core.claims import CLAIMS_MAX
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_proto.errors import FerryError
from kvferry_proto.states import StallReason, State

T = TypeVar("T")


def of(effects: list[ev.Effect], kind: type[T]) -> list[T]:
    """Only the effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


def code_of(sink: SinkTransfer) -> str | None:
    return sink.error.code if sink.error else None


def with_a_full_window(**changes: Any) -> SinkTransfer:
    """8 tokens are in place, and the source has 32."""
    sink = sink_in(State.TRANSFERRING, **changes)
    after(sink, ev.Received(KEY, 4), heard(1, available_tokens=32))
    assert (sink.sent_tokens, sink.stall) == (8, StallReason.WAITING_FOR_RESUME)
    return sink


# --- resume ---


@pytest.mark.parametrize(
    ("at", "base", "freed"),
    [(0, 0, []), (3, 0, []), (4, 4, [0]), (7, 4, [0]), (8, 8, [0, 1])],
)
def test_a_resume_frees_the_whole_blocks_below_it(at: int, base: int, freed: list[int]) -> None:
    sink = with_a_full_window()
    effects = after(sink, ev.ResumeAt(at))
    gone = [run for free in of(effects, ev.Free) for _, _, _, run in free.leases]
    assert [block for run in gone for block in range(run.first_block, sum(run))] == freed
    assert [want.blocks for want in of(effects, ev.WantBlocks)] == [len(freed)] * bool(freed)
    assert (sink.sent_tokens, sink.partial_sent_tokens, sink.last_resume_at) == (8, at, at)
    assert (sink.window.base_tokens, sink.target_tokens) == (base, base + WINDOW)


@pytest.mark.parametrize("again", [4, 3, 0])
def test_a_repeated_or_stale_resume_changes_nothing(again: int) -> None:
    """I6, also when the allocator has handed the freed block out again."""
    sink = with_a_full_window()
    after(sink, ev.ResumeAt(4), ev.Tick(0.1))  # later, so that moving the deadline would show
    assert outcome(sink, ev.ResumeAt(again)) == "absorbed"
    after(sink, granted(0), ev.Tick(0.15))
    assert outcome(sink, ev.ResumeAt(again)) == "absorbed"


@pytest.mark.parametrize("ahead", [9, 16, 1 << 40])
def test_a_resume_ahead_is_refused_by_numbers(ahead: int) -> None:
    sink = with_a_full_window()
    with pytest.raises(FerryError, match=f"resume at {ahead}, but sent_tokens is 8"):
        sink.handle(ev.ResumeAt(ahead))
    assert outcome(sink, ev.ResumeAt(ahead)) == "refused: resume_ahead"


def test_below_the_prefix_that_the_sink_had_a_resume_is_stale() -> None:
    sink = sink_in(State.WAITING_FOR_INPUT, start_tokens=8)
    assert outcome(sink, ev.ResumeAt(4)) == "absorbed"
    after(sink, ev.ResumeAt(8))
    assert sink.last_resume_at == 8


def test_the_window_slides_while_its_second_half_is_under_way() -> None:
    sink = sink_in(State.TRANSFERRING)
    after(sink, heard(1, available_tokens=32))
    effects = after(sink, ev.ResumeAt(4), granted(0))
    assert [(c.first_token, c.place.runs[0].first_block) for c in of(effects, ev.Claim)] == [(8, 0)]
    assert [want.first_token for want in of(effects, ev.SendPull)[-1].want] == [8]
    after(sink, ev.Received(KEY, 8))
    assert sink.sent_tokens == 4  # the claim on 4 to 8 is the gap
    after(sink, ev.Received(KEY, 4))
    assert (sink.sent_tokens, sink.window.base_tokens) == (12, 4)


def test_blocks_are_asked_for_only_for_tokens_that_exist() -> None:
    sink = sink_in(State.WAITING_FOR_INPUT)
    effects = [after(sink, heard(1, available_tokens=a)) for a in (4, 4, 8, 16)]
    wants = [of(some, ev.WantBlocks) for some in effects]
    assert wants == [
        [ev.WantBlocks(1, urgent=True)],
        [],  # the level is known
        [ev.WantBlocks(2, urgent=True)],
        [],  # the window's target is 8
    ]


# --- pulls ---


def pulls_by_timer(sink: SinkTransfer, count: int) -> list[float]:
    """When the next pulls are sent if nothing comes; none of them a moment before its time."""
    times: list[float] = []
    for _ in range(count):
        at_s = sink.wake_at_s
        assert of(after(sink, ev.Tick(at_s - 0.001)), ev.SendPull) == []
        assert len(of(after(sink, ev.Tick(at_s)), ev.SendPull)) == 1
        times.append(round(at_s, 3))
    return times


def test_a_pull_is_sent_again_after_delays_that_double() -> None:
    sink = sink_in(State.BOOTSTRAPPING)
    assert pulls_by_timer(sink, 6) == [0.2, 0.6, 1.4, 3.0, 5.0, 7.0]


def test_an_answered_pull_is_sent_again_once_a_lease() -> None:
    sink = sink_in(State.BOOTSTRAPPING)
    pulls_by_timer(sink, 2)
    after(sink, heard(2, available_tokens=4))  # the answer to the first one, or news
    assert pulls_by_timer(sink, 1) == [1.4]
    after(sink, heard(5, available_tokens=8))
    assert pulls_by_timer(sink, 4) == [31.4, 31.6, 32.0, 32.8]


def test_a_pull_whose_source_will_tell_is_sent_again_once_a_lease() -> None:
    sink = sink_in(State.BOOTSTRAPPING)
    pulls_by_timer(sink, 2)
    after(sink, heard(2, known=False, will_tell=True))  # the answer to the first one
    assert pulls_by_timer(sink, 1) == [1.4]
    after(sink, heard(5, known=False, will_tell=False))
    assert pulls_by_timer(sink, 1) == [3.0]
    after(sink, heard(6, known=False, will_tell=True))
    assert pulls_by_timer(sink, 1) == [33.0]
    assert of(after(sink, heard(7, known=False, will_tell=True), ev.NewsLost()), ev.SendPull)


def test_an_answered_pull_is_sent_again_soon_if_news_were_lost() -> None:
    sink = sink_in(State.BOOTSTRAPPING)
    pulls_by_timer(sink, 2)
    after(sink, heard(5, available_tokens=4), ev.NewsLost())
    assert pulls_by_timer(sink, 3) == [0.8, 1.2, 2.0]


def test_a_pull_with_claims_under_way_is_sent_again_though_it_was_answered() -> None:
    sink = sink_in(State.WAITING_FOR_INPUT)
    [pull] = of(after(sink, heard(1, available_tokens=8), granted(0, 2)), ev.SendPull)
    after(sink, heard(pull.number, available_tokens=8))
    assert pulls_by_timer(sink, 3) == [0.2, 0.6, 1.4]


def test_a_pull_that_is_sent_again_names_every_claim_and_a_new_number() -> None:
    sink = sink_in(State.WAITING_FOR_INPUT)
    [first] = of(after(sink, heard(1, available_tokens=8), granted(0, 2)), ev.SendPull)
    [again] = of(after(sink, ev.Tick(1.0)), ev.SendPull)
    assert [want.first_token for want in first.want] == [0, 4]
    assert (again.want, again.number) == (first.want, first.number + 1)


def test_only_the_prefix_is_acknowledged() -> None:
    """Extents come in any order; what lies behind a gap may have to be asked for again."""
    sink = sink_in(State.WAITING_FOR_INPUT)
    after(sink, heard(1, available_tokens=8), granted(0, 2), ev.Received(KEY, 4))
    assert sink.sent_tokens == 0
    [pull] = of(after(sink, ev.Tick(1.0)), ev.SendPull)
    assert (pull.acked_tokens, [want.first_token for want in pull.want]) == (0, [0])
    [pull] = of(
        after(sink, ev.Received(KEY, 0)), ev.SendPull
    )  # at once: the source may free blocks
    assert (sink.sent_tokens, pull.acked_tokens, pull.want) == (8, 8, ())


# --- claims ---


def claims_of(effects: list[ev.Effect]) -> list[tuple[int, ev.StreamKey]]:
    return [(claim.first_token, claim.key) for claim in of(effects, ev.Claim)]


def on_two_streams() -> SinkTransfer:
    """Claims on 0 and 8 are KEY's, those on 4 and 12 OTHER's."""
    sink = sink_in(State.WAITING_FOR_INPUT, window_tokens=16)
    after(sink, ev.StreamUp(OTHER))
    effects = after(sink, heard(1, available_tokens=16), granted(0, 4))
    assert claims_of(effects) == [(0, KEY), (4, OTHER), (8, KEY), (12, OTHER)]
    return sink


def test_a_stream_that_ends_takes_only_its_own_claims_with_it() -> None:
    sink = on_two_streams()
    effects = after(sink, ev.StreamDown(KEY))
    assert claims_of(effects) == [(0, OTHER), (8, OTHER)]
    [pull] = of(effects, ev.SendPull)
    assert {(w.first_token, w.stream, w.connection) for w in pull.want} == {(0, 1, 5), (8, 1, 5)}
    after(sink, *[ev.Received(OTHER, first) for first in (0, 4, 8, 12)])
    assert sink.sent_tokens == 16


def test_a_late_miss_of_one_connection_does_not_end_a_claim_that_was_made_anew() -> None:
    sink = on_two_streams()
    after(sink, ev.StreamDown(KEY))
    assert claims_of(after(sink, ev.Missed(KEY, 0))) == []
    assert claims_of(after(sink, ev.Missed(OTHER, 0))) == [(0, OTHER)]


def test_what_came_before_its_stream_ended_is_not_claimed_again() -> None:
    sink = on_two_streams()
    after(sink, ev.Received(KEY, 8))
    assert claims_of(after(sink, ev.StreamDown(KEY))) == [(0, OTHER)]


def test_the_end_of_an_older_connection_leaves_the_newer_one_in_use() -> None:
    sink = sink_in(State.TRANSFERRING)
    newer = KEY._replace(connection=2)
    effects = after(sink, ev.StreamUp(newer))
    assert claims_of(effects) == []  # only the old connection's end proves that nobody writes
    assert claims_of(after(sink, ev.StreamDown(KEY))) == [(4, newer)]


def test_the_late_end_of_an_older_connection_ends_no_claim_of_the_newer_one() -> None:
    sink = sink_in(State.WAITING_FOR_INPUT)
    newer = KEY._replace(connection=2)
    effects = after(sink, ev.StreamUp(newer), heard(1, available_tokens=8), granted(0, 2))
    assert claims_of(effects) == [(0, newer), (4, newer)]
    assert outcome(sink, ev.StreamDown(KEY)) == "absorbed"


def test_without_a_stream_nothing_is_claimed() -> None:
    sink = sink_in(State.WAITING_FOR_INPUT)
    effects = after(
        sink, ev.StreamDown(KEY), heard(1, available_tokens=8), granted(0, 2), ev.StreamDown(OTHER)
    )
    assert (claims_of(effects), sink.stall) == ([], StallReason.WAITING_FOR_PEER)
    assert claims_of(after(sink, ev.StreamUp(OTHER))) == [(0, OTHER), (4, OTHER)]


def test_while_the_peer_is_down_nothing_is_claimed() -> None:
    sink = with_a_full_window()
    after(sink, ev.PeerDown())
    effects = after(sink, ev.ResumeAt(8), granted(0, 2))
    assert (claims_of(effects), sink.stall) == ([], StallReason.WAITING_FOR_PEER)
    assert claims_of(after(sink, ev.PeerUp())) == [(8, KEY), (12, KEY)]


def test_claims_of_a_transfer_are_bounded() -> None:
    tokens = (CLAIMS_MAX + 44) * BLOCK
    sink = sink_in(State.WAITING_FOR_INPUT, window_tokens=tokens)
    effects = after(sink, heard(1, available_tokens=tokens), granted(0, CLAIMS_MAX + 44))
    assert len(of(effects, ev.Claim)) == CLAIMS_MAX
    assert claims_of(after(sink, ev.Received(KEY, 0))) == [(CLAIMS_MAX * BLOCK, KEY)]


def test_a_chunk_ends_at_a_multiple_of_its_size_and_at_the_end_of_the_payload() -> None:
    sink = sink_in(State.WAITING_FOR_INPUT, window_tokens=24, chunk_tokens=8, start_tokens=4)
    news = heard(1, available_tokens=22, total_tokens=22)
    effects = after(sink, news, granted(0, 5))
    assert [(c.first_token, c.tokens) for c in of(effects, ev.Claim)] == [(4, 4), (8, 8), (16, 6)]


def test_blocks_that_are_still_wiped_are_on_their_way_whatever_others_come_meanwhile() -> None:
    """A worker was told to take its tokens over, though the rest of its window was being wiped."""
    sink = sink_in(State.WAITING_FOR_INPUT)
    after(sink, heard(1, available_tokens=8), ev.Promised(1), granted(0))
    after(sink, ev.Received(KEY, 0))
    assert (sink.sent_tokens, sink.window.edge_tokens, sink.stall) == (4, 4, None)
    after(sink, replace(granted(1), promised=True))
    assert sink.window.edge_tokens == 8
