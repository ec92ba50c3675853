"""Data connections in the model: what the threads of both ends do, and when they have ended.

In order on one connection. A chunk's bytes are read at the last moment at which the sender may
read them, and written in two steps; a thread goes on until its StreamDown, whatever was closed.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.core.peer_effects import Connect
from kvferry_proto.peer import PARTS_MAX
from sim.memory import GARBAGE, Broken, Memory

if TYPE_CHECKING:
    from sim.life import Life
    from sim.world import World

CHUNK_S = 0.001
CLOSE_S = 0.02  # a thread notices the end of its connection within about so long
ACCEPT_S = 0.002
NEXT_S = 1e-7  # the next header is read only after the last byte of the chunk before it
TICKET_S = 10.0


class Claim(NamedTuple):
    """Where a receiver may write."""

    effect: out.Expect
    memory: Memory

    def __repr__(self) -> str:
        e = self.effect
        return f"claim of {e.tokens} tokens from {e.first_token}, handle {e.handle}, {e.key}"

    def begin(self) -> None:
        """I4: one writer an extent; a wide block may be filled by two, each its own tokens."""
        for slot in self._slots():
            if slot in self.memory.writer:
                raise Broken(f"I4: {self}, but {self.memory.writer[slot]} writes there")
            self.memory.writer[slot] = self

    def end(self) -> None:
        """Nobody writes there any more."""
        for slot in self._slots():
            self.memory.writer.pop(slot, None)

    def _slots(self) -> list[int]:
        e = self.effect
        found = self.memory.pieces(e.place, e.first_token, e.tokens)
        return [one.slot + n for one in found for n in range(one.tokens)]


class Chunk(NamedTuple):
    """An extent on its way."""

    handle: int
    first_token: int
    names: list[int]
    damaged: bool


def connect(world: World, sink: Life, effect: Connect) -> None:
    """A sink's daemon asks for a data connection."""
    sink.connecting[effect.key] = True
    wait_s = ACCEPT_S * (0.3 + world.dice.random())
    world.clock.after(wait_s, _arrive, world, sink, effect)


def _arrive(world: World, sink: Life, effect: Connect) -> None:
    machine = world.machine_at(effect.key.peer)
    source = machine.life
    if machine.paused_until_s > world.clock.now_s:
        world.clock.at(machine.paused_until_s, _arrive, world, sink, effect)
        return
    names = (sink.machine.name, machine.name)
    found = None
    if source is not None and names not in world.network.blocked:
        found = source.tickets.pop(effect.ticket, None)
    if source is None or found is None or found[1] < machine.local_s:
        world.clock.after(CLOSE_S, _accepted, sink, effect.key, None)
        return
    connection = Connection(world, effect.key, source, found[0])
    source.senders[found[0]] = connection
    source.feed(out.SourceStreamUp(found[0]))
    wait_s = ACCEPT_S * (0.3 + world.dice.random())
    world.clock.after(wait_s, _accepted, sink, effect.key, connection)


def _accepted(sink: Life, key: StreamKey, connection: Connection | None) -> None:
    wanted = sink.connecting.pop(key, False)
    if sink.dead:
        if connection is not None:
            connection.sink_is_gone()
        return
    if connection is not None and not connection.closed and wanted:
        connection.sink = sink
        sink.receivers[key] = connection
        sink.deliver(out.SinkStreamUp(key))
        return
    if connection is not None:
        connection.sink_is_gone()
    sink.deliver(out.SinkStreamDown(key, "not opened"))


class Connection:
    """One data connection, with the thread at either end."""

    __slots__ = (
        "_arrived", "_arrives_s", "_current", "_jobs", "_sending", "claims", "clock", "closed", "key", "sink",
        "sink_gone", "source", "source_gone", "source_key", "world",
    )  # fmt: skip

    def __init__(self, world: World, key: StreamKey, source: Life, source_key: StreamKey) -> None:
        self.world = world
        self.clock = world.clock
        self.key = key
        self.source = source
        self.source_key = source_key
        self.sink: Life | None = None  # None: it has not heard of the accept yet
        self.claims: dict[tuple[int, int], Claim] = {}
        self.closed = self.source_gone = self.sink_gone = False
        self._jobs: deque[out.Transmit] = deque()
        self._sending = False
        self._current: tuple[Claim, Chunk] | None = None
        self._arrives_s = 0.0
        self._arrived: deque[tuple[Chunk, float]] = deque()  # in the receiver's socket buffer
        world.connections.append(self)

    # --- the sender's thread ---

    def put(self, job: out.Transmit) -> None:
        """Queue an extent; its blocks are read until ChunkSent or the end of the thread."""
        memory = self.source.pools[job.pool_id]
        for piece in memory.pieces(job.place, job.first_token, job.tokens):
            memory.readers[piece.block] += 1
        self._jobs.append(job)
        if not self._sending:
            self._sending = True
            self.clock.after(CHUNK_S * (0.3 + self.world.dice.random()), self._send)

    def _send(self) -> None:
        if self.source_gone or self.closed:
            return  # what is queued counts as read until the thread has ended
        until_s = max(self.world.network.frozen_until_s, self.source.machine.paused_until_s)
        if until_s > self.clock.now_s:
            self.clock.at(until_s, self._send)
            return
        job = self._jobs.popleft()
        self._put_on_wire(job)
        self._let_go(job)
        sent = out.ChunkSent(self.source_key, job.owner, job.part, job.first_token, job.tokens)
        self.source.feed(sent)
        if self._jobs:
            self.clock.after(CHUNK_S * (0.3 + self.world.dice.random()), self._send)
        else:
            self._sending = False

    def _put_on_wire(self, job: out.Transmit) -> None:
        names = self.source.pools[job.pool_id].read(job.place, job.first_token, job.tokens)
        network, roll = self.world.network, self.world.dice.random
        damaged = network.corrupt_chunks > 0
        network.corrupt_chunks -= damaged
        at_s = max(self._arrives_s, self.clock.now_s + CHUNK_S * roll())
        takes_s = CHUNK_S * roll()
        self._arrives_s = at_s + takes_s + NEXT_S
        chunk = Chunk(job.handle, job.first_token, names, damaged)
        self.clock.at(at_s, self._arrive, chunk, takes_s)

    def _let_go(self, job: out.Transmit) -> None:
        memory = self.source.pools[job.pool_id]
        for piece in memory.pieces(job.place, job.first_token, job.tokens):
            memory.readers[piece.block] -= 1

    def _source_down(self) -> None:
        if self.source_gone:
            return
        if self.source.machine.paused_until_s > self.clock.now_s:
            self.clock.at(self.source.machine.paused_until_s, self._source_down)
            return
        self.source_gone = True
        for job in self._jobs:
            self._let_go(job)
        self._jobs.clear()
        self.source.senders.pop(self.source_key, None)
        self.source.feed(out.SourceStreamDown(self.source_key, "cut"))

    # --- the receiver's thread ---

    def claim(self, effect: out.Expect) -> None:
        """Expect an extent."""
        assert self.sink is not None
        memory = self.sink.pools[effect.pool_id]
        claim = Claim(effect, memory)
        claim.begin()
        self.claims[effect.handle, effect.first_token] = claim

    def cancel(self, handle: int) -> list[tuple[int, int]]:
        """Take back what the thread has not begun, of every part."""
        keys = [key for key in self.claims if handle <= key[0] < handle + PARTS_MAX]
        for key in keys:
            self.claims.pop(key).end()
        return keys

    def _waits(self) -> float:
        """Until when the receiver stands still."""
        paused_s = 0.0 if self.sink is None else self.sink.machine.paused_until_s
        return max(self.world.network.frozen_until_s, paused_s)

    def _arrive(self, chunk: Chunk, takes_s: float) -> None:
        """A chunk lies in the socket's buffer."""
        self._arrived.append((chunk, takes_s))
        self._next()

    def _next(self) -> None:
        """Read the next chunk, if none is being read."""
        while self._arrived and self._current is None:
            if self.sink_gone or self.sink is None:
                return
            if self._waits() > self.clock.now_s:
                self.clock.at(self._waits(), self._next)
                return
            self._begin(*self._arrived.popleft())

    def _begin(self, chunk: Chunk, takes_s: float) -> None:
        """A header has come: take the claim, or read the bytes aside."""
        assert self.sink is not None
        place = (chunk.handle, chunk.first_token)
        claim = self.claims.get(place)
        if claim is None or claim.effect.tokens != len(chunk.names):
            self.sink.feed(out.ChunkDrained(len(chunk.names)))
            return
        del self.claims[place]
        self._current = (claim, chunk)
        self._write(len(chunk.names) // 2)
        self.clock.after(takes_s, self._finish)

    def _write(self, tokens: int) -> None:
        """The first so many tokens of the chunk in progress."""
        assert self._current is not None
        claim, chunk = self._current
        names = [name | GARBAGE for name in chunk.names] if chunk.damaged else chunk.names
        claim.memory.write(claim.effect.place, chunk.first_token, names[:tokens])

    def _finish(self) -> None:
        """The rest of a chunk has come."""
        if self.sink_gone or self.sink is None or self._current is None:
            return
        if self._waits() > self.clock.now_s:
            self.clock.at(self._waits(), self._finish)
            return
        if self.closed and self.world.dice.random() < 0.5:
            return  # its last bytes never come; the thread ends with the connection
        claim, chunk = self._current
        self._write(len(chunk.names))
        self._current = None
        claim.end()
        if chunk.damaged:
            self.sink.feed(out.ChunkMissed(self.key, chunk.handle, chunk.first_token))
            self.close()
        else:
            self.sink.watcher.received.add((chunk.handle, chunk.first_token))
            event = out.ChunkReceived(self.key, chunk.handle, chunk.first_token, len(chunk.names))
            self.sink.feed(event)
            self._next()

    def _sink_down(self) -> None:
        if self.sink_gone or self.sink is None:
            return  # the accept is still on its way: see _accepted
        if self.sink.machine.paused_until_s > self.clock.now_s:
            self.clock.at(self.sink.machine.paused_until_s, self._sink_down)
            return
        if self._current is not None:  # a thread writes until it has ended
            claim, chunk = self._current
            self._write(self.world.dice.randint(0, len(chunk.names)))
            claim.end()
        self.sink_is_gone()
        self.sink.receivers.pop(self.key, None)
        self.sink.feed(out.SinkStreamDown(self.key, "cut"))

    # --- the end ---

    def close(self) -> None:
        """Cut it; each end's thread notices in its own time."""
        if self.closed:
            return
        self.closed = True
        self.world.connections.remove(self)
        roll = self.world.dice.random
        self.clock.after(CLOSE_S * roll(), self._source_down)
        late_s = max(0.0, self._arrives_s - self.clock.now_s) if roll() < 0.3 else 0.0
        self.clock.after(late_s + CLOSE_S * roll(), self._sink_down)

    def sink_is_gone(self) -> None:
        """No thread at the sink any more."""
        self.sink_gone = True
        for claim in self.claims.values():
            claim.end()
        self.claims.clear()
        self._current = None
        self.close()

    def source_died(self) -> None:
        """The source's process is gone."""
        self.source_gone = True
        self.close()
