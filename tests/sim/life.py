"""One life of a daemon: the real node and, in the model, the shell that performs its effects."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvferry_daemon.core import outside as out
from kvferry_daemon.core import peer_effects as pr
from kvferry_daemon.core import told
from kvferry_daemon.core.events import Key, StreamKey
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.records import Row
from kvferry_daemon.core.settings import Settings
from kvferry_proto import worker
from sim import streams
from sim.boards import ModelBoard
from sim.copies import Copies
from sim.invariants import Watcher
from sim.memory import EMPTY, Broken, Memory, WatchedPool

if TYPE_CHECKING:
    from sim.machine import Machine
    from sim.sides import Side

POOL_S = 0.01
TURN_S = 0.02  # between transfers that are told of the same death: what comes then meets those that are not
EARLY_S = 1e-6  # clocks differ by an offset, and a float must not wake a daemon too early


class Life:
    """From one start of a daemon to its end."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine = machine
        self.world = machine.world
        self.number = number
        self.route = f"{machine.name}:{number}".encode()
        settings = machine.settings
        boot_id = f"{machine.name}{number:015x}"
        fields = {name: getattr(settings, name) for name in settings.__slots__}
        fields |= {
            "boot_id": boot_id,
            "daemon_id": f"d{machine.name}{machine.daemons:015x}"[-16:],
            "life": machine.lives_of_daemon,
            "traced": True,
        }
        self.node = Node(Settings(**fields), self.world.new_secret, 1, machine.local_s)
        self.node.owed_a_turn = 1
        self.dead = False
        self.pools = machine.memories
        self._writes_at_s = 0.0
        self._unwritten: deque[tuple[tuple[Row, ...], list[out.NodeEffect]]] = deque()
        self.tickets: dict[bytes, tuple[StreamKey, float]] = {}
        self.links: set[str] = set()
        self.connecting: dict[StreamKey, bool] = {}
        self.senders: dict[StreamKey, streams.Connection] = {}
        self.receivers: dict[StreamKey, streams.Connection] = {}
        self.watched: dict[str, str] = {}  # session -> lock
        self.boards: dict[str, ModelBoard] = {}  # by pool
        self.sides: dict[
            tuple[Key, int], Side
        ] = {}  # what workers do with the transfers of this life
        self.copies = Copies(self)
        self._owners: dict[tuple[str, int], Key] = {}
        self._events: deque[out.NodeEvent] = deque()
        self._feeding = False
        self._armed_s = float("inf")
        self.watcher = Watcher(self)
        self._moves = self._table()
        self.arm()

    def _table(self) -> dict[type, Callable[[Any], None]]:
        return {
            out.ToWorker: self._to_worker,
            out.ToSink: self._to_sink,
            pr.Say: self._to_source,
            out.OpenPeer: lambda e: self.links.add(e.address),
            out.ClosePeer: lambda e: self.links.discard(e.address),
            out.WatchWorker: self._watch_worker,
            out.ForgetWorker: self._forget_worker,
            pr.Probe: self._probe,
            out.Expect: self._expect,
            out.CancelExpected: self._cancel_expected,
            out.Transmit: self._transmit,
            out.Zero: self._zero,
            out.MakePool: self._make_pool,
            out.DropPool: self._drop_pool,
            pr.Connect: lambda e: streams.connect(self.world, self, e),
            pr.Disconnect: self._disconnect,
            out.Admit: self._admit,
            out.Expel: self._expel,
            out.ShowSlot: lambda e: self.boards[e.pool_id].show(e.snapshot),
            out.ClearSlot: lambda e: self.boards[e.pool_id].clear(e.index),
            **dict.fromkeys(told.EVERY, lambda _e: None),
        }

    # --- events in ---

    def deliver(self, event: out.NodeEvent) -> None:
        """Feed an event that comes from outside of the process: once it runs, if it lives."""
        if self.dead:
            return
        if self.machine.paused_until_s > self.world.clock.now_s:
            self.world.clock.at(self.machine.paused_until_s, self.deliver, event)
            return
        self.feed(event)

    def feed(self, event: out.NodeEvent) -> None:
        """As the shell does it: one event after the other, those that come up meanwhile last."""
        if self.dead:
            return
        self._events.append(event)
        self._feed_rest()

    def _feed_rest(self) -> None:
        if self._feeding:
            return
        self._feeding = True
        world, events = self.world, self._events
        try:
            while events:
                event = events.popleft()
                world.node_events += 1
                if world.story is not None:
                    world.say(self.machine.name, "<-", event)
                effects = self.node.handle(event, self.machine.local_s)
                if isinstance(event, out.Restored):
                    self._adopt_pools()
                for effect in effects:
                    if isinstance(effect, out.ToWorker):
                        self.watcher.check_shown(effect.reply)
                    elif isinstance(effect, out.ShowSlot):
                        self.watcher.check_shown(worker.Snapshots(transfers=[effect.snapshot]))
                    elif isinstance(effect, out.Expect):
                        self.watcher.check_claim(effect)
                self._perform_once_written(effects)
                self.watcher.check()
                if not self._unwritten:
                    for pool_id, board in self.boards.items():
                        board.check(self.node, pool_id)
        finally:
            self._feeding = False
        self.arm()

    def _adopt_pools(self) -> None:
        for pool_id, book in self.node.books.items():
            book.pool = WatchedPool.adopt(self, self.pools[pool_id], book.pool)
            self.boards[pool_id] = ModelBoard()
        self.watcher.take_up()

    def _perform_once_written(self, effects: list[out.NodeEffect]) -> None:
        """Nobody sees what the ledger does not hold: effects wait for the writes before them."""
        rows: tuple[Row, ...] = ()
        if effects and isinstance(effects[0], out.Write):
            rows = effects[0].rows
            effects = effects[1:]
        if not rows and not self._unwritten:
            self._perform(effects)
            return
        on_the_loop = self.world.plan.on_the_loop and not self._unwritten
        if on_the_loop and self.world.dice.random() < 0.5:
            self._write(rows)
            self._perform(effects)
            return
        self._unwritten.append((rows, effects))
        if rows:
            wait_s = self.world.plan.ledger_s * self.world.dice.random()
            self._writes_at_s = max(self._writes_at_s, self.world.clock.now_s + wait_s)
            self.world.clock.at(self._writes_at_s, self._written)

    def _written(self) -> None:
        """The thread of the ledger has written the oldest rows."""
        if self.dead:
            return
        if self.machine.paused_until_s > self.world.clock.now_s:
            self.world.clock.at(self.machine.paused_until_s, self._written)
            return
        if self.machine.dies_now():
            self.machine.keeps = True
            self.machine.crash()
            after_s = self.machine.away_s
            self.world.clock.after(after_s, self.world.start_daemon, self.machine.name, True)
            return
        while self._unwritten:
            rows, effects = self._unwritten.popleft()
            self._write(rows)
            self._perform(effects)
            if self._unwritten and self._unwritten[0][0]:
                break
        self._feed_rest()

    def _write(self, rows: tuple[Row, ...]) -> None:
        for name, body in rows:
            if body is None:
                self.machine.ledger.pop(name, None)
            else:
                self.machine.ledger[name] = body

    def _perform(self, effects: list[out.NodeEffect]) -> None:
        for effect in effects:
            if self.world.story is not None:
                self.world.say(self.machine.name, "  ->", effect)
            self._moves[type(effect)](effect)

    def arm(self, *, again: bool = False) -> None:
        """Be woken when the node wants it."""
        at_s = self.node.wake_at_s - self.machine.offset_s + EARLY_S
        if self.node.owed:
            at_s += TURN_S
        if at_s < self._armed_s or again:
            self._armed_s = at_s
            self.world.clock.at(at_s, self._wake, at_s)

    def _wake(self, armed_s: float) -> None:
        if self.dead or armed_s != self._armed_s:
            return
        self._armed_s = float("inf")
        if self.node.wake_at_s <= self.machine.local_s:
            self.deliver(out.TimePassed())
        else:
            self.arm()

    def end(self) -> None:
        """The process is gone, its sockets with it; what its ledger held by then stays."""
        self.dead = True
        for board in self.boards.values():  # until it is old, workers believe it
            self.world.clock.after(self.node.settings.timing.lost_s, board.give_up)
        for rows, _ in self._unwritten:
            if self.world.dice.random() < 0.5:
                break
            self._write(rows)
        for connection in list(self.senders.values()):
            connection.source_died()
        for connection in list(self.receivers.values()):
            connection.sink_is_gone()

    # --- messages out ---

    def _to_worker(self, effect: out.ToWorker) -> None:
        process = self.world.routes.get(effect.route)
        if process is not None:
            process.answered(self, effect.reply)

    def _to_sink(self, effect: out.ToSink) -> None:
        name, _, number = effect.route.decode().partition(":")
        said = out.SourceSaid(self.node.settings.peer_address, effect.message)
        machine = self.world.machines[name]
        self.world.network.post(self.machine.name, machine, int(number), said)

    def _to_source(self, effect: pr.Say) -> None:
        if effect.address in self.links:
            said = out.SinkSaid(self.route, effect.message)
            machine = self.world.machine_at(effect.address)
            self.world.network.post(self.machine.name, machine, None, said)

    def _probe(self, effect: pr.Probe) -> None:
        event = out.Probed(effect.address, "nothing is there")
        self.world.clock.after(0.1, self.deliver, event)

    def _watch_worker(self, effect: out.WatchWorker) -> None:
        self.watched[effect.session] = effect.lock
        if not self.world.locks[effect.lock].alive:
            self.lock_dropped(effect.session)

    def _forget_worker(self, effect: out.ForgetWorker) -> None:
        self.watched.pop(effect.session, None)

    def lock_dropped(self, session: str) -> None:
        """The kernel has dropped a flock; the daemon looks once a heartbeat."""
        wait_s = self.node.settings.timing.heartbeat_s * self.world.dice.random()
        self.world.clock.after(wait_s, self.deliver, out.LockDropped(session))

    # --- bytes ---

    def _disconnect(self, effect: pr.Disconnect) -> None:
        if effect.key in self.connecting:
            self.connecting[effect.key] = False
        elif effect.key in self.receivers:
            self.receivers[effect.key].close()

    def _admit(self, effect: out.Admit) -> None:
        slot = effect.key[:2]  # an earlier ticket of the same stream is good no more
        self.tickets = {one: it for one, it in self.tickets.items() if it[0][:2] != slot}
        self.tickets[effect.ticket] = (effect.key, self.machine.local_s + streams.TICKET_S)

    def _expel(self, effect: out.Expel) -> None:
        if effect.key in self.senders:
            self.senders[effect.key].close()

    def _expect(self, effect: out.Expect) -> None:
        if effect.key.is_here:
            self.copies.claim(effect)
            return
        receiver = self.receivers.get(effect.key)
        if receiver is None:
            self._events.append(out.ChunkMissed(effect.key, effect.handle, effect.first_token))
        else:
            receiver.claim(effect)

    def _cancel_expected(self, effect: out.CancelExpected) -> None:
        for receiver in list(self.receivers.values()):
            for handle, first_token in receiver.cancel(effect.handle):
                self._events.append(out.ChunkMissed(receiver.key, handle, first_token))
        self._events.extend(self.copies.cancel(effect.handle))

    def _transmit(self, effect: out.Transmit) -> None:
        if effect.key.is_here:
            self.watcher.check_served(effect)
            self.copies.put(effect)
        elif effect.key in self.senders:
            self.watcher.check_served(effect)
            self.senders[effect.key].put(effect)

    def _zero(self, effect: out.Zero) -> None:
        memory = self.pools[effect.pool_id]
        blocks = [b for run in effect.runs for b in range(run.first_block, sum(run))]
        for block in blocks:
            for slot in range(block * memory.size, (block + 1) * memory.size):
                if slot in memory.writer or memory.owner[block] == EMPTY:
                    raise Broken(f"I7: block {block} is wiped while {memory.writer.get(slot)}")
                memory.writer[slot] = effect
        wait_s = self.machine.zero_s * self.world.dice.random()
        self.world.clock.after(wait_s, self._zeroed, memory, blocks, effect.ticket)

    def _zeroed(self, memory: Memory, blocks: list[int], ticket: int) -> None:
        if self.dead:
            return
        for block in blocks:
            memory.wipe(block)
            for slot in range(block * memory.size, (block + 1) * memory.size):
                del memory.writer[slot]
        self.deliver(out.Zeroed(ticket))

    def _make_pool(self, effect: out.MakePool) -> None:
        machine = self.machine
        made: out.NodeEvent = out.PoolMade(effect.pool_id, f"/{machine.name}")
        if machine.pools_refused:
            machine.pools_refused -= 1
            made = out.PoolNotMade(effect.pool_id, "no memory is left")
        self.world.clock.after(POOL_S * self.world.dice.random(), self._pool_made, effect, made)

    def _drop_pool(self, effect: out.DropPool) -> None:
        del self.pools[effect.pool_id]
        self.boards.pop(effect.pool_id).give_up()

    def _pool_made(self, effect: out.MakePool, made: out.NodeEvent) -> None:
        if self.machine.paused_until_s > self.world.clock.now_s:
            self.world.clock.at(self.machine.paused_until_s, self._pool_made, effect, made)
            return
        if isinstance(made, out.PoolMade):
            self.boards[effect.pool_id] = ModelBoard()
        self.feed(made)
        book = self.node.books.get(effect.pool_id)
        if book is not None and effect.pool_id not in self.pools:
            memory = self.pools[effect.pool_id] = Memory(
                effect.pool_id, effect.blocks, effect.layout.block_size_tokens
            )
            pool = WatchedPool(self, memory, effect.blocks, book.source_blocks, book.sink_blocks)
            book.pool = pool

    # --- what invariants ask ---

    def key_of(self, memory: Memory, owner: int) -> Key:
        """The transfer behind an owner's number in a pool."""
        pool_id = memory.pool_id
        if (pool_id, owner) not in self._owners:
            owners = self.node.books[pool_id]._owners
            self._owners.update(((pool_id, number), key) for key, number in owners.items())
        return self._owners[pool_id, owner]

    def check_nobody_else_touches(self, memory: Memory, owner: int, block: int) -> None:
        """A block that is granted must be shown to no worker who still reads or writes it."""
        for process in self.world.processes_of(self.machine.name):
            for side in process.sides.values():
                same = side.memory is memory  # or it is of a pool that is no more
                if same and side.touches(block) and side.key != self.key_of(memory, owner):
                    raise Broken(f"I7: block {block} is granted, but {side.key} touches it")

    def check_no_worker_touches(
        self, memory: Memory, owner: int, block: int, *, freed: bool
    ) -> None:
        """A block that goes must be shown to no worker who still reads or writes it."""
        key = self.key_of(memory, owner)
        for rank in range(self.world.job(key).plan.ranks_of(key.role)):
            side = self.sides.get((key, rank))
            if side is not None and side.touches(block):
                verb = "freed" if freed else "handed on"
                raise Broken(f"I7: block {block} is {verb}, but {key} rank {rank} touches it")
