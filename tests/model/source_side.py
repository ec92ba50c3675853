"""The source's daemon and its producer: filling, serving, freeing what is acked, the end."""

from collections.abc import Iterator

from model.state import (
    DEAD,
    FAILED,
    GARBAGE,
    HOLDS,
    LIVE,
    NOTHING,
    RELEASED,
    SUCCESS,
    Chunk,
    Job,
    Message,
    Mutant,
    Setup,
    Source,
    State,
    Step,
    put,
    read_by,
    say,
    source_shown,
    with_line,
)


def source_steps(state: State, setup: Setup) -> Iterator[Step]:
    """Everything that the source's side may do of itself."""
    source = state.source
    if source.attempt + 1 < setup.attempts:
        yield _open(state, setup)
    if source.state == LIVE and source.attempt >= 0:
        yield from _grants(state, setup)
        yield from _fills(state, setup)
    yield from _ends(state, setup)
    for slot, line in enumerate(state.lines):
        if line.jobs:
            yield _send(state, slot, setup)
    if source.quarantine and setup.mutant is Mutant.QUARANTINE_TIMER:
        yield (
            "source: a timer ends the quarantine",
            state._replace(source=source._replace(quarantine=NOTHING)),
        )


def _complete(source: Source, setup: Setup) -> bool:
    return source.total and source.ready == setup.blocks


def _servable(source: Source, setup: Setup) -> int:
    """Whole blocks, and the part full last one once it is the last."""
    whole = source.total or setup.tokens % setup.block_tokens == 0
    return source.ready if whole else min(source.ready, setup.blocks - 1)


def _open(state: State, setup: Setup) -> Step:
    """The router's first or next attempt; the sink may have ended it already."""
    source, worker = state.source, state.producer
    new = Source(source.attempt + 1, total=not setup.late_total, stone=source.stone)
    held = tuple(sorted({*source.quarantine, *source.window}))
    if source.stone >= new.attempt:
        new = new._replace(state=FAILED)
    if setup.mutant is not Mutant.NO_DRAIN:
        new = new._replace(quarantine=held)
    writes = worker.state == HOLDS and not _complete(source, setup)
    hands = tuple(sorted({*worker.hands, *source.window})) if writes else worker.hands
    return f"router: attempt {new.attempt} opens at the source", state._replace(
        source=new,
        source_ledger=new,  # as at the sink
        producer=worker._replace(state=HOLDS, hands=hands),
        lines=tuple(line._replace(served=0) for line in state.lines),
    )


def _grants(state: State, setup: Setup) -> Iterator[Step]:
    source, ledger = state.source, state.source_ledger
    edge = source.base + len(source.window)
    if edge == setup.blocks:
        return
    held = {*source.window, *source.quarantine, *ledger.window, *ledger.quarantine}
    for place in range(setup.source_pool):
        if place not in held:
            yield (
                f"source: pool block {place} is granted for block {edge}",
                state._replace(
                    source=source._replace(window=(*source.window, place)),
                    source_bytes=put(state.source_bytes, place, GARBAGE),
                ),
            )


def _fills(state: State, setup: Setup) -> Iterator[Step]:
    """The producer writes into blocks that it was shown, and says ready."""
    source, shown = state.source, source_shown(state)
    if state.producer.state != HOLDS or shown.attempt != source.attempt:
        return
    block = source.ready
    if shown.base <= block < shown.base + len(shown.window):
        name = (source.attempt, block)
        yield (
            f"producer: fills block {block}, ready",
            state._replace(
                source=source._replace(ready=block + 1),
                source_bytes=put(state.source_bytes, shown.window[block - shown.base], name),
            ),
        )
    if not source.total and source.ready == setup.blocks:
        yield "producer: tells the total", state._replace(source=source._replace(total=True))


def _ends(state: State, setup: Setup) -> Iterator[Step]:
    worker, source, shown = state.producer, state.source, source_shown(state)
    if worker.hands:
        yield (
            "producer: lets the old attempt's blocks go",
            state._replace(producer=worker._replace(hands=NOTHING)),
        )
    if worker.state != HOLDS or source.attempt < 0:
        return
    if shown.state != LIVE and shown.attempt == source.attempt:
        yield "producer: release", state._replace(producer=worker._replace(state=RELEASED))
    if setup.source_dies:
        yield "producer: dies", state._replace(producer=worker._replace(state=DEAD))


def _send(state: State, slot: int, setup: Setup) -> Step:
    """A sender's thread reads a block for the last time, and its bytes leave."""
    line, source = state.lines[slot], state.source
    job = line.jobs[0]
    line = line._replace(jobs=line.jobs[1:])
    if line.sink_open:
        chunk = Chunk(job.attempt, job.block, state.source_bytes[job.place])
        line = line._replace(chunks=(*line.chunks, chunk))
    if setup.mutant is Mutant.FREE_ON_SEND and job.attempt == source.attempt:
        source = source._replace(acked=max(source.acked, job.block + 1))
    label = f"source: block {job.block} is sent on line {slot}"
    return label, with_line(state._replace(source=source), slot, line)


def source_hears(state: State, message: Message, setup: Setup) -> State:
    """A message from the sink's daemon."""
    if message.kind == "done":
        return _on_done(state, message, setup)
    source = state.source
    if message.attempt == source.attempt and source.state == LIVE:
        state = _serve(state, message, setup)
    shown = source_shown(state)
    if shown.attempt != source.attempt:
        return state  # the answer waits for the ledger; the pull comes again
    return say(state, _answer(state, message, setup), setup)


def _answer(state: State, pull: Message, setup: Setup) -> Message:
    shown = source_shown(state)
    if pull.attempt < shown.attempt or shown.stone >= pull.attempt:
        return Message("news", pull.attempt, state=FAILED)  # stale, or ended by the sink itself
    if pull.attempt > shown.attempt:
        return Message("unknown", pull.attempt, late=pull.late)
    available = _servable(shown, setup)
    return Message("news", pull.attempt, available=available, total=shown.total, state=shown.state)


def _serve(state: State, pull: Message, setup: Setup) -> State:
    """Note what is acked; serve an extent at most once on one connection."""
    source = state.source._replace(acked=max(state.source.acked, pull.acked))
    state = state._replace(source=source)
    if not pull.want:
        return state
    block, slot = pull.want
    line, at = state.lines[slot], block - source.base
    held = max(source.base, source.acked) <= block < _servable(source, setup)
    if not held or not line.source_open or line.served >> block & 1:
        return state
    job = Job(source.attempt, block, source.window[at])
    return with_line(
        state, slot, line._replace(jobs=(*line.jobs, job), served=line.served | 1 << block)
    )


def _on_done(state: State, done: Message, setup: Setup) -> State:
    source = state.source
    if done.attempt > source.attempt:
        source = source._replace(stone=max(source.stone, done.attempt))
    elif done.attempt == source.attempt and source.state == LIVE:
        source = source._replace(state=done.state)
    state = state._replace(source=source)
    shown = source if setup.mutant is Mutant.NOTED_BEFORE_LEDGER else source_shown(state)
    ended = shown.attempt == done.attempt and shown.state != LIVE
    if not ended and shown.attempt <= done.attempt and shown.stone < done.attempt:
        return state  # the answer waits for the ledger; done comes again
    return say(state, Message("noted", done.attempt), setup)


def settle_source(state: State, setup: Setup) -> State:
    """What follows at once: the end, and the freeing of what nobody touches any more."""
    source, worker, lines = state.source, state.producer, state.lines
    complete = _complete(source, setup)
    if source.state == LIVE and worker.state == DEAD and not complete:
        source = source._replace(state=FAILED)
    jobs = [job for line in lines for job in line.jobs]
    reading = [job.block for job in jobs if job.attempt == source.attempt]
    base = min([source.acked, source.ready, *reading])
    if setup.mutant is Mutant.FREE_ON_SEND:
        base = min(source.acked, source.ready)
    if base > source.base:
        source = source._replace(base=base, window=source.window[base - source.base :])
    touched = {*read_by(lines), *worker.hands}
    if source.quarantine:
        left = tuple(place for place in source.quarantine if place in touched)
        source = source._replace(quarantine=left)
    unwritten = worker.state != HOLDS or complete or source.attempt < 0
    if source.state != LIVE and unwritten and touched.isdisjoint(source.window):
        source = source._replace(window=NOTHING)
    return state if source is state.source else state._replace(source=source)


__all__ = ["SUCCESS", "settle_source", "source_hears", "source_steps"]
