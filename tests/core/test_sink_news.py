"""SinkTransfer and what its source says: totals, aux, errors; whole mode; a source in this daemon."""

from typing import Any

import pytest

from core.test_sink import code_of, of, with_a_full_window
from core.test_sink_table import KEY, after, fresh_sink, granted, heard, lease, outcome, sink_in
from kvferry_daemon.core import events as ev
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.states import StallReason, State

# --- what the source says ---


def test_a_total_told_when_all_is_in_place_ends_it() -> None:
    sink = with_a_full_window()
    after(sink, ev.ResumeAt(8), granted(0, 2), ev.Received(KEY, 8), ev.Received(KEY, 12))
    assert sink.state is State.TRANSFERRING
    after(sink, heard(1, available_tokens=32, total_tokens=32), ev.ResumeAt(16))
    after(sink, granted(2, 2), ev.Received(KEY, 16), ev.Received(KEY, 20), ev.ResumeAt(24))
    after(sink, granted(4, 2), ev.Received(KEY, 28))
    assert sink.state is State.TRANSFERRING
    after(sink, ev.Received(KEY, 24))
    assert (sink.state, sink.sent_tokens) == (State.SUCCESS, 32)


def test_a_total_stays_known_when_older_news_come_late() -> None:
    sink = sink_in(State.TRANSFERRING)
    after(sink, heard(1, available_tokens=16, total_tokens=16), heard(1, available_tokens=4))
    assert (sink.total_tokens, sink.available_tokens, sink.state) == (16, 16, State.TRANSFERRING)


@pytest.mark.parametrize(
    ("first", "then", "code"),
    [
        ({"total_tokens": 16}, {"total_tokens": 12}, Code.TOTAL_CHANGED),
        ({"total_tokens": 16}, {"total_tokens": 20}, Code.TOTAL_CHANGED),
        ({}, {"total_tokens": 3}, Code.TOTAL_TOO_SMALL),  # 4 are in place
        ({}, {"total_tokens": 8, "available_tokens": 12}, Code.TOTAL_TOO_SMALL),
        ({"available_tokens": 8}, {"total_tokens": 6}, Code.TOTAL_TOO_SMALL),
        ({"total_tokens": 8}, {"available_tokens": 12}, Code.TOTAL_TOO_SMALL),
    ],
)
def test_a_total_that_cannot_be_true_fails_it(
    first: dict[str, Any], then: dict[str, Any], code: Code
) -> None:
    sink = sink_in(State.TRANSFERRING)
    after(sink, heard(1, **first), heard(1, **then))
    assert code_of(sink) == code


@pytest.mark.parametrize(
    ("start", "total", "state"),
    [
        (0, 0, State.SUCCESS),
        (8, 8, State.SUCCESS),
        (8, 4, State.FAILED),
        (8, 9, State.TRANSFERRING),
    ],
)
def test_a_payload_that_needs_no_token_moved(start: int, total: int, state: State) -> None:
    sink = fresh_sink(start_tokens=start)
    after(sink, ev.Tick(0.0), ev.PeerUp(), heard(1, available_tokens=total, total_tokens=total))
    assert sink.state is state
    assert code_of(sink) == (Code.TOTAL_TOO_SMALL if state is State.FAILED else None)


def test_the_end_waits_for_aux() -> None:
    sink = sink_in(State.TRANSFERRING, aux_names=("rope",))
    after(sink, ev.Received(KEY, 4), heard(1, available_tokens=8, total_tokens=8))
    assert (sink.state, sink.sent_tokens) == (State.TRANSFERRING, 8)
    after(sink, heard(1, available_tokens=8, total_tokens=8, aux={"rope": 3}))
    assert (sink.state, sink.snapshot().aux) == (State.SUCCESS, {"rope": 3})


def test_before_the_first_real_answer_unknown_means_wait() -> None:
    sink = sink_in(State.BOOTSTRAPPING)
    for _ in range(3):
        after(sink, ev.Tick(sink.wake_at_s), heard(2, known=False))
    assert (sink.state, sink.stall) == (State.BOOTSTRAPPING, StallReason.WAITING_FOR_SOURCE)


@pytest.mark.parametrize(("number", "lost"), [(1, False), (2, False), (3, False), (4, True)])
def test_unknown_means_lost_only_to_a_pull_sent_after_the_first_real_answer(
    number: int, lost: bool
) -> None:
    """Pulls 1 to 3 were sent before it, so their answers may have been given before, too."""
    sink = fresh_sink()
    effects = after(sink, ev.Tick(0.0), ev.PeerUp(), ev.Tick(1.0), heard(1))
    assert [pull.number for pull in of(effects, ev.SendPull)] == [1, 2, 3]
    after(sink, ev.Tick(10.0), heard(number, known=False))
    assert code_of(sink) == (Code.SOURCE_LOST if lost else None)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (Code.STALE_ATTEMPT, Code.STALE_ATTEMPT),
        (Code.START_MISMATCH, Code.START_MISMATCH),
        (Code.WORKER_LOST, Code.SOURCE_FAILED),
        (Code.NOT_YOUR_TRANSFER, Code.SOURCE_FAILED),
        (Code.SINK_TAKEN, Code.SINK_TAKEN),
    ],
)
def test_the_source_s_error_is_told_on(said: Code, code: Code) -> None:
    sink = sink_in(State.WAITING_FOR_INPUT)
    after(sink, heard(1, State.FAILED, error=ErrorInfo.of(said, "its words")))
    assert sink.error is not None
    assert (sink.error.code, "its words" in sink.error.message) == (code, True)


# --- whole mode, and a source in this daemon ---


def test_whole_mode_asks_for_all_of_it_once_a_token_exists() -> None:
    sink = sink_in(State.WAITING_FOR_INPUT, max_tokens=24)
    [want] = of(after(sink, heard(1, available_tokens=4)), ev.WantBlocks)
    assert want == ev.WantBlocks(6, whole=True, urgent=True)
    after(sink, granted(0, 6), ev.Received(KEY, 0))
    assert outcome(sink, ev.ResumeAt(4)) == "stays"  # no Free: it keeps the whole until release
    assert (sink.partial_sent_tokens, sink.window.base_tokens) == (4, 0)
    assert sink.stall is StallReason.WAITING_FOR_INPUT


def test_whole_mode_with_a_known_total_reserves_no_more_than_that() -> None:
    sink = sink_in(State.WAITING_FOR_INPUT, max_tokens=24)
    effects = after(sink, heard(1, available_tokens=4, total_tokens=10))
    assert of(effects, ev.WantBlocks) == [ev.WantBlocks(3, whole=True, urgent=True)]


@pytest.mark.parametrize("news", [{"total_tokens": 25}, {"available_tokens": 28}])
def test_whole_mode_refuses_a_payload_over_its_maximum(news: dict[str, Any]) -> None:
    sink = sink_in(State.WAITING_FOR_INPUT, max_tokens=24)
    after(sink, heard(1, **news))
    assert code_of(sink) == Code.MAX_TOKENS_EXCEEDED


def test_blocks_are_taken_over_from_the_edge_up_to_the_target() -> None:
    sink = fresh_sink(source=None)
    effects = after(sink, ev.Tick(0.0), heard(1, available_tokens=32))
    assert of(effects, ev.TakeOver) == [ev.TakeOver(0, 2)]
    effects = after(sink, ev.TookOver((lease(5),), 4))
    assert (of(effects, ev.TakeOver), sink.sent_tokens) == ([ev.TakeOver(4, 1)], 4)
    effects = after(sink, ev.TookOver((lease(9),), 4), ev.ResumeAt(8))
    assert of(effects, ev.TakeOver) == [ev.TakeOver(8, 2)]
