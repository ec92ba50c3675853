"""SourceTransfer at its end: deadlines, the lease and its correction, draining before reuse."""

import random
from typing import Any

import pytest

from core.test_sink import of
from core.test_sink_table import after, granted, outcome, pulled
from core.test_source import freed, ready, served
from core.test_source_table import EVENTS, KEY, LOST, lease_over, source_in, want
from kvferry_daemon.core import events as ev
from kvferry_daemon.core.source import SourceTransfer
from kvferry_proto.errors import Code
from kvferry_proto.states import Role, StallReason, State


def code_of(source: SourceTransfer) -> str | None:
    return source.error.code if source.error else None


# --- deadlines ---


@pytest.mark.parametrize(
    ("state", "before", "why"),
    [
        (State.BOOTSTRAPPING, [], StallReason.WAITING_FOR_PEER),
        (State.WAITING_FOR_INPUT, [], StallReason.WAITING_FOR_INPUT),
        (State.WAITING_FOR_INPUT, [ready(8)], StallReason.WAITING_FOR_RESUME),
        (State.WAITING_FOR_INPUT, [ready(8), pulled(2, 8)], StallReason.WAITING_FOR_BLOCKS),
        (State.TRANSFERRING, [], None),
    ],
)
def test_no_progress_fails_it_and_says_what_it_waited_for(
    state: State, before: list[object], why: StallReason | None
) -> None:
    source = source_in(state)
    after(source, *before)
    assert source.stall is why
    if state is not State.BOOTSTRAPPING:
        after(source, ev.Tick(25.0), pulled(3, 0), ev.Tick(50.0), pulled(4, 0))  # still asked
    after(source, ev.Tick(59.9))
    assert not source.ended
    after(source, ev.Tick(60.0))
    assert source.error is not None
    assert source.error.code == Code.STALLED
    assert f", {why.value if why else 'moving'}," in source.error.message


def test_the_lease_runs_from_the_last_good_pull() -> None:
    source = source_in(State.TRANSFERRING)
    after(source, ev.Tick(20.0), pulled(3), ev.Tick(40.0), pulled(4, 0, sink="c" * 16))
    assert source.wake_at_s == 50.0
    after(source, ev.Tick(49.9))
    assert not source.ended
    [told] = of(after(source, ev.Tick(50.0)), ev.SendProgress)
    assert (code_of(source), told.number) == (Code.LEASE_EXPIRED, 3)


def test_without_a_sink_there_is_no_lease() -> None:
    source = source_in(State.BOOTSTRAPPING)
    after(source, ev.Tick(59.0))
    assert source.state is State.BOOTSTRAPPING


# --- the end ---


def test_a_late_success_corrects_a_lease_that_ran_out_and_ends_the_quarantine() -> None:
    source = lease_over()
    assert source.quarantined
    after(source, ev.Done(State.SUCCESS, None))
    assert (source.state, source.snapshot().error) == (State.SUCCESS, None)
    assert freed(after(source, ev.Sent(KEY, 0))) == [0]
    assert (source.quarantined, source.forgettable) == (False, True)


def test_a_late_failure_does_not() -> None:
    source = lease_over()
    assert outcome(source, ev.Done(State.FAILED, LOST)) == "absorbed"


@pytest.mark.parametrize(
    "end", [ev.Fail(Code.ABORTED, "enough"), ev.WorkerLost(True, "gone"), ev.Release()]
)
def test_a_failure_that_is_no_guess_is_not_corrected(end: object) -> None:
    source = source_in(State.TRANSFERRING)
    after(source, end)
    assert outcome(source, ev.Done(State.SUCCESS, None)) == "absorbed"
    assert source.state is State.FAILED


def test_the_sink_s_failure_is_told_on() -> None:
    source = source_in(State.TRANSFERRING)
    after(source, ev.Done(State.FAILED, LOST))
    assert source.error is not None
    assert (source.error.code, source.error.message) == (Code.SINK_FAILED, "worker_lost: gone")


@pytest.mark.parametrize("proof", [ev.Sent(KEY, 0), ev.StreamDown(KEY)])
@pytest.mark.parametrize("release", [ev.Release(), ev.WorkerLost(True, "gone")])
def test_blocks_are_freed_once_nobody_writes_and_nobody_reads(
    proof: object, release: object
) -> None:
    for first, then in ((proof, release), (release, proof)):
        source = source_in(State.FAILED)
        assert source.quarantined
        assert freed(after(source, first)) == []
        assert freed(after(source, then)) == [0]
        assert (source.window.blocks, source.forgettable, source.stall) == (0, True, None)


def test_a_worker_that_is_lost_but_not_dead_keeps_its_blocks_from_reuse() -> None:
    source = source_in(State.WAITING_FOR_INPUT)
    after(source, ev.WorkerLost(False, "silent"))
    assert (code_of(source), source.stall) == (Code.WORKER_LOST, StallReason.DRAINING)
    assert after(source, ev.WorkerLost(False, "still silent"), ev.Tick(1e6)) == []
    assert freed(after(source, ev.WorkerLost(True, "its lock fell"))) == [0]


@pytest.mark.parametrize(
    "good_bye", [ev.Release(), ev.WorkerLost(True, "gone"), ev.WorkerLost(False, "silent")]
)
def test_once_all_is_ready_the_worker_may_go(good_bye: object) -> None:
    source = source_in(State.TRANSFERRING)
    after(source, ready(8, 8))
    assert freed(after(source, good_bye)) == []
    assert source.state is State.TRANSFERRING
    assert served(after(source, pulled(3, 0, want(4)))) == [(4, 4)]
    after(source, ev.Sent(KEY, 0), ev.Sent(KEY, 4))
    assert freed(after(source, ev.Done(State.SUCCESS, None))) == [0]


def test_a_worker_that_releases_early_is_told_so() -> None:
    source = source_in(State.TRANSFERRING)
    after(source, ev.Release())
    assert code_of(source) == Code.RELEASED_EARLY


def test_a_thread_that_hangs_has_its_connection_closed_again_and_again() -> None:
    source = source_in(State.FAILED)
    times = []
    for _ in range(3):
        times.append(source.wake_at_s)
        assert after(source, ev.Tick(source.wake_at_s)) == [ev.CloseStream(KEY)]
    assert times == [2.0, 4.0, 6.0]
    after(source, ev.StreamDown(KEY))
    assert source.wake_at_s == float("inf")


def test_blocks_that_cross_the_end_go_back_at_once() -> None:
    source = source_in(State.FAILED)
    assert freed(after(source, granted(7, 1, Role.SOURCE))) == [7]


@pytest.mark.parametrize("seed", range(120))
def test_a_random_life_keeps_its_books(seed: int) -> None:
    """``outcome`` checks that the number grew exactly when something visible changed."""
    dice = random.Random(seed)
    source = source_in(dice.choice(list(State)))
    known: dict[str, Any] = {"sent": 0, "available": 0, "total": None}
    for step in range(20):
        label = dice.choice([one for one in sorted(EVENTS) if "group" not in one])
        event = granted(100 + step, 1, Role.SOURCE) if label == "Granted" else EVENTS[label]
        if isinstance(event, ev.Tick):
            event = ev.Tick(source.now_s + dice.choice([0.1, 1.0, 20.0]))
        what = outcome(source, event)
        assert what != "impossible"
        assert source.sent_tokens >= known["sent"]
        assert source.available_tokens >= known["available"]
        assert known["total"] in (None, source.total_tokens), "I5"
        known = {
            "sent": source.sent_tokens,
            "available": source.available_tokens,
            "total": source.total_tokens,
        }
        if isinstance(event, ev.Tick):
            assert source.wake_at_s > source.now_s, "the timer would run in circles"
