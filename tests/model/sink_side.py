"""The sink's daemon and its consumer: asking, receiving, taking over, the end."""

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
    Line,
    Message,
    Mutant,
    Setup,
    Sink,
    SinkLife,
    State,
    Step,
    Writer,
    prefix,
    put,
    say,
    sink_shown,
    with_line,
    written_by,
)


def sink_steps(state: State, setup: Setup) -> Iterator[Step]:
    """Everything that the sink's side may do of itself."""
    if state.sink.state == LIVE:
        yield from _grants(state, setup)
        yield from _pulls(state, setup)
    yield from _dones(state, setup)
    yield from _receives(state, setup)
    yield from _consumes(state, setup)
    if state.sink.attempt + 1 < setup.attempts:
        yield _retry(state, setup)
    if state.sink.quarantine and setup.mutant is Mutant.QUARANTINE_TIMER:
        yield (
            "sink: a timer ends the quarantine",
            state._replace(sink=state.sink._replace(quarantine=NOTHING)),
        )


def _free(state: State, setup: Setup) -> Iterator[int]:
    sink, ledger = state.sink, state.sink_ledger
    held = {*sink.window, *sink.quarantine, *ledger.window, *ledger.quarantine}
    return (place for place in range(setup.sink_pool) if place not in held)


def _grants(state: State, setup: Setup) -> Iterator[Step]:
    """A block for a token that exists; the allocator may choose any that is free."""
    sink = state.sink
    edge = sink.base + len(sink.window)
    target = sink.partial_sent_tokens // setup.block_tokens + setup.window + sink.extra
    if edge >= min(target, state.life.available):
        return
    for place in _free(state, setup):
        yield (
            f"sink: pool block {place} is granted for block {edge}",
            state._replace(
                sink=sink._replace(window=(*sink.window, place)),
                sink_bytes=put(state.sink_bytes, place, GARBAGE),  # whoever had it wrote there
            ),
        )


def _claimed(state: State) -> int:
    claimed = 0
    for line in state.lines:
        claimed |= line.claims
    return claimed


def _acked(state: State, setup: Setup) -> int:
    if setup.mutant is Mutant.ACK_BEFORE_LEDGER:
        return prefix(state.sink.committed)
    if setup.mutant is Mutant.ACK_HIGHEST:
        return sink_shown(state).committed.bit_length()
    shown = sink_shown(state)
    return prefix(shown.committed) if shown.attempt == state.sink.attempt else 0


def _pulls(state: State, setup: Setup) -> Iterator[Step]:
    """Claims with their pulls, the same pulls again, and pulls that only ask for news.

    A pull that wants several extents is several pulls here, which may be lost one by one.
    """
    sink, life = state.sink, state.life
    pull = Message("pull", sink.attempt, late=life.known, acked=_acked(state, setup))
    yield f"sink: pull, acked {pull.acked}", say(state, pull, setup)
    taken = _claimed(state) | sink.committed
    edge = min(sink.base + len(sink.window), life.available)
    for slot, line in enumerate(state.lines):
        if not line.sink_open:
            continue
        for block in range(sink.base, edge):
            bit = 1 << block
            want = pull._replace(want=(block, slot))
            asked = line.claims & bit
            if setup.mutant is Mutant.UNBOUND_CLAIM:
                asked = taken & bit & ~sink.committed
            if asked and setup.mutant is not Mutant.SILENT_DUPLICATE:
                yield f"sink: pull block {block} on line {slot} again", say(state, want, setup)
            elif not taken & bit:
                claimed = with_line(state, slot, line._replace(claims=line.claims | bit))
                yield (
                    f"sink: claim and pull block {block} on line {slot}",
                    say(claimed, want, setup),
                )


def _dones(state: State, setup: Setup) -> Iterator[Step]:
    sink, life = state.sink, state.life
    shown = sink if setup.mutant is Mutant.DONE_BEFORE_LEDGER else sink_shown(state)
    if shown.state == LIVE or shown.attempt != sink.attempt or life.noted:
        return
    if setup.mutant is Mutant.DONE_ONCE:
        if life.said:
            return
        state = state._replace(life=life._replace(said=True))
    yield (
        f"sink: done {shown.state}",
        say(state, Message("done", sink.attempt, state=shown.state), setup),
    )


def _receives(state: State, setup: Setup) -> Iterator[Step]:
    """What a receiver's thread does: a header, then the bytes; or all aside."""
    for slot, line in enumerate(state.lines):
        if line.writer:
            yield f"line {slot}: the last byte is written", _commit(state, slot, line.writer)
        elif line.chunks:
            yield _begin(state, slot, line, setup)


def _begin(state: State, slot: int, line: Line, setup: Setup) -> Step:
    chunk, sink = line.chunks[0], state.sink
    rest = line._replace(chunks=line.chunks[1:])
    claims = line.claims
    if setup.mutant is Mutant.UNBOUND_CLAIM:
        claims = _claimed(state)
    current = chunk.attempt == sink.attempt or setup.mutant is Mutant.OLD_CHUNK
    if current and claims >> chunk.block & 1:
        writer = Writer(chunk, sink.window[chunk.block - sink.base])
        label = f"line {slot}: block {chunk.block} begins to be written to {writer.place}"
        return label, with_line(state, slot, rest._replace(writer=writer))
    return f"line {slot}: unclaimed block {chunk.block} is read aside", with_line(state, slot, rest)


def _commit(state: State, slot: int, writer: Writer) -> State:
    chunk, sink, line = writer.chunk, state.sink, state.lines[slot]
    bit = 1 << chunk.block
    state = state._replace(sink_bytes=put(state.sink_bytes, writer.place, chunk.name))
    state = with_line(state, slot, line._replace(writer=None, claims=line.claims & ~bit))
    at = chunk.block - sink.base
    if sink.state == LIVE and sink.window[at : at + 1] == (writer.place,):
        return state._replace(sink=sink._replace(committed=sink.committed | bit))
    return state  # of an attempt that has ended: nobody counts it


def _consumes(state: State, setup: Setup) -> Iterator[Step]:
    """The consumer sees what the ledger holds; its resumes come late, twice, or not at all."""
    worker, shown, sink = state.consumer, sink_shown(state), state.sink
    if worker.hands:
        yield (
            "consumer: lets the old attempt's blocks go",
            state._replace(consumer=worker._replace(hands=NOTHING)),
        )
    if worker.state != HOLDS:
        return
    if shown.attempt == sink.attempt:
        if shown.state != FAILED and worker.taken < _sent_tokens(shown, setup):
            yield (
                f"consumer: takes token {worker.taken} over",
                state._replace(consumer=worker._replace(taken=worker.taken + 1)),
            )
        if shown.state == FAILED or (shown.state == SUCCESS and worker.taken == setup.tokens):
            yield "consumer: release", state._replace(consumer=worker._replace(state=RELEASED))
    for tokens in range(1, worker.taken + 1):  # any that it ever sent
        resumed = _resume(sink, tokens, setup)
        if resumed != sink:
            yield f"sink: resume({tokens})", state._replace(sink=resumed)
    if setup.sink_dies:
        yield "consumer: dies", state._replace(consumer=worker._replace(state=DEAD))


def _sent_tokens(sink: Sink, setup: Setup) -> int:
    return min(setup.tokens, prefix(sink.committed) * setup.block_tokens)


def _resume(sink: Sink, tokens: int, setup: Setup) -> Sink:
    """Section 3: a level. Only a higher one moves anything."""
    if tokens == sink.partial_sent_tokens and setup.mutant is Mutant.DOUBLE_RESUME:
        return sink._replace(extra=min(2, sink.extra + 1))
    if tokens > _sent_tokens(sink, setup) or tokens <= sink.partial_sent_tokens:
        return sink
    if setup.mutant is Mutant.RESUME_BY_BLOCK:
        if sink.window[:1] == (sink.last_block,):
            return sink
        sink = sink._replace(last_block=sink.window[0] if sink.window else -1)
    base = tokens // setup.block_tokens
    if setup.mutant is Mutant.UNFLOORED_RESUME:
        base = -(-tokens // setup.block_tokens)
    return sink._replace(
        partial_sent_tokens=tokens,
        base=base,
        window=sink.window[base - sink.base :],
    )


def _retry(state: State, setup: Setup) -> Step:
    """The router's next attempt: from the start, in other blocks.

    Its worker repeats the call until it is answered, which is after the ledger holds it.
    """
    sink, worker = state.sink, state.consumer
    held = tuple(sorted({*sink.quarantine, *sink.window}))
    new = Sink(sink.attempt + 1, quarantine=sink.quarantine)
    if setup.mutant is Mutant.INHERIT:
        new = sink._replace(attempt=sink.attempt + 1, state=LIVE)
    elif setup.mutant is not Mutant.NO_DRAIN:
        new = new._replace(quarantine=held)
    hands = worker.hands + sink.window if worker.state == HOLDS else worker.hands
    taken = worker.taken if setup.mutant is Mutant.INHERIT else 0
    if sink.state == LIVE:
        state = say(state, Message("done", sink.attempt, state=FAILED), setup)
    return f"router: attempt {new.attempt} opens at the sink", _without_claims(
        state._replace(
            sink=new,
            sink_ledger=new,
            life=SinkLife(),
            consumer=worker._replace(state=HOLDS, hands=tuple(sorted(hands)), taken=taken),
        )
    )


def _without_claims(state: State) -> State:
    """Claims that no thread has begun are taken back at once."""
    return state._replace(lines=tuple(line._replace(claims=0) for line in state.lines))


def sink_hears(state: State, message: Message, setup: Setup) -> State:
    """A message from the source's daemon."""
    sink, life = state.sink, state.life
    if message.attempt != sink.attempt:
        return state
    if message.kind == "noted":
        return state._replace(life=life._replace(noted=True)) if sink.state != LIVE else state
    if sink.state != LIVE:
        return state
    if message.kind == "unknown":
        lost = life.known and (message.late or setup.mutant is Mutant.OLD_UNKNOWN)
        return state._replace(sink=sink._replace(state=FAILED)) if lost else state
    if message.state == FAILED:
        return state._replace(sink=sink._replace(state=FAILED))
    heard = life._replace(
        known=True,
        available=max(life.available, message.available),
        total=life.total or message.total,
    )
    return state._replace(life=heard)


def settle_sink(state: State, setup: Setup) -> State:
    """What follows at once: the end, and the freeing of what nobody touches any more."""
    sink, worker = state.sink, state.consumer
    if sink.state == LIVE:
        if worker.state == DEAD:
            sink = sink._replace(state=FAILED)
        elif state.life.total and prefix(sink.committed) == setup.blocks:
            sink = sink._replace(state=SUCCESS)
    if sink.state != LIVE:
        state = _without_claims(state)
    touched = {*written_by(state.lines), *worker.hands}
    if sink.quarantine:
        left = tuple(place for place in sink.quarantine if place in touched)
        sink = sink._replace(quarantine=left)
    if sink.state != LIVE and worker.state != HOLDS and touched.isdisjoint(sink.window):
        sink = sink._replace(window=NOTHING)
    return state if sink is state.sink else state._replace(sink=sink)
