"""The one place where effects are performed, and where their outcome becomes an event."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from kvferry_daemon.copies import Copies
from kvferry_daemon.core import outside as out
from kvferry_daemon.core import peers as pr
from kvferry_daemon.core.boards import SLOTS, board_path
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.records import HOST, PoolRecord
from kvferry_daemon.ledger import Ledger
from kvferry_daemon.memory.board import Board
from kvferry_daemon.memory.device import Device, DeviceError, NoRoom, NotShared
from kvferry_daemon.memory.device_pool import DevicePool
from kvferry_daemon.memory.host import HostPool, MemoryRefused
from kvferry_daemon.memory.placement import ANYWHERE, Placement
from kvferry_daemon.memory.places import Pool, SlicePlans, whole
from kvferry_daemon.probe import probe
from kvferry_daemon.streams import Streams
from kvferry_daemon.transports.nixl.agent import Memory
from kvferry_daemon.transports.tcp.staging import Blocks, NewBuffer, Place, plain_buffer
from kvferry_proto.errors import Code
from kvferry_proto.offer import HOST as HOST_MEMORY

ROOM_AGAIN_S = 0.2
log = logging.getLogger(__name__)


class Links(Protocol):
    """Where messages go out."""

    def to_worker(self, route: bytes, reply: out.WorkerReply) -> None: ...
    def to_sink(self, effect: out.ToSink) -> None: ...
    def to_source(self, effect: pr.Say) -> None: ...
    def open_peer(self, address: str) -> None: ...
    def close_peer(self, address: str) -> None: ...
    def watch_worker(self, session: str, lock: str) -> None: ...
    def forget_worker(self, session: str) -> None: ...


class Effects:
    """Feeds events to the node, one after the other, and performs what it answers."""

    def __init__(
        self,
        node: Node,
        links: Links,
        pools_dir: Path,
        placement: Placement = ANYWHERE,
        device: Device | None = None,
        new_buffer: NewBuffer = plain_buffer,
    ) -> None:
        """``device``: where new pools lie; None: in host memory."""
        self._node = node
        self._device = device
        self._links = links
        self._pools_dir = pools_dir
        self._placement = placement
        self._loop = asyncio.get_running_loop()
        self._streams: Streams | None = None
        self._pools: dict[str, Pool] = {}
        self._boards: dict[str, Board] = {}  # by pool
        self._ledger: Ledger | None = None
        self._unwritten: deque[tuple[int, list[out.NodeEffect]]] = deque()
        self._events: deque[out.NodeEvent] = deque()
        self._feeding = False
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = float("inf")
        self._tasks: set[asyncio.Future[Any]] = set()
        self._drops: list[Future[None]] = []
        self._slice_plans = SlicePlans()
        self._memory = ThreadPoolExecutor(2, "kvferry-memory", placement.enter)
        self._copies = Copies(self.feed, placement.enter, new_buffer)
        self._moves: dict[type, Callable[[Any], None]] = {
            out.ToWorker: lambda e: links.to_worker(e.route, e.reply),
            out.ToSink: links.to_sink,
            pr.Say: links.to_source,
            out.OpenPeer: lambda e: links.open_peer(e.address),
            out.ClosePeer: lambda e: links.close_peer(e.address),
            out.WatchWorker: lambda e: links.watch_worker(e.session, e.lock),
            out.ForgetWorker: lambda e: links.forget_worker(e.session),
            pr.Probe: self._probe,
            out.Expect: self._expect,
            out.CancelExpected: self._cancel_expected,
            out.Transmit: self._transmit,
            out.Zero: self._zero,
            out.MakePool: self._make_pool,
            out.DropPool: self._drop_pool,
            out.ShowSlot: self._show_slot,
            out.ClearSlot: self._clear_slot,
        }

    def use_streams(self, streams: Streams) -> None:
        """Streams post events here and are told effects from here."""
        self._streams = streams
        self._moves[pr.Connect] = streams.connect
        self._moves[pr.Disconnect] = lambda e: streams.disconnect(e.key)
        self._moves[out.Admit] = streams.admit
        self._moves[out.Expel] = lambda e: streams.expel(e.key)

    def use_ledger(self, ledger: Ledger) -> None:
        """From now on nothing is said or done that it does not hold."""
        self._ledger = ledger

    def feed(self, event: out.NodeEvent) -> None:
        """Let the node handle an event; events that come up meanwhile wait their turn."""
        if not self._closed:  # threads still tell of their ends then
            self._events.append(event)
            self._feed_waiting()

    def _feed_waiting(self) -> None:
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                effects = self._node.handle(self._events.popleft(), self._loop.time())
                self._perform_once_written(effects)
        finally:
            self._feeding = False
            self._arm()

    def _perform_once_written(self, effects: list[out.NodeEffect]) -> None:
        """Nobody sees what the ledger does not hold: effects wait for the writes before them."""
        if effects and isinstance(effects[0], out.Write):
            assert self._ledger is not None
            self._unwritten.append((self._ledger.write(effects[0].rows), effects[1:]))
        elif self._unwritten and effects:
            self._unwritten.append((self._unwritten[-1][0], effects))
        else:
            for effect in effects:
                self._perform(effect)

    def on_written(self, number: int) -> None:
        """The ledger holds all rows up to this number."""
        if self._closed:
            return
        while self._unwritten and self._unwritten[0][0] <= number:
            for effect in self._unwritten.popleft()[1]:
                self._perform(effect)
        self._feed_waiting()

    def _perform(self, effect: out.NodeEffect) -> None:
        """One that fails must not take those behind it along: they are other transfers'."""
        try:
            self._moves[type(effect)](effect)
        except Exception:
            self._node.counters["effects_failed"] += 1
            log.exception("could not %s", effect)

    def attach_pools(self, pools: list[PoolRecord]) -> None:
        """Map the pools that an earlier life left; OSError or ValueError."""
        for pool in pools:
            if pool.device != HOST:
                log.warning("a pool was in %s and is lost, with its transfers", pool.device)
                continue
            path = self._pools_dir / pool.pool_id
            mapped = HostPool.attach(path, pool.layout.block_bytes, pool.blocks)
            self._have_pool(pool.pool_id, mapped)
            self._make_board(pool.pool_id)

    def close(self) -> None:
        """Do what only waits for the ledger; stop timers and threads. The pools' files stay."""
        if self._ledger is not None:
            self.on_written(self._ledger.close())
        self._closed = True
        for board in self._boards.values():
            board.remove()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        self._memory.shutdown(wait=True)
        self._copies.close()

    # --- time ---

    def _arm(self) -> None:
        at_s = self._node.wake_at_s
        if at_s == self._timer_at_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at_s = at_s
        self._timer = self._loop.call_at(at_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at_s = float("inf")
        self.feed(out.TimePassed())

    # --- bytes ---

    def _place(self, effect: out.Expect | out.Transmit) -> Place:
        layout = self._node.books[effect.pool_id].layout
        pool = self._pools[effect.pool_id]
        runs, base_token = effect.place.runs, effect.place.base_tokens
        extent = (runs, base_token, effect.first_token, effect.tokens)
        if effect.slices is None:
            return whole(pool, layout, *extent)
        slices = (effect.slices.planes, effect.slices.wire_block_tokens)
        return self._slice_plans.sliced(pool, layout, slices, *extent)

    def _expect(self, effect: out.Expect) -> None:
        if effect.key.is_here:
            try:
                self._copies.expect(effect, self._place(effect))
            except Exception:
                log.exception("could not %s", effect)
                self._events.append(out.ChunkMissed(effect.key, effect.handle, effect.first_token))
            return
        assert self._streams is not None
        if not self._streams.expect(effect, self._place(effect), _blocks(effect)):
            self._events.append(out.ChunkMissed(effect.key, effect.handle, effect.first_token))

    def _cancel_expected(self, effect: out.CancelExpected) -> None:
        assert self._streams is not None
        claims = self._streams.cancel(effect.handle) + self._copies.cancel(effect.handle)
        for key, handle, first_token in claims:
            self._events.append(out.ChunkMissed(key, handle, first_token))

    def _transmit(self, effect: out.Transmit) -> None:
        if effect.key.is_here:
            try:
                self._copies.transmit(effect, self._place(effect))
            except Exception:  # a connection's end would tell; here nothing else does
                log.exception("could not %s", effect)
                first, part = effect.first_token, effect.part
                self._events.append(out.ChunkSent(effect.key, effect.owner, part, first, 0))
            return
        assert self._streams is not None
        # If it is gone, its end tells the transfer.
        self._streams.transmit(effect, self._place(effect), _blocks(effect))

    # --- work off the loop ---

    def _off_loop(self, work: Callable[[], out.NodeEvent]) -> None:
        self._track(self._loop.run_in_executor(self._memory, work))

    def _track(self, task: "asyncio.Future[out.NodeEvent]") -> None:
        self._tasks.add(task)
        task.add_done_callback(self._on_work_done)

    def _on_work_done(self, task: "asyncio.Future[out.NodeEvent]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self.feed(task.result())

    def _zero(self, effect: out.Zero) -> None:
        pool = self._pools[effect.pool_id]

        def work() -> out.NodeEvent:
            try:
                for run in effect.runs:
                    pool.zero(run.first_block, run.blocks)
            except DeviceError as error:  # told by the pool: whoever gets these blocks has failed
                log.error("cannot wipe blocks: %s", error)
            return out.Zeroed(effect.ticket)

        self._off_loop(work)

    def _drop_pool(self, effect: out.DropPool) -> None:
        """Off the loop: the kernel takes its time to give gigabytes back."""
        if effect.pool_id not in self._pools:
            return  # it was lost with an earlier life
        pool = [self._pools.pop(effect.pool_id)]  # the last to hold it is the thread
        board = self._boards.pop(effect.pool_id, None)

        streams = self._streams

        def work() -> None:
            if streams is not None:
                streams.drop_pool(effect.pool_id)
            if board is not None:
                board.remove()
            pool.pop().remove()

        self._drops = [one for one in self._drops if not one.done()]
        self._drops.append(self._memory.submit(work))

    def _make_pool(self, effect: out.MakePool) -> None:
        path = self._pools_dir / effect.pool_id
        drops = list(self._drops)  # began before; their room is ours

        def work() -> out.NodeEvent:
            wait(drops)
            refused: out.PoolNotMade | None = None
            try:
                pool = self._new_pool_in_time(effect, path)
            except NotShared as error:
                refused = out.PoolNotMade(effect.pool_id, str(error), Code.POOL_UNREACHABLE)
            except (MemoryRefused, OSError) as error:
                refused = out.PoolNotMade(effect.pool_id, str(error))
            if refused is not None:
                if self._device is not None:  # now: the error held what had been allocated
                    self._device.give_back()
                return refused
            self._have_pool(effect.pool_id, pool)
            self._make_board(effect.pool_id)
            memory = pool.memory if isinstance(pool, DevicePool) else None
            return out.PoolMade(effect.pool_id, str(path), memory)

        self._off_loop(work)

    def _new_pool_in_time(self, effect: out.MakePool, path: Path) -> Pool:
        """Workers close what an earlier life gave them at their next beat: room may come by that."""
        until_s = time.monotonic() + self._node.settings.timing.lost_s
        while True:
            try:
                return self._new_pool(effect, path)
            except NoRoom:
                if time.monotonic() >= until_s:
                    raise
                time.sleep(ROOM_AGAIN_S)

    def _new_pool(self, effect: out.MakePool, path: Path) -> Pool:
        block_bytes, blocks = effect.layout.block_bytes, effect.blocks
        if self._device is None:
            return HostPool.create(path, block_bytes, blocks, node=self._placement.node)

        def on_broken(message: str, usable: bool) -> None:
            """In the thread that copied; the loop may be closed by now."""
            log.error("pool %s: %s", effect.pool_id, message)
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._on_broken, pool, message, usable)

        pool = DevicePool.create(self._device, block_bytes, blocks, on_broken)
        return pool

    def _on_broken(self, pool: DevicePool, message: str, usable: bool) -> None:
        """Before the end of the stream or of the wiping that found it out."""
        for pool_id, one in list(self._pools.items()):
            if one is pool:  # else another is in its place
                self.feed(out.PoolBroken(pool_id, message, usable))

    def _have_pool(self, pool_id: str, pool: Pool) -> None:
        self._pools[pool_id] = pool
        if self._streams is not None:
            device = HOST_MEMORY if pool.cuda_index is None else pool.cuda_index + 1
            memory = Memory(pool.address, pool.block_bytes, pool.blocks, pool, device)
            self._streams.add_pool(pool_id, memory)

    # --- status boards ---

    def _make_board(self, pool_id: str) -> None:
        """Without one, its workers poll by message."""
        path = Path(board_path(str(self._pools_dir / pool_id)))
        settings = self._node.settings
        try:
            board = Board.create(path, SLOTS, settings.boot_id, settings.timing.lost_s)
        except OSError as error:
            log.warning("no status board at %s: %s", path, error)
        else:
            self._boards[pool_id] = board

    def beat(self) -> None:
        """Show on every board that this daemon lives."""
        for board in list(self._boards.values()):  # a thread may add one
            board.beat()

    def _show_slot(self, effect: out.ShowSlot) -> None:
        board = self._boards.get(effect.pool_id)
        if board is not None:
            board.show(effect.snapshot)

    def _clear_slot(self, effect: out.ClearSlot) -> None:
        board = self._boards.get(effect.pool_id)
        if board is not None:
            board.clear(effect.index)

    def _probe(self, effect: pr.Probe) -> None:
        async def ask() -> out.NodeEvent:
            return out.Probed(effect.address, await probe(effect.address))

        self._track(self._loop.create_task(ask()))


def _blocks(effect: out.Expect | out.Transmit) -> Blocks | None:
    """The blocks of an extent, where it has them whole but for the payload's end."""
    base_tokens, runs = effect.place
    if effect.slices is not None or effect.first_token != base_tokens:
        return None
    return Blocks(effect.pool_id, runs)
