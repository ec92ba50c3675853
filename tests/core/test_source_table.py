"""SourceTransfer: every event in every state, as a table (test_sink_table.py has its grammar)."""

from typing import Any

import pytest

from core.test_sink_table import (
    BLOCK,
    SINK,
    TIMING,
    WINDOW,
    after,
    granted,
    heard,
    lease,
    outcome,
    pulled,
    rows,
    what_is_missing,
)
from kvferry_daemon.core import events as ev
from kvferry_daemon.core.shape import whole_blocks
from kvferry_daemon.core.source import SourceTransfer
from kvferry_daemon.core.transfer import Opening
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.peer import Want
from kvferry_proto.states import Role, State

KEY, OTHER = ev.StreamKey(SINK, 0, 1), ev.StreamKey(SINK, 1, 5)

# What else is true of a source in each state: see `source_in`.
TABLE = """
Tick                  | BWTSF | stays
Tick, 3 s on          | BWT   | stays
Tick, 3 s on          | SF    | stays CloseStream
Tick, a lease on      | B     | stays
Tick, a lease on      | WT    | FAILED SendProgress Quarantine
Tick, a lease on      | SF    | stays CloseStream
Tick, a minute on     | B     | FAILED Quarantine
Tick, a minute on     | WT    | FAILED SendProgress Quarantine
Tick, a minute on     | SF    | stays CloseStream
Slept                 | BWT   | stays
Slept                 | SF    | absorbed
Granted               | BWT   | stays
Granted               | SF    | stays Free
Promised              | BWT   | stays
Promised              | SF    | absorbed
ReadyTo 4             | B     | stays
ReadyTo 4             | W     | TRANSFERRING SendProgress
ReadyTo 4             | TSF   | absorbed
ReadyTo 9             | BWT   | refused: ready_beyond_window
ReadyTo 9             | SF    | absorbed
ReadyTo 8 of 8        | B     | stays
ReadyTo 8 of 8        | W     | TRANSFERRING SendProgress
ReadyTo 8 of 8        | T     | stays SendProgress
ReadyTo 8 of 8        | SF    | absorbed
ReadyTo 0 of 0        | B     | stays FreeTail
ReadyTo 0 of 0        | W     | stays FreeTail SendProgress
ReadyTo 0 of 0        | T     | refused: total_too_small
ReadyTo 0 of 0        | SF    | absorbed
ReadyTo with aux      | BWT   | refused: aux_missing
ReadyTo with aux      | SF    | absorbed
Pulled                | B     | WAITING_FOR_INPUT SendProgress
Pulled                | WTSF  | stays SendProgress
Pulled, wants         | B     | WAITING_FOR_INPUT SendProgress
Pulled, wants         | WSF   | stays SendProgress
Pulled, wants         | T     | stays Serve SendProgress
Pulled, acks          | BWTSF | stays SendProgress
Pulled, acks too much | BWTSF | stays SendProgress
Pulled by another     | B     | WAITING_FOR_INPUT SendProgress
Pulled by another     | WTSF  | stays SendProgress
Sent                  | BW    | absorbed
Sent                  | TF    | stays
Sent                  | S     | stays Free
Sent, but not asked   | BWTSF | absorbed
StreamDown            | BW    | absorbed
StreamDown            | TF    | stays
StreamDown            | S     | stays Free
StreamDown of another | BWTSF | absorbed
GiveOver              | BWSF  | absorbed
GiveOver              | T     | stays
Done                  | BWT   | SUCCESS Quarantine
Done                  | SF    | absorbed
Done, lease over      | F     | SUCCESS
Done, failed          | B     | FAILED Quarantine
Done, failed          | WT    | FAILED SendProgress Quarantine
Done, failed          | SF    | absorbed
Release               | B     | FAILED Free
Release               | W     | FAILED SendProgress Free
Release               | T     | FAILED SendProgress Quarantine
Release               | SF    | stays
Fail                  | B     | FAILED Quarantine
Fail                  | WT    | FAILED SendProgress Quarantine
Fail                  | SF    | absorbed
WorkerLost            | B     | FAILED Quarantine
WorkerLost            | WT    | FAILED SendProgress Quarantine
WorkerLost            | SF    | absorbed
WorkerLost dead       | B     | FAILED Free
WorkerLost dead       | W     | FAILED SendProgress Free
WorkerLost dead       | T     | FAILED SendProgress Quarantine
WorkerLost dead       | SF    | stays
PeerUp                | BWTSF | absorbed
PeerDown              | BWTSF | absorbed
NewsLost              | BWTSF | absorbed
StreamUp              | BWTSF | absorbed
Heard                 | BWTSF | absorbed
Received              | BWTSF | absorbed
Missed                | BWTSF | absorbed
TookOver              | BWTSF | absorbed
RoomAgain             | BWTSF | absorbed
ResumeAt              | BWTSF | absorbed
DoneNoted             | BWTSF | absorbed
Joined, group         | BW    | stays WantBlocks
Joined, group         | TSF   | stays
ReadyTo 8 of 8, group | T     | stays
ReadyTo 8 of 9, group | T     | refused: total_changed
Release, group        | B     | FAILED
Release, group        | W     | FAILED SendProgress
Release, group        | T     | stays
Release, group        | SF    | stays
WorkerLost, group     | SF    | absorbed
ActedOn               | BWTSF | absorbed
Shaped                | BWTSF | absorbed
Copied                | BWTSF | absorbed
"""


def want(first_token: int, tokens: int = BLOCK, key: ev.StreamKey = KEY) -> Want:
    return Want(
        first_token=first_token, tokens=tokens, stream=key.stream, connection=key.connection
    )


def fresh_source(**changes: Any) -> SourceTransfer:
    """A source that has just been opened."""
    given: dict[str, Any] = {
        "key": ev.Key(Role.SOURCE, "t", 0),
        "session": "s",
        "pool_id": "p",
        "window_tokens": WINDOW,
        "block_size_tokens": BLOCK,
    }
    return SourceTransfer(Opening(**(given | changes)), TIMING, 0.0)


def source_in(state: State, **changes: Any) -> SourceTransfer:
    """A source with two blocks; once it moves both are ready, and one of them is being read.

    It has ended while a thread still read: with Success after all was ready, or aborted before.
    """
    source = fresh_source(**changes)
    after(source, ev.Tick(0.0), granted(0, 2, Role.SOURCE))
    if state is not State.BOOTSTRAPPING:
        after(source, pulled(1))
    if state in (State.TRANSFERRING, State.SUCCESS, State.FAILED):
        after(source, ev.ReadyTo(8, None, None), pulled(2, 0, want(0)))
    if state is State.SUCCESS:
        after(source, ev.ReadyTo(8, 8, None), ev.Done(State.SUCCESS, None))
    if state is State.FAILED:
        after(source, ev.Fail(Code.ABORTED, "enough"))
    assert source.state is state
    return source


def group_source_in(state: State) -> SourceTransfer:
    """Rank 0 of 2; once the source moves the other one has come, and both have their blocks ready.

    Rank 1 has told that there are 8 tokens; rank 0 has not.
    """
    source = fresh_source(world_size=2)
    after(source, ev.Tick(0.0))
    if state is not State.BOOTSTRAPPING:
        after(source, pulled(1))
    if state in (State.TRANSFERRING, State.SUCCESS, State.FAILED):
        roles = (lease(0, 2, Role.SOURCE), lease(4, 2, Role.SOURCE))
        after(source, ev.Joined(1, "r"), ev.Granted(roles))
        after(source, ev.ReadyTo(8, None, None), ev.ReadyTo(8, 8, None, 1), pulled(2, 0, want(0)))
    if state is State.SUCCESS:
        after(source, ev.ReadyTo(8, 8, None), ev.Done(State.SUCCESS, None))
    if state is State.FAILED:
        after(source, ev.Fail(Code.ABORTED, "enough"))
    assert source.state is state
    return source


def lease_over() -> SourceTransfer:
    """All was ready and a block is still read, but the sink has asked for nothing any more."""
    source = source_in(State.TRANSFERRING)
    after(source, ev.ReadyTo(8, 8, None), ev.Tick(TIMING.lease_s))
    assert source.state is State.FAILED
    return source


LOST = ErrorInfo.of(Code.WORKER_LOST, "gone")
EVENTS: dict[str, object] = {
    "Tick": ev.Tick(0.3),
    "Tick, 3 s on": ev.Tick(3.0),
    "Slept": ev.Slept(2.0),
    "Tick, a lease on": ev.Tick(30.0),
    "Tick, a minute on": ev.Tick(61.0),
    "Granted": granted(7, 1, Role.SOURCE),
    "Promised": ev.Promised(1),
    "ReadyTo 4": ev.ReadyTo(4, None, None),
    "ReadyTo 9": ev.ReadyTo(9, None, None),
    "ReadyTo 8 of 8": ev.ReadyTo(8, 8, None),
    "ReadyTo 0 of 0": ev.ReadyTo(0, 0, None),
    "ReadyTo with aux": ev.ReadyTo(0, None, {"nobody": 1}),
    "Pulled": pulled(3),
    "Pulled, wants": pulled(3, 0, want(4)),
    "Pulled, acks": pulled(3, 4),
    "Pulled, acks too much": pulled(3, 12),
    "Pulled by another": pulled(3, 0, sink="c" * 16),
    "Sent": ev.Sent(KEY, 0),
    "Sent, but not asked": ev.Sent(KEY, 4),
    "StreamDown": ev.StreamDown(KEY),
    "StreamDown of another": ev.StreamDown(OTHER),
    "GiveOver": ev.GiveOver(4, 1),
    "Done": ev.Done(State.SUCCESS, None),
    "Done, lease over": ev.Done(State.SUCCESS, None),
    "Done, failed": ev.Done(State.FAILED, LOST),
    "Release": ev.Release(),
    "Fail": ev.Fail(Code.ABORTED, "enough"),
    "WorkerLost": ev.WorkerLost(False, "silent"),
    "WorkerLost dead": ev.WorkerLost(True, "gone"),
    "PeerUp": ev.PeerUp(),
    "PeerDown": ev.PeerDown(),
    "NewsLost": ev.NewsLost(),
    "StreamUp": ev.StreamUp(KEY),
    "Heard": heard(1),
    "Received": ev.Received(KEY, 0),
    "Missed": ev.Missed(KEY, 0),
    "TookOver": ev.TookOver((lease(7),), 4),
    "RoomAgain": ev.RoomAgain(),
    "ResumeAt": ev.ResumeAt(0),
    "DoneNoted": ev.DoneNoted(),
    "Joined, group": ev.Joined(1, "other"),
    "ReadyTo 8 of 8, group": ev.ReadyTo(8, 8, None),
    "ReadyTo 8 of 9, group": ev.ReadyTo(8, 9, None, 1),
    "Release, group": ev.Release(),
    "WorkerLost, group": ev.WorkerLost(False, "silent"),
    "ActedOn": ev.ActedOn(1, 0),
    "Shaped": ev.Shaped(whole_blocks(BLOCK, 1)),
    "Copied": ev.Copied(KEY, whole_blocks(BLOCK, 1)),
}


@pytest.mark.parametrize(("label", "state", "expected"), rows(TABLE))
def test_an_event_in_a_state(label: str, state: State, expected: str) -> None:
    group = group_source_in if label.endswith("group") else source_in
    source = lease_over() if label.endswith("lease over") else group(state)
    after(source, ev.Tick(source.now_s + 0.1))  # so that progress is seen too
    assert (source.state, outcome(source, EVENTS[label])) == (state, expected)


def test_every_event_in_every_state_has_a_row() -> None:
    assert what_is_missing(TABLE, EVENTS, SourceTransfer) == []
