"""SinkTransfer at its end: deadlines, draining before reuse, telling the source, numbers."""

import random
from collections.abc import Callable

import pytest

from core.test_sink import code_of, of, with_a_full_window
from core.test_sink_table import (
    EVENTS,
    KEY,
    TIMING,
    after,
    fresh_sink,
    granted,
    heard,
    lease,
    outcome,
    sink_in,
)
from kvferry_daemon.core import events as ev
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_proto.errors import Code
from kvferry_proto.states import StallReason, State


def freed(effects: list[ev.Effect]) -> list[int]:
    """First blocks of the leases that are given back."""
    return [one.run.first_block for free in of(effects, ev.Free) for one in free.leases]


def quarantined(effects: list[ev.Effect]) -> list[int]:
    return [one.run.first_block for q in of(effects, ev.Quarantine) for one in q.leases]


# --- deadlines ---


def without_blocks() -> SinkTransfer:
    sink = sink_in(State.WAITING_FOR_INPUT)
    after(sink, heard(1, available_tokens=8))
    return sink


def without_a_peer() -> SinkTransfer:
    sink = fresh_sink()
    after(sink, ev.Tick(0.0))
    return sink


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (without_a_peer, StallReason.WAITING_FOR_PEER),
        (lambda: sink_in(State.BOOTSTRAPPING), StallReason.WAITING_FOR_SOURCE),
        (lambda: sink_in(State.WAITING_FOR_INPUT), StallReason.WAITING_FOR_INPUT),
        (without_blocks, StallReason.WAITING_FOR_BLOCKS),
        (with_a_full_window, StallReason.WAITING_FOR_RESUME),
        (lambda: sink_in(State.TRANSFERRING), None),
    ],
)
def test_no_progress_fails_it_and_says_what_it_waited_for(
    make: Callable[[], SinkTransfer], why: StallReason | None
) -> None:
    sink = make()
    assert sink.stall is why
    after(sink, ev.Tick(59.9))
    assert sink.state is not State.FAILED
    after(sink, ev.Tick(60.0))
    assert (code_of(sink), sink.stall) == (
        Code.STALLED,
        StallReason.DRAINING if sink.window.blocks else None,
    )
    assert sink.error is not None
    assert f", {why.value if why else 'moving'}," in sink.error.message


@pytest.mark.parametrize(
    "progress",
    [ev.Received(KEY, 4), ev.ResumeAt(4), granted(2), heard(1, available_tokens=12)],
)
def test_progress_moves_the_deadline(progress: object) -> None:
    sink = sink_in(State.TRANSFERRING)
    after(sink, ev.Tick(50.0), progress, ev.Tick(109.9))
    assert sink.state is State.TRANSFERRING
    after(sink, ev.Tick(110.0))
    assert code_of(sink) == Code.STALLED


@pytest.mark.parametrize(
    "noise", [ev.PeerUp(), ev.PeerDown(), ev.StreamUp(KEY), heard(1), ev.Missed(KEY, 4)]
)
def test_noise_does_not(noise: object) -> None:
    sink = sink_in(State.TRANSFERRING)
    after(sink, ev.Tick(50.0), noise, ev.Tick(60.0))
    assert code_of(sink) == Code.STALLED


def test_past_the_hold_deadline_blocks_are_quarantined_and_never_freed() -> None:
    """A timer is no proof that the worker has let go of its window."""
    sink = sink_in(State.SUCCESS)
    assert quarantined(after(sink, ev.DoneNoted(), ev.Tick(59.9))) == []
    assert sink.wake_at_s == TIMING.hold_s
    effects = after(sink, ev.Tick(60.0))
    assert (quarantined(effects), sink.stall) == ([0], StallReason.DRAINING)
    assert after(sink, ev.Tick(1e6)) == []
    assert (sink.window.blocks, sink.forgettable) == (2, False)
    assert freed(after(sink, ev.Release())) == [0]
    assert (sink.stall, sink.forgettable) == (None, True)


# --- drain before reuse ---


@pytest.mark.parametrize(
    "proof",
    [ev.Missed(KEY, 4), ev.Received(KEY, 4), ev.StreamDown(KEY)],
    ids=["missed", "late", "cut"],
)
@pytest.mark.parametrize("release", [ev.Release(), ev.WorkerLost(True, "gone")])
def test_blocks_are_freed_once_nobody_writes_and_nobody_reads(
    proof: object, release: object
) -> None:
    for first, then in ((proof, release), (release, proof)):
        sink = sink_in(State.FAILED)
        assert sink.quarantined
        assert freed(after(sink, first)) == []
        assert freed(after(sink, then)) == [0]
        assert (sink.sent_tokens, sink.window.blocks) == (4, 0)  # what came late is not counted


def test_a_worker_that_is_lost_but_not_dead_keeps_its_blocks_from_reuse() -> None:
    sink = sink_in(State.TRANSFERRING)
    effects = after(sink, ev.WorkerLost(False, "silent for 3 s"), ev.Missed(KEY, 4))
    assert (code_of(sink), quarantined(effects), freed(effects)) == (Code.WORKER_LOST, [0], [])
    assert freed(after(sink, ev.WorkerLost(False, "still silent"), ev.Tick(1e6))) == []
    assert freed(after(sink, ev.WorkerLost(True, "its lock fell"))) == [0]


def test_a_worker_that_is_dead_holds_nothing() -> None:
    sink = sink_in(State.TRANSFERRING)
    assert freed(after(sink, ev.WorkerLost(True, "gone"), ev.Missed(KEY, 4))) == [0]


def test_a_writer_that_hangs_has_its_connection_closed_again_and_again() -> None:
    sink = sink_in(State.FAILED)
    after(sink, ev.DoneNoted())
    times = []
    for _ in range(3):
        times.append(sink.wake_at_s)
        assert after(sink, ev.Tick(sink.wake_at_s)) == [ev.CloseStream(KEY)]
    assert times == [2.0, 4.0, 6.0]
    after(sink, ev.StreamDown(KEY))
    assert sink.wake_at_s == float("inf")


def test_a_release_before_the_end_gives_it_up() -> None:
    sink = sink_in(State.TRANSFERRING)
    assert freed(after(sink, ev.Release())) == []
    assert code_of(sink) == Code.RELEASED_EARLY
    assert freed(after(sink, ev.Missed(KEY, 4))) == [0]


def test_blocks_that_cross_the_end_go_back_at_once() -> None:
    sink = sink_in(State.FAILED)
    assert freed(after(sink, granted(7), ev.TookOver((lease(9),), 4))) == [7, 9]
    assert sink.window.blocks == 2


@pytest.mark.parametrize("state", [State.BOOTSTRAPPING, State.WAITING_FOR_INPUT])
def test_an_abort_before_anything_moved_leaves_nothing_behind(state: State) -> None:
    sink = sink_in(state)
    after(sink, ev.Fail(Code.ABORTED, "enough"))
    assert (code_of(sink), sink.stall, sink.forgettable) == (Code.ABORTED, None, False)
    after(sink, ev.DoneNoted())
    assert sink.forgettable


def test_an_abort_takes_back_what_was_asked_of_the_pool() -> None:
    sink = without_blocks()
    effects = after(sink, ev.Fail(Code.ABORTED, "enough"))
    assert of(effects, ev.WantBlocks) == [ev.WantBlocks(0)]


def test_an_abort_after_success_is_too_late() -> None:
    sink = sink_in(State.SUCCESS)
    assert outcome(sink, ev.Fail(Code.ABORTED, "enough")) == "absorbed"


# --- telling the source ---


@pytest.mark.parametrize("state", [State.SUCCESS, State.FAILED])
def test_done_is_repeated_until_it_is_noted(state: State) -> None:
    sink = sink_in(state)
    times: list[float] = []
    for _ in range(12):
        at_s = sink.wake_at_s
        assert of(after(sink, ev.Tick(at_s - 0.001)), ev.SendDone) == []
        if of(after(sink, ev.Tick(at_s)), ev.SendDone):
            times.append(round(at_s, 3))
    assert times[:6] == [0.2, 0.6, 1.4, 3.0, 5.0, 7.0]
    after(sink, ev.DoneNoted())
    assert of(after(sink, ev.Tick(30.0), ev.Tick(50.0)), ev.SendDone) == []


def test_it_is_remembered_until_done_is_noted_or_a_tombstone_s_life_is_over() -> None:
    sink = sink_in(State.SUCCESS)
    after(sink, ev.Release())
    assert not sink.forgettable
    after(sink, ev.Tick(TIMING.tombstone_s - 1))
    assert not sink.forgettable
    after(sink, ev.Tick(TIMING.tombstone_s))
    assert sink.forgettable


# --- whole lives ---


@pytest.mark.parametrize("seed", range(120))
def test_a_random_life_keeps_its_books(seed: int) -> None:
    """``outcome`` checks that the number grew exactly when something visible changed."""
    dice = random.Random(seed)
    sink = sink_in(dice.choice(list(State)))
    for step in range(20):
        label = dice.choice([one for one in sorted(EVENTS) if "group" not in one])
        event = granted(100 + step) if label == "Granted" else EVENTS[label]
        if isinstance(event, ev.Tick):
            event = ev.Tick(sink.now_s + dice.choice([0.1, 1.0, 30.0]))
        sent, ended, resumed = sink.sent_tokens, sink.ended, sink.last_resume_at
        what = outcome(sink, event)
        if what == "impossible":
            return  # a machine that has caught a mistake of its transport is not used any more
        assert sink.sent_tokens >= sent, "I2"
        assert sink.last_resume_at >= resumed
        assert not ended or what == "absorbed" or what.split()[0] in ("stays", "refused:"), "I9"
        if isinstance(event, ev.Tick):
            assert sink.wake_at_s > sink.now_s, "the timer would run in circles"
