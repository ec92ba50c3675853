"""What must hold in every state and across every step, and where everything must be able to end."""

from model.state import (
    FAILED,
    HOLDS,
    LIVE,
    SUCCESS,
    Setup,
    State,
    prefix,
    sink_shown,
    source_shown,
)


def wrong(state: State, setup: Setup) -> str | None:
    """The first rule that a state breaks."""
    return _books(state) or _threads(state) or _consumer(state, setup) or _sides(state, setup)


def wrong_step(before: State, after: State) -> str | None:
    """The first rule that a step breaks: what was shown is never taken back."""
    old, new = sink_shown(before), sink_shown(after)
    if old.attempt == new.attempt:
        if prefix(new.committed) < prefix(old.committed):
            return "I2: sent_tokens fell"
        if new.partial_sent_tokens < old.partial_sent_tokens:
            return "I2: partial_sent_tokens fell"
        if old.state != LIVE and new.state != old.state:
            return "I9: a terminal state changed"
    shown, later = source_shown(before), source_shown(after)
    if shown.attempt == later.attempt and later.ready < shown.ready:
        return "I2: ready tokens fell"
    return None


def _books(state: State) -> str | None:
    for name, side, hands in (
        ("sink", state.sink, state.consumer.hands),
        ("source", state.source, state.producer.hands),
    ):
        held = side.window + side.quarantine
        if len(set(held)) != len(held):
            return f"I1: the {name} has a block twice"
        if not set(hands).isdisjoint(side.window):
            return f"I7: the {name} granted a block that a worker of an old attempt touches"
    return None


def _threads(state: State) -> str | None:
    """Whoever writes or reads a block does so in the window that it is of, or in quarantine."""
    sink, source, places = state.sink, state.source, []
    for line in state.lines:
        if line.writer is not None:
            place, chunk = line.writer.place, line.writer.chunk
            places.append(place)
            at = chunk.block - sink.base
            its_own = sink.window[at : at + 1] == (place,) and at >= 0
            if place not in sink.quarantine and not its_own:
                return f"I4: block {place} is written for {chunk.block}, whose it is not"
            if its_own and sink.committed >> chunk.block & 1:
                return f"I4: committed block {chunk.block} is written again"
        for job in line.jobs:
            at = job.block - source.base
            its_own = job.attempt == source.attempt and (
                at >= 0 and source.window[at : at + 1] == (job.place,)
            )
            if job.place not in source.quarantine and not its_own:
                return f"I7: block {job.place} is read for {job.block}, whose it is not"
    if len(set(places)) != len(places):
        return "I4: two write into one block"
    return None


def _consumer(state: State, setup: Setup) -> str | None:
    """I3: every token that is shown and not yet taken is there, and is what it should be."""
    shown, worker = sink_shown(state), state.consumer
    if worker.state != HOLDS or shown.attempt != state.sink.attempt or shown.state == FAILED:
        return None
    first = worker.taken // setup.block_tokens
    if first < shown.base and worker.taken < setup.tokens:
        return f"I3: token {worker.taken} was freed before it was taken over"
    for block in range(max(first, shown.base), prefix(shown.committed)):
        if block - shown.base >= len(shown.window):
            return f"I7: committed block {block} is in no window"
        name = state.sink_bytes[shown.window[block - shown.base]]
        if name != (shown.attempt, block):
            return f"I3: block {block} of attempt {shown.attempt} holds {name}"
    return None


def _sides(state: State, setup: Setup) -> str | None:
    sink, source, shown = state.sink, state.source, sink_shown(state)
    edge = sink.base + len(sink.window)
    if edge > sink.partial_sent_tokens // setup.block_tokens + setup.window:
        return f"I6: the window reaches {edge}"
    may_fail = setup.attempts > 1 or setup.sink_dies or setup.source_dies
    if FAILED in (sink.state, source.state) and not may_fail:
        return "it failed for no good reason"
    if sink.state == SUCCESS and prefix(sink.committed) != setup.blocks:
        return "I9: success without all of it"
    if source.attempt == shown.attempt == sink.attempt:
        if shown.state == LIVE and source.base > prefix(shown.committed):
            return f"I2: the source gave block {source.base - 1} away, the sink may need it"
        if source.state == SUCCESS and shown.state != SUCCESS:
            return "I9: the source succeeded, its sink did not"
    return None


def is_over(state: State) -> bool:
    """Both sides have ended, both know, and every block is free."""
    sink, source = state.sink, state.source
    return (
        sink.state != LIVE
        and source.state != LIVE
        and source.attempt == sink.attempt
        and state.life.noted
        and not (sink.window or sink.quarantine or source.window or source.quarantine)
    )
