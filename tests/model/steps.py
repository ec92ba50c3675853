"""Every step of the world: both sides, the network, the connections, the ledgers, the crashes."""

from collections.abc import Iterator

from model.sink_side import settle_sink, sink_hears, sink_steps
from model.source_side import settle_source, source_hears, source_steps
from model.state import (
    GARBAGE,
    NOTHING,
    Line,
    Mutant,
    Setup,
    SinkLife,
    State,
    Step,
    put,
    with_line,
)

TO_SINK = ("news", "unknown", "noted")


def steps(state: State, setup: Setup) -> Iterator[Step]:
    """What may happen next; what follows at once has happened already."""
    for label, after in _all(state, setup):
        settled = _forget_ledgers(settle_source(settle_sink(after, setup), setup))
        if settled != state:
            yield label, settled


def _forget_ledgers(state: State) -> State:
    """A ledger that nobody will read any more is no state of its own."""
    if not state.sink_crashes and state.sink_ledger is not state.sink:
        state = state._replace(sink_ledger=state.sink)
    if not state.source_crashes and state.source_ledger is not state.source:
        state = state._replace(source_ledger=state.source)
    return state


def _all(state: State, setup: Setup) -> Iterator[Step]:
    yield from sink_steps(state, setup)
    yield from source_steps(state, setup)
    yield from _network(state, setup)
    for slot, line in enumerate(state.lines):
        yield from _connection(state, slot, line, setup)
    yield from _ledgers(state)
    yield from _crashes(state, setup)


def _network(state: State, setup: Setup) -> Iterator[Step]:
    """A message comes and may come again; or it never comes (again). In any order."""
    for message in sorted(state.bag, key=repr):
        hears = sink_hears if message.kind in TO_SINK else source_hears
        without = state._replace(bag=state.bag - {message})
        yield f"network: {message.kind} comes", hears(without, message, setup)
        yield f"network: {message.kind} comes, and will again", hears(state, message, setup)
        yield f"network: {message.kind} is lost", without


def _connection(state: State, slot: int, line: Line, setup: Setup) -> Iterator[Step]:
    is_over = line == Line()
    if is_over:
        yield f"line {slot}: opens", _opened(state, slot)
        return
    torn = line.sink_open != line.source_open
    if line.sink_open and (setup.cuts or torn):
        yield f"line {slot}: the sink's end closes", _sink_closes(state, slot)
    if line.source_open and (setup.cuts or torn):
        yield f"line {slot}: the source's end closes", _source_closes(state, slot)


def _opened(state: State, slot: int) -> State:
    """A new connection has a new number: what was asked for on the one before is dropped."""
    bag = frozenset(
        m._replace(want=NOTHING) if m.want and m.want[1] == slot else m for m in state.bag
    )
    state = state._replace(bag=bag)
    return with_line(state, slot, Line(sink_open=True, source_open=True))


def _sink_closes(state: State, slot: int) -> State:
    """The receiver's thread has ended, maybe in the middle of a block."""
    line = state.lines[slot]
    if line.writer is not None:
        state = state._replace(sink_bytes=put(state.sink_bytes, line.writer.place, GARBAGE))
    closed = line._replace(sink_open=False, claims=0, chunks=(), writer=None)
    return with_line(state, slot, closed)


def _source_closes(state: State, slot: int) -> State:
    """The sender's thread has ended; what it had sent may still be on its way."""
    line = state.lines[slot]
    return with_line(state, slot, line._replace(source_open=False, jobs=(), served=0))


def _ledgers(state: State) -> Iterator[Step]:
    if state.sink_crashes and state.sink_ledger != state.sink:
        yield "sink: the ledger is written", state._replace(sink_ledger=state.sink)
    if state.source_crashes and state.source_ledger != state.source:
        yield "source: the ledger is written", state._replace(source_ledger=state.source)


def _crashes(state: State, setup: Setup) -> Iterator[Step]:
    """A daemon is gone and back: what its ledger holds, and messages to its old life are void."""
    forgets = setup.mutant is Mutant.QUARANTINE_FORGOTTEN
    if state.sink_crashes:
        after = state
        for slot, line in enumerate(state.lines):
            if line.sink_open:
                after = _sink_closes(after, slot)
        sink = state.sink_ledger
        if forgets:
            sink = sink._replace(quarantine=NOTHING)
        yield (
            "sink: crashes",
            after._replace(
                sink=sink,
                sink_ledger=sink,
                life=SinkLife(),
                bag=frozenset(m for m in state.bag if m.kind not in TO_SINK),
                sink_crashes=state.sink_crashes - 1,
            ),
        )
    if state.source_crashes:
        after = state
        for slot, line in enumerate(state.lines):
            if line.source_open:
                after = _source_closes(after, slot)
        source = state.source_ledger
        if forgets:
            source = source._replace(quarantine=NOTHING)
        yield (
            "source: crashes",
            after._replace(
                source=source,
                source_ledger=source,
                bag=frozenset(m for m in state.bag if m.kind in TO_SINK),
                source_crashes=state.source_crashes - 1,
            ),
        )
