"""SourceTransfer while it lives: what its worker may say, what it serves, when it frees.

test_source_table.py has every event in every state, test_source_end.py how it ends.
"""

import pytest

from core.test_sink import of
from core.test_sink_table import WINDOW, after, frozen, granted, lease, outcome, pulled
from core.test_source_table import (
    KEY,
    OTHER,
    fresh_source,
    source_in,
    want,
)
from kvferry_daemon.core import events as ev
from kvferry_daemon.core.source import READING_MAX
from kvferry_proto.errors import Code
from kvferry_proto.states import Role, State


def freed(effects: list[ev.Effect]) -> list[int]:
    """First blocks of the leases that are given back."""
    return [one.run.first_block for free in of(effects, ev.Free) for one in free.leases]


def served(effects: list[ev.Effect]) -> list[tuple[int, int]]:
    return [(serve.first_token, serve.tokens) for serve in of(effects, ev.Serve)]


def ready(to: int, total: int | None = None, **aux: int) -> ev.ReadyTo:
    return ev.ReadyTo(to, total, {**aux} if aux else None)


# --- what the worker says ---


@pytest.mark.parametrize(
    ("before", "event", "code"),
    [
        ([], ready(9), Code.READY_BEYOND_WINDOW),
        ([ready(0, 12)], ready(0, 16), Code.TOTAL_CHANGED),
        ([ready(0, 12)], ready(0, 8), Code.TOTAL_CHANGED),
        ([ready(8)], ready(0, 7), Code.TOTAL_TOO_SMALL),
        ([], ready(8, 7), Code.TOTAL_TOO_SMALL),
        ([ready(0, 6)], ready(7), Code.TOTAL_TOO_SMALL),
        ([ready(4, None, rope=1)], ready(8, None, rope=2), Code.AUX_CHANGED),
        ([], ready(4, None, other=1), Code.AUX_MISSING),
        ([], ready(4, None, rope=1, other=1), Code.AUX_MISSING),
        ([], ready(8, 8), Code.AUX_MISSING),
        ([ready(8)], ready(0, 8), Code.AUX_MISSING),
    ],
)
def test_a_ready_that_cannot_be_is_refused(
    before: list[object], event: ev.ReadyTo, code: Code
) -> None:
    source = source_in(State.WAITING_FOR_INPUT, aux_names=("rope",))
    after(source, *before)
    assert outcome(source, event) == f"refused: {code}"


@pytest.mark.parametrize("again", [ready(8), ready(3), ready(8, 16), ready(0, None, rope=1)])
def test_a_ready_that_was_said_before_changes_nothing(again: ev.ReadyTo) -> None:
    source = source_in(State.WAITING_FOR_INPUT, aux_names=("rope",))
    after(source, ready(8, 16, rope=1))
    assert outcome(source, again) == "absorbed"
    assert (source.available_tokens, source.total_tokens) == (8, 16)


def test_aux_alone_is_news() -> None:
    source = source_in(State.WAITING_FOR_INPUT, aux_names=("rope",))
    assert outcome(source, ready(0, None, rope=1)) == "stays SendProgress"
    assert source.snapshot().aux == {"rope": 1}


def test_a_total_may_be_told_late_and_alone() -> None:
    source = source_in(State.TRANSFERRING)
    assert len(of(after(source, ready(0, 8)), ev.SendProgress)) == 1
    assert (source.available_tokens, source.total_tokens) == (8, 8)


def test_a_payload_of_no_tokens() -> None:
    source = fresh_source()
    after(source, ev.Tick(0.0), ready(0, 0))
    after(source, pulled(1), ev.Done(State.SUCCESS, None))
    assert (source.state, source.forgettable) == (State.SUCCESS, True)


# --- what it serves ---


@pytest.mark.parametrize(
    ("told", "servable"),
    [(ready(3), 0), (ready(4), 4), (ready(7), 4), (ready(7, 8), 4), (ready(7, 7), 7)],
)
def test_whole_blocks_are_served_and_the_last_tokens_once_they_are_the_last(
    told: ev.ReadyTo, servable: int
) -> None:
    source = source_in(State.WAITING_FOR_INPUT)
    after(source, told)
    assert source.servable_tokens == servable
    assert (source.state is State.TRANSFERRING) == (servable > 0)
    wants = [want(0), want(4), want(4, 3)]
    sent = served(after(source, pulled(2, 0, *wants)))
    assert sent == [one for one in ((0, 4), (4, 3)) if sum(one) <= servable]


def test_an_extent_goes_out_once_on_each_connection() -> None:
    source = source_in(State.WAITING_FOR_INPUT)
    after(source, ready(8))
    assert served(after(source, pulled(2, 0, want(0)))) == [(0, 4)]
    assert served(after(source, pulled(3, 0, want(0), want(4)))) == [(4, 4)]
    after(source, ev.Sent(KEY, 0))
    assert served(after(source, pulled(4, 0, want(0), want(0, 8)))) == []
    again = of(after(source, pulled(5, 0, want(0, 4, OTHER))), ev.Serve)
    assert [(one.key, one.handle) for one in again] == [(OTHER, 7)]


def test_a_sink_has_so_many_chunks_under_way_and_no_more() -> None:
    """Every event looks at each of them; a sink claims a quarter of that at once."""
    source = source_in(State.WAITING_FOR_INPUT)
    after(source, ready(8))
    keys = [ev.StreamKey(KEY.peer, 0, number) for number in range(READING_MAX + 5)]
    wants = [want(0, 4, key) for key in keys]
    sent = served(after(source, pulled(2, 0, *wants[:-5]), pulled(3, 0, *wants[-5:])))
    assert len(sent) == source.chunks_under_way == READING_MAX
    assert len(source.streams) == READING_MAX  # nothing is kept of those that were dropped
    after(source, ev.StreamDown(keys[0]))
    assert len(served(after(source, pulled(4, 0, wants[-1])))) == 1


def test_after_a_connection_has_ended_its_books_are_closed() -> None:
    """The number of a connection never comes back, so nothing may be kept for it."""
    source = source_in(State.WAITING_FOR_INPUT)
    before = frozen(source)
    after(source, ready(8), pulled(2, 0, want(0), want(4)), ev.StreamDown(KEY))
    held, was = frozen(source), before
    assert isinstance(held, dict)
    assert isinstance(was, dict)
    assert (held["_served"], held["_reading"]) == (was["_served"], was["_reading"])


def test_what_was_acknowledged_is_not_served_again() -> None:
    source = source_in(State.WAITING_FOR_INPUT)
    after(source, ready(8), pulled(3, 4))
    assert served(after(source, pulled(2, 0, want(0), want(4)))) == [(4, 4)]  # an old pull
    assert source.sent_tokens == 4


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (pulled(9, 0, want(0), sink="c" * 16), Code.SINK_TAKEN),
        (pulled(9, 12, want(8), start=8), Code.PEER_PROTOCOL),
        (pulled(9, 0, want(0), start=4), Code.START_MISMATCH),
    ],
)
def test_a_bad_pull_gets_an_error_and_nothing_else(bad: ev.Pulled, code: Code) -> None:
    source = fresh_source(start_tokens=8)
    after(source, ev.Tick(0.0), granted(0, 2, Role.SOURCE), pulled(1, 8, start=8), ready(11))
    before = frozen(source)
    [answer] = of(source.handle(bad), ev.SendProgress)
    assert answer.error is not None
    assert (answer.error.code, answer.number, answer.sink) == (code, 9, bad.sink)
    assert frozen(source) == before


def test_news_are_told_once_with_the_number_of_the_newest_pull() -> None:
    source = source_in(State.WAITING_FOR_INPUT)
    answer = of(after(source, pulled(6), pulled(5)), ev.SendProgress)
    assert [one.number for one in answer] == [6, 5]  # each answer echoes its own
    assert [one.number for one in of(after(source, ready(4)), ev.SendProgress)] == [6]
    assert of(after(source, ready(5), ready(6), ev.Tick(1.0)), ev.SendProgress) == []


# --- its blocks ---


def test_a_block_is_freed_once_acknowledged_and_room_is_asked_for() -> None:
    source = source_in(State.WAITING_FOR_INPUT)
    after(source, ready(8))
    assert freed(after(source, pulled(2, 3))) == []
    effects = after(source, pulled(3, 4))
    assert (freed(effects), source.window.base_tokens) == ([0], 4)
    assert of(effects, ev.WantBlocks) == [ev.WantBlocks(1)]
    effects = after(source, pulled(4, 8))
    assert of(effects, ev.WantBlocks) == [ev.WantBlocks(2, urgent=True)]  # it holds none


@pytest.mark.parametrize("proof", [ev.Sent(KEY, 0), ev.StreamDown(KEY)])
def test_an_acknowledged_block_that_is_still_read_is_kept(proof: object) -> None:
    """The same tokens may have come on another connection while a thread hangs in this one."""
    source = source_in(State.TRANSFERRING)
    effects = after(source, pulled(3, 0, want(0, 4, OTHER)), ev.Sent(OTHER, 0), pulled(4, 8))
    assert (freed(effects), source.window.base_tokens) == ([], 0)
    assert freed(after(source, proof)) == [0]


def test_a_sink_that_starts_later_frees_blocks_only_as_the_worker_leaves_them() -> None:
    source = source_in(State.BOOTSTRAPPING)
    assert freed(after(source, pulled(1, 8, start=8))) == []
    assert freed(after(source, ready(4))) == [0]


def test_room_is_asked_for_up_to_a_known_total() -> None:
    source = fresh_source()
    assert of(after(source, ev.Tick(0.0)), ev.WantBlocks) == [ev.WantBlocks(2)]
    assert of(after(source, ready(0, 3)), ev.WantBlocks) == [ev.WantBlocks(1)]
    assert source.target_tokens == 3 < WINDOW


def test_a_local_sink_gets_the_ready_blocks_and_they_count_as_acknowledged() -> None:
    source = source_in(State.WAITING_FOR_INPUT)
    after(source, ready(6, 6))
    handed = of(after(source, ev.GiveOver(0, 2)), ev.HandOver)
    assert [(one.leases, one.tokens) for one in handed] == [((lease(0, 2, Role.SOURCE),), 6)]
    assert (source.sent_tokens, source.window.blocks) == (6, 0)
    assert outcome(source, ev.GiveOver(0, 2)) == "absorbed"  # the same request again


def test_a_local_sink_gets_no_more_blocks_than_it_has_room_for() -> None:
    source = source_in(State.WAITING_FOR_INPUT)
    after(source, ready(8))
    [one] = of(after(source, ev.GiveOver(0, 1)), ev.HandOver)
    assert (one.leases[0].run.blocks, one.tokens, source.window.base_tokens) == (1, 4, 4)


def test_a_source_keeps_its_last_block_for_its_own_next_tokens() -> None:
    """It went to one whose sink waited for room that this one's sink held: neither could go on."""
    source = source_in(State.WAITING_FOR_INPUT)
    after(source, ready(8, 12))
    assert of(after(source, pulled(2, 4)), ev.WantBlocks) == [ev.WantBlocks(1)]
    effects = after(source, pulled(3, 8))
    assert of(effects, ev.WantBlocks) == [ev.WantBlocks(1, urgent=True)]
    kinds = [type(e) for e in effects]
    assert kinds.index(ev.WantBlocks) < kinds.index(ev.Free)
