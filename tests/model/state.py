"""What the model knows: one transfer, two daemons, two workers, the links between them.

A state is a tuple of small tuples, so that equal states are one state. What a daemon's crash takes
away (``SinkLife``, and what the lines hold) is kept apart from what its ledger brings back.
"""

from enum import StrEnum
from typing import NamedTuple

LIVE, SUCCESS, FAILED = "live", "success", "failed"
HOLDS, RELEASED, DEAD = "holds", "released", "dead"  # a worker, and the blocks it was shown

Name = tuple[int, int]  # (attempt, block of the payload): what is in a block
GARBAGE: Name = (-1, -1)
NOTHING: tuple[int, ...] = ()


class Mutant(StrEnum):
    """One deliberate mistake each; ``test_protocol.py`` shows that every one is found."""

    FREE_ON_SEND = "the source frees a block when it has sent it, not when it is acked"
    ACK_BEFORE_LEDGER = "acked is sent before the sink's ledger holds it"
    ACK_HIGHEST = "acked is the highest block received, not the gapless prefix"
    SILENT_DUPLICATE = "the duplicate check silences the re-send of a pull"
    DOUBLE_RESUME = "a doubled resume moves the target edge twice"
    UNBOUND_CLAIM = "a claim is not bound to a stream connection"
    OLD_CHUNK = "a chunk of the old attempt is accepted"
    RESUME_BY_BLOCK = "a resume is told apart by block index, not by sent_tokens"
    QUARANTINE_TIMER = "quarantine ends by a timer, not by proof"
    NO_DRAIN = "a superseded attempt's blocks are free at once"
    INHERIT = "a retry inherits the progress of the attempt before"
    DONE_ONCE = "done is sent once"
    DONE_BEFORE_LEDGER = "done is sent before the sink's ledger holds the end"
    NOTED_BEFORE_LEDGER = "done is answered before the source's ledger holds it"
    OLD_UNKNOWN = "an unknown that answers an old pull is taken as source_lost"
    QUARANTINE_FORGOTTEN = "a restart forgets the quarantine"
    UNFLOORED_RESUME = "a resume inside a block frees that block"


class Setup(NamedTuple):
    """How large the world is, and what may go wrong in it. Loss and doubling always may."""

    name: str
    tokens: int = 3
    block_tokens: int = 1
    window: int = 1  # of the sink, in blocks
    sink_pool: int = 1
    source_pool: int = 1
    late_total: bool = True
    bag: int = 2  # messages under way at once; one more is lost
    lines: int = 1  # stream connections at once
    cuts: bool = True  # any number of them
    attempts: int = 1
    sink_crashes: int = 0
    source_crashes: int = 0
    sink_dies: bool = False
    source_dies: bool = False
    mutant: Mutant | None = None

    @property
    def blocks(self) -> int:
        """Blocks of the payload; the last may be part full."""
        return -(-self.tokens // self.block_tokens)


class Sink(NamedTuple):
    """The part of a sink that its ledger keeps. ``base`` and ``window`` count blocks."""

    attempt: int = 0
    state: str = LIVE
    base: int = 0
    window: tuple[int, ...] = ()
    committed: int = 0  # a bit for each block of the payload
    partial_sent_tokens: int = 0  # = last_resume_at, once there was a resume
    quarantine: tuple[int, ...] = ()
    extra: int = 0  # of a mutant: blocks that the target edge moved too far
    last_block: int = -1  # of a mutant: where the last resume found the window


class SinkLife(NamedTuple):
    """The part of a sink that a crash takes away; claims stand with their line."""

    known: bool = False  # this attempt had a real answer
    available: int = 0
    total: bool = False
    noted: bool = False
    said: bool = False  # of a mutant: done went out


class Source(NamedTuple):
    """A source; its ledger keeps all of it."""

    attempt: int = -1  # not opened
    state: str = LIVE
    base: int = 0
    window: tuple[int, ...] = ()
    ready: int = 0
    total: bool = False  # the worker has said where the payload ends
    acked: int = 0
    quarantine: tuple[int, ...] = ()
    stone: int = -1  # an attempt that the sink ended before it was opened here


class Worker(NamedTuple):
    """A worker. ``hands``: blocks of an earlier attempt that it may still touch."""

    state: str = HOLDS
    hands: tuple[int, ...] = ()
    taken: int = 0  # tokens that a consumer has taken over


class Job(NamedTuple):
    """An extent that a sender's thread will read."""

    attempt: int
    block: int  # of the payload
    place: int  # block of the pool


class Chunk(NamedTuple):
    """An extent on the wire: what its header says, and what it brings."""

    attempt: int
    block: int
    name: Name


class Writer(NamedTuple):
    """A receiver's thread between header and last byte."""

    chunk: Chunk
    place: int


class Line(NamedTuple):
    """One stream connection; when both ends are closed its slot may be opened anew."""

    sink_open: bool = False
    source_open: bool = False
    claims: int = 0  # a bit for each block claimed on this very connection
    served: int = 0  # a bit for each block served on it, of the source's attempt
    jobs: tuple[Job, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    writer: Writer | None = None


class Message(NamedTuple):
    """One message between the daemons; ``kind`` says which fields count."""

    kind: str  # pull, news, unknown, done, noted
    attempt: int
    late: bool = False  # pull, unknown: the pull's number is above the first real answer's
    acked: int = 0
    want: tuple[int, ...] = NOTHING  # (block, line)
    available: int = 0
    total: bool = False
    state: str = LIVE


class State(NamedTuple):
    """Everything."""

    sink: Sink
    sink_ledger: Sink
    life: SinkLife
    consumer: Worker
    sink_bytes: tuple[Name, ...]
    source: Source
    source_ledger: Source
    producer: Worker
    source_bytes: tuple[Name, ...]
    lines: tuple[Line, ...]
    bag: frozenset[Message]
    sink_crashes: int  # that may still come
    source_crashes: int


Step = tuple[str, State]


def first_state(setup: Setup) -> State:
    """The sink is open, the source is not."""
    sink, source = Sink(), Source()
    return State(
        sink=sink,
        sink_ledger=sink,
        life=SinkLife(),
        consumer=Worker(),
        sink_bytes=(GARBAGE,) * setup.sink_pool,
        source=source,
        source_ledger=source,
        producer=Worker(),
        source_bytes=(GARBAGE,) * setup.source_pool,
        lines=(Line(),) * setup.lines,
        bag=frozenset(),
        sink_crashes=setup.sink_crashes,
        source_crashes=setup.source_crashes,
    )


def prefix(committed: int) -> int:
    """Blocks committed without a gap: what ``sent_tokens`` counts."""
    count = 0
    while committed >> count & 1:
        count += 1
    return count


def put(names: tuple[Name, ...], place: int, name: Name) -> tuple[Name, ...]:
    """Write a block."""
    return (*names[:place], name, *names[place + 1 :])


def with_line(state: State, slot: int, line: Line) -> State:
    """Change one line."""
    lines = state.lines
    return state._replace(lines=(*lines[:slot], line, *lines[slot + 1 :]))


def say(state: State, message: Message, setup: Setup) -> State:
    """Put a message on its way; it is lost if too many are."""
    if message in state.bag or len(state.bag) >= setup.bag:
        return state
    return state._replace(bag=state.bag | {message})


def sink_shown(state: State) -> Sink:
    """What may be seen of a sink from outside: what its ledger holds.

    Without a crash to come the ledger is never read, so writing it is no step of its own.
    """
    return state.sink_ledger if state.sink_crashes else state.sink


def source_shown(state: State) -> Source:
    """What may be seen of a source from outside."""
    return state.source_ledger if state.source_crashes else state.source


def written_by(lines: tuple[Line, ...]) -> tuple[int, ...]:
    """Blocks of the sink's pool that a thread is writing."""
    return tuple(line.writer.place for line in lines if line.writer)


def read_by(lines: tuple[Line, ...]) -> tuple[int, ...]:
    """Blocks of the source's pool that a thread will still read."""
    return tuple(job.place for line in lines for job in line.jobs)
