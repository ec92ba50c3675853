"""Two daemons without I/O, and everything around them: network, streams, memory, workers.

Memory is a model: a block's token slot holds the name of the token that was written there, so a
consumer's view can be checked exactly. What is under way lies in ``World.wire`` until somebody
delivers, drops or doubles it; time passes only by ``World.wait``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allocator import Run
from kvferry_daemon.core.events import Key, StreamKey, Timing
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.peer_effects import Connect, Disconnect, Probe, Say
from kvferry_daemon.core.settings import Settings
from kvferry_proto import worker
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.peer import PARTS_MAX
from kvferry_proto.states import Role

BLOCK = 4
Token = tuple[str, int, int]  # transfer_id, attempt, index


def layout(aux: tuple[str, ...] = (), block: int = BLOCK) -> Layout:
    """One small plane: the model of memory has a name a token anyhow."""
    plane = Plane(name="kv", dtype=Dtype.UINT8, shape=(64,))
    return Layout(planes=(plane,), aux=aux, block_size_tokens=block)


@dataclass
class Chunk:
    """An extent on its way over one stream connection."""

    to: str
    key: StreamKey  # by the sink's name for it
    handle: int
    first_token: int
    tokens: int
    source_key: StreamKey
    owner: Key
    pool_id: str
    runs: tuple[Run, ...]
    base_tokens: int


@dataclass
class Letter:
    """A message on its way between two daemons."""

    to: str
    event: out.NodeEvent


@dataclass
class Machine:
    """One daemon with its memory and its claims."""

    node: Node
    memory: dict[tuple[str, int], list[Token | None]] = field(default_factory=dict)
    claims: dict[tuple[StreamKey, int, int], out.Expect] = field(default_factory=dict)
    tickets: dict[bytes, StreamKey] = field(default_factory=dict)
    inbox: dict[bytes, list[Any]] = field(default_factory=dict)
    zeroed_blocks: int = 0


class World:
    """Daemons ``a`` (source) and ``b`` (sink), and what lies between them."""

    def __init__(
        self, *, blocks: int = 16, window_tokens: int = 8, share: float = 0.5, workers_max: int = 10
    ) -> None:
        self.now_s = 0.0
        self.wire: list[Chunk | Letter] = []
        self.secrets = 0
        self.sockets: dict[StreamKey, StreamKey] = {}  # sink's key -> source's key
        self.machines: dict[str, Machine] = {}
        for name in ("a", "b"):
            settings = Settings(
                boot_id=(name * 16),
                daemon_id=(name * 16),
                life=1,
                pools_dir="/pools",
                peer_address=f"tcp://{name}:1",
                timing=Timing(),
                window_tokens=window_tokens,
                budget_bytes=1 << 30,
                pool_tokens=blocks * BLOCK,
                source_share=share,
                streams=1,
                chunk_bytes=1,
                transfers_max=100,
                workers_max=workers_max,
            )
            self.machines[name] = Machine(Node(settings, self._secret, 1, 0.0))

    def _secret(self) -> bytes:
        self.secrets += 1
        return self.secrets.to_bytes(32, "big")

    # --- workers ---

    def hello(
        self,
        name: str,
        route: bytes,
        kind: Layout | None = None,
        user: str = "",
        called: str = "",
    ) -> worker.Welcome:
        """A worker joins; ``called`` is what it calls itself."""
        call = worker.Hello(lock=f"lock{route.hex()}", layout=kind or layout(), worker=called)
        self.feed(name, out.WorkerCalled(route, call, lock_held=True, user=user))
        reply = self.machines[name].inbox[route].pop()
        assert isinstance(reply, worker.Welcome), reply
        return reply

    def call(self, name: str, route: bytes, call: out.WorkerCall, user: str = "") -> Any:
        """A worker's call and its answer (None: the answer waits)."""
        self.feed(name, out.WorkerCalled(route, call, user=user))
        inbox = self.machines[name].inbox.setdefault(route, [])
        return inbox.pop() if inbox else None

    def snapshot(
        self, name: str, route: bytes, role: Role, transfer_id: str = "t", attempt: int = 0
    ) -> worker.Snapshot:
        """What a poll answers now."""
        watched = worker.Watched(role=role, transfer_id=transfer_id, attempt=attempt)
        reply = self.call(name, route, worker.Poll(transfers=[watched]))
        assert isinstance(reply, worker.Snapshots), reply
        assert reply.transfers, reply
        return reply.transfers[0]

    def fill(self, name: str, snapshot: worker.Snapshot, end: int) -> None:
        """The source worker writes its tokens up to ``end`` into its window."""
        for token, slot in self.slots(name, snapshot):
            if snapshot.available_tokens <= token < end:
                block, index = slot
                self.block(name, block)[index] = (snapshot.transfer_id, snapshot.attempt, token)

    def read(self, name: str, snapshot: worker.Snapshot) -> list[Token | None]:
        """What the sink worker sees of its window: only tokens that were committed."""
        return [
            self.block(name, block)[index]
            for token, (block, index) in self.slots(name, snapshot)
            if snapshot.partial_sent_tokens <= token < snapshot.sent_tokens
        ]

    def slots(
        self, name: str, snapshot: worker.Snapshot
    ) -> Iterator[tuple[int, tuple[tuple[str, int], int]]]:
        """Every token of the window, and its (pool, block) and index there."""
        node = self.machines[name].node
        key = Key(snapshot.role, snapshot.transfer_id, snapshot.attempt)
        if key not in node.transfers:
            return  # over, and it holds nothing
        pool_id = node.transfers[key].opening.pool_id
        token = snapshot.base_tokens
        for first, blocks in snapshot.runs:
            for block in range(first, first + blocks):
                for index in range(self.block_size(name, pool_id)):
                    yield token, ((pool_id, block), index)
                    token += 1

    def block(self, name: str, block: tuple[str, int]) -> list[Token | None]:
        """The token slots of one block."""
        return self.machines[name].memory.setdefault(
            block, [None] * self.block_size(name, block[0])
        )

    def block_size(self, name: str, pool_id: str) -> int:
        """Tokens of a pool's blocks."""
        return self.machines[name].node.books[pool_id].layout.block_size_tokens

    # --- effects ---

    def feed(self, name: str, event: out.NodeEvent) -> None:
        """Let a daemon handle an event and do what it wants done."""
        todo = [event]
        machine = self.machines[name]
        while todo:
            for effect in machine.node.handle(todo.pop(0), self.now_s):
                todo += self._perform(name, machine, effect)
            machine.node.check()

    def _perform(self, name: str, me: Machine, effect: out.NodeEffect) -> list[out.NodeEvent]:
        match effect:
            case out.ToWorker():
                me.inbox.setdefault(effect.route, []).append(effect.reply)
            case out.ToSink():
                other = effect.route.decode()
                said = out.SourceSaid(me.node.settings.peer_address, effect.message)
                self.wire.append(Letter(other, said))
            case Say():
                to = effect.address.removeprefix("tcp://").partition(":")[0]
                if to in self.machines:
                    self.wire.append(Letter(to, out.SinkSaid(name.encode(), effect.message)))
            case out.MakePool():
                return [out.PoolMade(effect.pool_id, f"/{name}")]
            case out.Zero():
                for run in effect.runs:
                    for block in range(run.first_block, run.first_block + run.blocks):
                        size = self.block_size(name, effect.pool_id)
                        me.memory[effect.pool_id, block] = [None] * size
                        me.zeroed_blocks += 1
                return [out.Zeroed(effect.ticket)]
            case out.Admit():
                me.tickets[effect.ticket] = effect.key
            case Connect():
                return [self._connect(effect)]
            case Disconnect():
                return self.cut(effect.key, feed=False)
            case out.Expel():
                keys = [sink for sink, source in self.sockets.items() if source == effect.key]
                for key in keys:
                    self.cut(key)
            case out.Expect():
                me.claims[effect.key, effect.handle, effect.first_token] = effect
            case out.CancelExpected():
                gone = [c for c in me.claims if c[1] // PARTS_MAX == effect.handle // PARTS_MAX]
                for claim in gone:
                    del me.claims[claim]
                return [out.ChunkMissed(*claim) for claim in gone]
            case out.Transmit():
                self._transmit(name, effect)
            case (
                out.Write()
                | out.OpenPeer()
                | out.ClosePeer()
                | out.WatchWorker()
                | out.ForgetWorker()
                | out.ShowSlot()
                | out.ClearSlot()
            ):
                pass
            case Probe():
                return [out.Probed(effect.address, "nothing is there")]
        return []

    def _connect(self, effect: Connect) -> out.NodeEvent:
        other = effect.key.peer.removeprefix("tcp://").partition(":")[0]
        source_key = self.machines[other].tickets.pop(effect.ticket)
        self.sockets[effect.key] = source_key
        self.feed(other, out.SourceStreamUp(source_key))
        return out.SinkStreamUp(effect.key)

    def _transmit(self, name: str, effect: out.Transmit) -> None:
        here = [(effect.key, effect.key)] if effect.key.is_here else []
        for sink_key, source_key in [*here, *self.sockets.items()]:
            if source_key == effect.key:
                to = name if here else "b" if name == "a" else "a"
                self.wire.append(
                    Chunk(
                        to, sink_key, effect.handle, effect.first_token,
                        effect.tokens, source_key, effect.owner, effect.pool_id,
                        effect.place.runs, effect.place.base_tokens,
                    )
                )  # fmt: skip

    # --- what the network does ---

    def deliver(self, index: int = 0, *, keep: bool = False) -> None:
        """Bring one thing to its end; ``keep`` leaves a double of a letter behind."""
        thing = self.wire[index]
        if not (keep and isinstance(thing, Letter)):
            self.wire.pop(index)
        if isinstance(thing, Letter):
            self.feed(thing.to, thing.event)
        else:
            self._deliver_chunk(thing)

    def _deliver_chunk(self, chunk: Chunk) -> None:
        source = chunk.to if chunk.key.is_here else "a" if chunk.to == "b" else "b"
        data = self._read_extent(source, chunk)
        sent = out.ChunkSent(
            chunk.source_key,
            chunk.owner,
            chunk.handle % PARTS_MAX,
            chunk.first_token,
            chunk.tokens,
        )
        self.feed(source, sent)
        me = self.machines[chunk.to]
        claim = me.claims.pop((chunk.key, chunk.handle, chunk.first_token), None)
        if claim is None or claim.tokens != chunk.tokens:
            if chunk.key.is_here:
                return  # nobody reads it aside
            self.feed(chunk.to, out.ChunkDrained(chunk.tokens))
            return
        blocks = [b for run in claim.place.runs for b in range(sum(run[:1]), sum(run))]
        size = self.block_size(chunk.to, claim.pool_id)
        for token, name in enumerate(data, chunk.first_token):
            block, index = divmod(token - claim.place.base_tokens, size)
            self.block(chunk.to, (claim.pool_id, blocks[block]))[index] = name
        self.feed(
            chunk.to, out.ChunkReceived(chunk.key, chunk.handle, chunk.first_token, chunk.tokens)
        )

    def _read_extent(self, source: str, chunk: Chunk) -> list[Token | None]:
        blocks = [b for run in chunk.runs for b in range(run.first_block, sum(run))]
        data = []
        size = self.block_size(source, chunk.pool_id)
        for token in range(chunk.first_token, chunk.first_token + chunk.tokens):
            block, index = divmod(token - chunk.base_tokens, size)
            data.append(self.block(source, (chunk.pool_id, blocks[block]))[index])
        return data

    def cut(self, key: StreamKey, *, feed: bool = True) -> list[out.NodeEvent]:
        """End a stream connection: what was on it is lost, both ends are told."""
        source_key = self.sockets.pop(key, None)
        if source_key is None:
            return []
        self.wire = [w for w in self.wire if not (isinstance(w, Chunk) and w.key == key)]
        source = key.peer.removeprefix("tcp://").partition(":")[0]
        sink = "b" if source == "a" else "a"
        me = self.machines[sink]
        for claim in [c for c in me.claims if c[0] == key]:
            del me.claims[claim]
        self.feed(source, out.SourceStreamDown(source_key, "cut"))
        down = out.SinkStreamDown(key, "cut")
        if not feed:
            return [down]
        self.feed(sink, down)
        return []

    def settle(self, limit: int = 100_000) -> None:
        """Deliver everything, in order, until nothing is under way."""
        for _ in range(limit):
            if not self.wire:
                return
            self.deliver()
        raise AssertionError("the daemons never fall silent")

    def wait(self, seconds: float) -> None:
        """Let time pass, waking each daemon whenever it wants to be, delivering everything."""
        until = self.now_s + seconds
        while True:
            self.settle()
            due = min(m.node.wake_at_s for m in self.machines.values())
            if due > until:
                break
            self.now_s = max(self.now_s, due)
            for name in self.machines:
                self.feed(name, out.TimePassed())
        self.now_s = until
        for name in self.machines:
            self.feed(name, out.TimePassed())
        self.settle()

    def beat(self) -> None:
        """Every worker beats."""
        for name, machine in self.machines.items():
            for session in list(machine.node.sessions.values()):
                for route in list(session.routes):
                    self.call(name, route, worker.Heartbeat())

    def blocks_free(self, name: str) -> bool:
        """Whether every block of a daemon is free (I8)."""
        books = self.machines[name].node.books.values()
        return all(book.pool.free_blocks == book.pool.blocks for book in books)
