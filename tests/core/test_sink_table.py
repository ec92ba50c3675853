"""SinkTransfer: every event in every state, as a table; and the tools that the other tables use."""

import copy
from collections import deque
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args

import pytest

from kvferry_daemon.core import events as ev
from kvferry_daemon.core.allocator import Run
from kvferry_daemon.core.pool import Lease
from kvferry_daemon.core.shape import whole_blocks
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.transfer import Opening, Transfer
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.peer import Progress, Pull, Want
from kvferry_proto.states import TERMINAL, Role, State

BLOCK, WINDOW = 4, 8
TIMING = ev.Timing()
STATES = {state.name[0]: state for state in State}
SOURCE, SINK = "tcp://a:1", "b" * 16
KEY, OTHER = ev.StreamKey(SOURCE, 0, 1), ev.StreamKey(SOURCE, 1, 5)
HERE = ev.StreamKey.here(SINK)

# B, W, T, S, F are the states, BOOTSTRAPPING to FAILED; `sink_in` and `local_sink_in` say what else
# is true of a sink in each. `stays`: something changed, but not the state. `absorbed`: nothing did.
TABLE = """
Tick                  | BWT   | stays SendPull
Tick                  | SF    | stays SendDone
Tick, 3 s on          | BWT   | stays SendPull
Tick, 3 s on          | S     | stays SendDone
Tick, 3 s on          | F     | stays CloseStream SendDone
Tick, a minute on     | BW    | FAILED SendDone
Tick, a minute on     | T     | FAILED SendDone CancelClaims Quarantine
Tick, a minute on     | S     | stays Quarantine SendDone
Tick, a minute on     | F     | stays CloseStream SendDone
Slept                 | BWT   | stays
Slept                 | SF    | absorbed
Granted               | BWT   | stays
Granted               | SF    | stays Free
Promised              | BWT   | stays
Promised              | SF    | absorbed
PeerUp                | B     | stays SendPull
PeerUp                | WT    | stays
PeerUp                | SF    | absorbed
PeerDown              | BWT   | stays
PeerDown              | SF    | absorbed
NewsLost              | B     | stays SendPull
NewsLost              | WT    | stays
NewsLost              | SF    | absorbed
StreamUp              | BWT   | stays
StreamUp              | SF    | absorbed
StreamDown            | BWTSF | stays
StreamDown of another | BWTSF | absorbed
Heard                 | B     | WAITING_FOR_INPUT
Heard                 | WTSF  | absorbed
Heard of 16           | BW    | TRANSFERRING WantBlocks
Heard of 16           | T     | stays
Heard of 16           | SF    | absorbed
Heard of a total      | BW    | TRANSFERRING WantBlocks
Heard of a total      | T     | stays
Heard of a total      | SF    | absorbed
Heard of a total of 0 | BW    | SUCCESS SendDone
Heard of a total of 0 | T     | FAILED SendDone CancelClaims Quarantine
Heard of a total of 0 | SF    | absorbed
Heard with aux        | B     | WAITING_FOR_INPUT
Heard with aux        | WT    | stays
Heard with aux        | SF    | absorbed
Heard unknown         | BWTSF | absorbed
Heard failed          | BW    | FAILED SendDone
Heard failed          | T     | FAILED SendDone CancelClaims Quarantine
Heard failed          | SF    | absorbed
Heard of no pull      | BWTSF | absorbed
Received              | BW    | impossible
Received              | T     | stays SendPull
Received              | S     | absorbed
Received              | F     | stays
Missed                | BWS   | absorbed
Missed                | T     | stays Claim SendPull
Missed                | F     | stays
TookOver              | BT    | stays
TookOver              | W     | stays SendPull
TookOver              | SF    | stays Free
RoomAgain             | BWTSF | absorbed
ResumeAt 0            | BWTSF | stays
ResumeAt 4            | BW    | refused: resume_ahead
ResumeAt 4            | TSF   | stays Free
ResumeAt 9            | BWTSF | refused: resume_ahead
Release               | BW    | FAILED SendDone
Release               | T     | FAILED SendDone CancelClaims Quarantine
Release               | S     | stays Free
Release               | F     | stays
Fail                  | BW    | FAILED SendDone
Fail                  | T     | FAILED SendDone CancelClaims Quarantine
Fail                  | SF    | absorbed
WorkerLost            | BW    | FAILED SendDone
WorkerLost            | T     | FAILED SendDone CancelClaims Quarantine
WorkerLost            | SF    | absorbed
WorkerLost dead       | BW    | FAILED SendDone
WorkerLost dead       | T     | FAILED SendDone CancelClaims Quarantine
WorkerLost dead       | S     | stays Free
WorkerLost dead       | F     | stays
DoneNoted             | BWT   | absorbed
DoneNoted             | SF    | stays
Tick, local           | B     | stays SendPull
Tick, local           | W     | stays
Tick, local           | T     | stays TakeOver SendPull
Tick, local           | SF    | stays SendDone
Heard of 16, local    | BW    | TRANSFERRING TakeOver
Heard of 16, local    | T     | stays TakeOver
Heard of 16, local    | SF    | absorbed
TookOver, local       | B     | stays
TookOver, local       | WT    | stays SendPull
TookOver, local       | SF    | stays Free
RoomAgain, local      | BWSF  | absorbed
RoomAgain, local      | T     | stays TakeOver
ResumeAt 4, local     | BW    | refused: resume_ahead
ResumeAt 4, local     | T     | stays Free TakeOver
ResumeAt 4, local     | SF    | stays Free
Fail, local           | BW    | FAILED WantBlocks SendDone
Fail, local           | T     | FAILED WantBlocks SendDone Quarantine
Fail, local           | SF    | absorbed
Joined, group         | BWTSF | stays
ActedOn, group        | BWTSF | stays
Tick, 3 s on, group   | BWT   | stays SendPull
Tick, a minute on, group | BW | FAILED SendDone
ResumeAt 4, group     | T     | stays
ResumeAt 4 by both, group | T | stays Free
Release, group        | T     | FAILED SendDone CancelClaims Quarantine
Release, group        | S     | stays
Release by both, group | S    | stays Free
WorkerLost, group     | SF    | absorbed
WorkerLost dead, group | SF   | stays
Shaped                | BWT   | stays SendPull
Shaped                | SF    | absorbed
Shaped anew           | BW    | stays SendPull
Shaped anew           | T     | FAILED SendDone CancelClaims Quarantine
Copied                | BWTSF | absorbed
Copied, local         | BW    | stays
Copied, local         | T     | stays WantBlocks
Copied, local         | SF    | absorbed
ReadyTo               | BWTSF | absorbed
Pulled                | BWTSF | absorbed
Sent                  | BWTSF | absorbed
GiveOver              | BWTSF | absorbed
Done                  | BWTSF | absorbed
"""

# --- tools ---


def frozen(thing: object) -> object:
    """All that an object holds, as something that later changes do not reach."""
    if isinstance(thing, dict):
        return {key: frozen(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple | deque):
        return [frozen(value) for value in thing]
    if isinstance(thing, set):
        return set(thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: frozen(getattr(thing, field.name)) for field in fields(thing)}
    if thing is None or type(thing).__eq__ is not object.__eq__:
        return thing  # compares by value and cannot change
    names = getattr(type(thing), "__slots__", None) or vars(thing)
    return {name: frozen(getattr(thing, name)) for name in names if name != "_shown"}


def shown(machine: Transfer) -> dict[str, Any]:
    """What a worker would read now, but for the number; the machine's own cache stays as it is."""
    seen = copy.deepcopy(machine).snapshot().model_dump()
    del seen["snapshot"]
    return seen


def outcome(machine: Transfer, event: object) -> str:
    """What one event does, in the words of the tables."""
    before, version, seen = frozen(machine), machine.version, shown(machine)
    was = machine.state
    try:
        effects = machine.handle(event)
    except FerryError as error:
        assert frozen(machine) == before, "a refusal changes nothing"
        return f"refused: {error.code}"
    except AssertionError:
        return "impossible"
    assert machine.version - version == (shown(machine) != seen), "one number for each change"
    if not effects and frozen(machine) == before:
        return "absorbed"
    state = "stays" if machine.state is was else machine.state.name
    return " ".join([state, *(_name(effect) for effect in effects)])


def rows(table: str) -> list[tuple[str, State, str]]:
    """One row for every state that a line names."""
    found = []
    for line in table.strip().splitlines():
        label, letters, what = (part.strip() for part in line.split("|"))
        found += [(label, STATES[letter], what) for letter in letters]
    return found


def event_classes() -> set[str]:
    """The names of all events, of both machines."""
    here = {name for name, thing in vars(ev).items() if is_dataclass(thing)}
    return here - {effect.__name__ for effect in get_args(ev.Effect)} - {"Timing"}


def what_is_missing(table: str, samples: dict[str, object], machine: type[Transfer]) -> list[str]:
    """Pairs without a row, and moves that no row shows."""
    found = rows(table)
    pairs = {(_event(label), state) for label, state, _ in found}
    wanted = {(name, state) for name in event_classes() for state in State}
    missing = [f"{name} in {state.name}" for name, state in sorted(pairs ^ wanted)]
    missing += [f"twice: {row}" for row in found if [r[:2] for r in found].count(row[:2]) > 1]
    for moves, states in ((machine.LIVE, set(State) - TERMINAL), (machine.ENDED, TERMINAL)):
        moving = {_event(label) for label, s, what in found if s in states if what != "absorbed"}
        missing += [f"shown as moving: {n}" for n in moving ^ {event.__name__ for event in moves}]
    missing += [label for label, event in samples.items() if _event(label) != _name(event)]
    return missing


def _event(label: str) -> str:
    return label.split()[0].rstrip(",")


def _name(event: object) -> str:
    return type(event).__name__


def lease(first_block: int, blocks: int = 1, role: Role = Role.SINK) -> Lease:
    """A lease; each block has one of its own number here."""
    return Lease(first_block + 1, 1, role, Run(first_block, blocks))


def granted(first_block: int, blocks: int = 1, role: Role = Role.SINK) -> ev.Granted:
    return ev.Granted((lease(first_block, blocks, role),))


def heard(number: int = 1, state: State = State.TRANSFERRING, **more: Any) -> ev.Heard:
    return ev.Heard(Progress(transfer_id="t", attempt=0, number=number, state=state, **more))


def pulled(number: int, acked: int = 0, *want: Want, sink: str = SINK, start: int = 0) -> ev.Pulled:
    """A sink's daemon asks."""
    return ev.Pulled(
        sink,
        sink,
        Pull(
            transfer_id="t",
            attempt=0,
            number=number,
            handle=7,
            layout_digest=b"x" * 16,
            start_tokens=start,
            acked_tokens=acked,
            want=list(want),
        ),
    )


def fresh_sink(**changes: Any) -> SinkTransfer:
    """A sink that has just been opened, by default for another daemon's source."""
    given: dict[str, Any] = {
        "key": ev.Key(Role.SINK, "t", 0),
        "session": "s",
        "pool_id": "p",
        "window_tokens": WINDOW,
        "block_size_tokens": BLOCK,
        "source": SOURCE,
        "chunk_tokens": BLOCK,
    }
    return SinkTransfer(Opening(**(given | changes)), TIMING, 0.0)


def after(machine: Transfer, *events: object) -> list[ev.Effect]:
    """Handle events in order; return everything that they want done."""
    return [effect for event in events for effect in machine.handle(event)]


# --- the sink's states ---


def sink_in(state: State, **changes: Any) -> SinkTransfer:
    """A linked sink; once it moves it has two blocks, 4 tokens in place and a claim on 4 more."""
    sink = fresh_sink(**changes)
    after(sink, ev.Tick(0.0), ev.PeerUp(), ev.StreamUp(KEY))
    if state is not State.BOOTSTRAPPING:
        after(sink, heard(1))
    if state in (State.TRANSFERRING, State.SUCCESS, State.FAILED):
        after(sink, heard(1, available_tokens=8), granted(0, 2), ev.Received(KEY, 0))
    if state is State.SUCCESS:
        after(sink, ev.Received(KEY, 4), heard(1, available_tokens=8, total_tokens=8))
    if state is State.FAILED:
        after(sink, ev.Fail(Code.ABORTED, "enough"))
    assert sink.state is state
    return sink


def group_sink_in(state: State) -> SinkTransfer:
    """Rank 0 of 2; once the sink moves the other one has come, and both have what one had above."""
    sink = fresh_sink(world_size=2)
    after(sink, ev.Tick(0.0), ev.PeerUp(), ev.StreamUp(KEY))
    if state is not State.BOOTSTRAPPING:
        after(sink, heard(1))
    if state in (State.TRANSFERRING, State.SUCCESS, State.FAILED):
        blocks = ev.Granted((lease(0, 2), lease(4, 2)))
        after(sink, ev.Joined(1, "r"), heard(1, available_tokens=8), blocks)
        after(sink, *(ev.Received(KEY, 0, part) for part in range(2)))
        after(sink, *(ev.ActedOn(sink.version, rank) for rank in range(2)))
    if state is State.SUCCESS:
        after(sink, *(ev.Received(KEY, 4, part) for part in range(2)))
        after(sink, heard(1, available_tokens=8, total_tokens=8))
    if state is State.FAILED:
        after(sink, ev.Fail(Code.ABORTED, "enough"))
    assert sink.state is state
    return sink


def local_sink_in(state: State) -> SinkTransfer:
    """The source is in this daemon; once it moves one block of two is handed over."""
    sink = fresh_sink(source=None)
    after(sink, ev.Tick(0.0))
    if state is not State.BOOTSTRAPPING:
        after(sink, heard(1))
    if state in (State.TRANSFERRING, State.SUCCESS, State.FAILED):
        after(sink, heard(1, available_tokens=8), ev.TookOver((lease(0),), 4))
    if state is State.SUCCESS:
        after(sink, ev.TookOver((lease(1),), 4), heard(1, available_tokens=8, total_tokens=8))
    if state is State.FAILED:
        after(sink, ev.Fail(Code.ABORTED, "enough"))
    assert sink.state is state
    return sink


EVENTS: dict[str, object] = {
    "Tick": ev.Tick(0.3),
    "Tick, 3 s on": ev.Tick(3.0),
    "Slept": ev.Slept(2.0),
    "Tick, a minute on": ev.Tick(61.0),
    "Granted": granted(7),
    "Promised": ev.Promised(1),
    "PeerUp": ev.PeerUp(),
    "PeerDown": ev.PeerDown(),
    "NewsLost": ev.NewsLost(),
    "StreamUp": ev.StreamUp(OTHER),
    "StreamDown": ev.StreamDown(KEY),
    "StreamDown of another": ev.StreamDown(OTHER),
    "Heard": heard(1),
    "Heard of 16": heard(1, available_tokens=16),
    "Heard of a total": heard(1, available_tokens=8, total_tokens=8),
    "Heard of a total of 0": heard(1, total_tokens=0),
    "Heard with aux": heard(1, aux={"rope": 1}),
    "Heard unknown": heard(1, known=False),
    "Heard failed": heard(1, State.FAILED),
    "Heard of no pull": heard(99, State.FAILED),
    "Received": ev.Received(KEY, 4),
    "Missed": ev.Missed(KEY, 4),
    "TookOver": ev.TookOver((lease(7),), 4),
    "RoomAgain": ev.RoomAgain(),
    "ResumeAt 0": ev.ResumeAt(0),
    "ResumeAt 4": ev.ResumeAt(4),
    "ResumeAt 9": ev.ResumeAt(9),
    "Release": ev.Release(),
    "Fail": ev.Fail(Code.ABORTED, "enough"),
    "WorkerLost": ev.WorkerLost(False, "silent"),
    "WorkerLost dead": ev.WorkerLost(True, "gone"),
    "DoneNoted": ev.DoneNoted(),
    "Tick, local": ev.Tick(0.3),
    "Heard of 16, local": heard(1, available_tokens=16),
    "TookOver, local": ev.TookOver((lease(7),), 4),
    "RoomAgain, local": ev.RoomAgain(),
    "ResumeAt 4, local": ev.ResumeAt(4),
    "Fail, local": ev.Fail(Code.ABORTED, "enough"),
    "Joined, group": ev.Joined(1, "other"),
    "ActedOn, group": ev.ActedOn(99, 1),
    "Tick, 3 s on, group": ev.Tick(3.0),
    "Tick, a minute on, group": ev.Tick(61.0),
    "ResumeAt 4, group": ev.ResumeAt(4),
    "ResumeAt 4 by both, group": ev.ResumeAt(4),
    "Release, group": ev.Release(),
    "Release by both, group": ev.Release(),
    "WorkerLost, group": ev.WorkerLost(False, "silent"),
    "WorkerLost dead, group": ev.WorkerLost(True, "gone"),
    "Shaped": ev.Shaped(whole_blocks(BLOCK, 1)),
    "Shaped anew": ev.Shaped(whole_blocks(2, 1)),
    "Copied": ev.Copied(HERE, whole_blocks(BLOCK, 1)),
    "Copied, local": ev.Copied(HERE, whole_blocks(BLOCK, 1)),
    "ReadyTo": ev.ReadyTo(4, None, None),
    "Pulled": pulled(1),
    "Sent": ev.Sent(KEY, 0),
    "GiveOver": ev.GiveOver(0, 1),
    "Done": ev.Done(State.SUCCESS, None),
}


@pytest.mark.parametrize(("label", "state", "expected"), rows(TABLE))
def test_an_event_in_a_state(label: str, state: State, expected: str) -> None:
    kinds = {"local": local_sink_in, "group": group_sink_in}
    sink = kinds.get(label.rpartition(", ")[2], sink_in)(state)
    after(sink, ev.Tick(0.1))  # so that progress, which moves the deadline, is seen too
    if "by both" in label:
        after(sink, replace(EVENTS[label], rank=1))  # type: ignore[type-var]
    assert outcome(sink, EVENTS[label]) == expected


def test_every_event_in_every_state_has_a_row() -> None:
    assert what_is_missing(TABLE, EVENTS, SinkTransfer) == []
