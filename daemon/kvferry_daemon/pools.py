"""The memory of this daemon's pools, and a status board beside each: made, wiped and dropped.

All of that takes its time, so threads do it, and the outcome comes back as a node event.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.boards import SLOTS, board_path
from kvferry_daemon.core.records import HOST, PoolRecord
from kvferry_daemon.core.tenants import uid_in
from kvferry_daemon.memory.board import Board
from kvferry_daemon.memory.device import Device, DeviceError, NoRoom, NotShared
from kvferry_daemon.memory.device_pool import DevicePool
from kvferry_daemon.memory.host import HostPool, MemoryRefused
from kvferry_daemon.memory.placement import ANYWHERE, Placement
from kvferry_daemon.memory.places import Pool, SlicePlans, whole
from kvferry_daemon.transports.nixl.agent import Memory
from kvferry_daemon.transports.tcp.staging import Place
from kvferry_proto.errors import Code
from kvferry_proto.layout import Layout
from kvferry_proto.offer import HOST as HOST_MEMORY

THREADS = 2
ROOM_AGAIN_S = 0.2
log = logging.getLogger(__name__)


class Registry(Protocol):
    """Who registers pools with what reads them one-sided."""

    def add_pool(self, pool_id: str, memory: Memory) -> None: ...
    def drop_pool(self, pool_id: str) -> None: ...


class Pools:
    """Pools and boards by pool id. ``feed`` takes what became of an effect, on the loop."""

    def __init__(
        self,
        directory: Path,
        boot_id: str,
        lost_s: float,
        feed: Callable[[out.NodeEvent], None],
        placement: Placement = ANYWHERE,
        device: Device | None = None,
    ) -> None:
        """``device``: where new pools lie; None: in host memory, files in ``directory``."""
        self._directory = directory
        self._boot_id = boot_id
        self._lost_s = lost_s
        self._feed = feed
        self._placement = placement
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._registry: Registry | None = None
        self._pools: dict[str, Pool] = {}
        self._boards: dict[str, Board] = {}
        self._slice_plans = SlicePlans()
        self._tasks: set[asyncio.Future[out.NodeEvent]] = set()
        self._drops: list[Future[None]] = []
        self._threads = ThreadPoolExecutor(THREADS, "kvferry-memory", placement.enter)

    def __getitem__(self, pool_id: str) -> Pool:
        return self._pools[pool_id]

    def use_registry(self, registry: Registry) -> None:
        """From now on pools are registered there."""
        self._registry = registry

    def attach(self, pools: list[PoolRecord], lost: Collection[str]) -> None:
        """Map the pools that an earlier life left, but those lost; OSError or ValueError."""
        for pool in pools:
            if pool.pool_id in lost:
                continue
            if pool.device != HOST:
                log.warning("a pool was in %s and is lost, with its transfers", pool.device)
                continue
            path = self._directory / pool.pool_id
            self._have(pool.pool_id, HostPool.attach(path, pool.layout.block_bytes, pool.blocks))

    def close(self) -> None:
        """Give the boards up and end the threads. The pools' files stay."""
        for board in self._boards.values():
            board.remove()
        for task in self._tasks:
            task.cancel()
        self._threads.shutdown(wait=True)

    def place(self, effect: out.Expect | out.Transmit, layout: Layout) -> Place:
        """Where the bytes of an extent lie."""
        pool = self._pools[effect.pool_id]
        runs, base_token = effect.place.runs, effect.place.base_tokens
        extent = (runs, base_token, effect.first_token, effect.tokens)
        if effect.slices is None:
            return whole(pool, layout, *extent)
        slices = (effect.slices.planes, effect.slices.wire_block_tokens)
        return self._slice_plans.sliced(pool, layout, slices, *extent)

    # --- work off the loop ---

    def _off_loop(self, work: Callable[[], out.NodeEvent]) -> None:
        task = self._loop.run_in_executor(self._threads, work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: "asyncio.Future[out.NodeEvent]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._feed(task.result())

    def zero(self, effect: out.Zero) -> None:
        """Wipe blocks; Zeroed follows."""
        pool = self._pools[effect.pool_id]

        def work() -> out.NodeEvent:
            try:
                for run in effect.runs:
                    pool.zero(run.first_block, run.blocks)
            except DeviceError as error:  # told by the pool: whoever gets these blocks has failed
                log.error("cannot wipe blocks: %s", error)
            return out.Zeroed(effect.ticket)

        self._off_loop(work)

    def drop(self, effect: out.DropPool) -> None:
        """Give a pool's memory back: the kernel takes its time over gigabytes."""
        if effect.pool_id not in self._pools:
            return  # it was lost with an earlier life
        pool = [self._pools.pop(effect.pool_id)]  # the last to hold it is the thread
        board = self._boards.pop(effect.pool_id, None)
        registry = self._registry

        def work() -> None:
            if registry is not None:
                registry.drop_pool(effect.pool_id)
            if board is not None:
                board.remove()
            pool.pop().remove()

        self._drops = [one for one in self._drops if not one.done()]
        self._drops.append(self._threads.submit(work))

    def make(self, effect: out.MakePool) -> None:
        """Make a pool; PoolMade or PoolNotMade follows, whatever happens: workers wait for it."""
        path = self._directory / effect.pool_id
        drops = list(self._drops)  # began before; their room is ours

        def work() -> out.NodeEvent:
            wait(drops)
            try:
                return self._made(effect, path)
            except (MemoryRefused, OSError) as error:
                refused = self._why_not(effect.pool_id, error)
            except Exception as error:
                log.exception("our own fault: cannot make pool %s", effect.pool_id)
                words = f"{type(error).__name__}: {error}"
                refused = out.PoolNotMade(effect.pool_id, words, Code.INTERNAL)
            self._clear_up(effect.pool_id)  # now: the error held what had been allocated
            return refused

        self._off_loop(work)

    def _made(self, effect: out.MakePool, path: Path) -> out.PoolMade:
        pool = self._new_in_time(effect, path)
        self._have(effect.pool_id, pool)
        memory = pool.memory if isinstance(pool, DevicePool) else None
        return out.PoolMade(effect.pool_id, str(path), memory)

    def _why_not(self, pool_id: str, error: MemoryRefused | OSError) -> out.PoolNotMade:
        if isinstance(error, NotShared):
            return out.PoolNotMade(pool_id, str(error), Code.POOL_UNREACHABLE)
        if isinstance(error, DeviceError) and not isinstance(error, NoRoom):
            log.error("cannot make pool %s: %s", pool_id, error)
            usable = self._device is not None and self._device.works()
            return out.PoolNotMade(pool_id, str(error), Code.DEVICE_FAILED, usable)
        return out.PoolNotMade(pool_id, str(error))

    def _clear_up(self, pool_id: str) -> None:
        """Of a pool that was not made nothing stays. What goes wrong here keeps nobody waiting."""
        pool = self._pools.pop(pool_id, None)
        try:
            if pool is not None:
                pool.remove()
            elif self._device is not None:
                self._device.give_back()
        except Exception:
            log.exception("our own fault: cannot clear up after pool %s", pool_id)

    def _new_in_time(self, effect: out.MakePool, path: Path) -> Pool:
        """Workers close what an earlier life gave them at their next beat: room may come by that."""
        until_s = time.monotonic() + self._lost_s
        while True:
            try:
                return self._new(effect, path)
            except NoRoom:
                if time.monotonic() >= until_s:
                    raise
                time.sleep(ROOM_AGAIN_S)

    def _new(self, effect: out.MakePool, path: Path) -> Pool:
        block_bytes, blocks = effect.layout.block_bytes, effect.blocks
        if self._device is None:
            uid = uid_in(effect.pool_id)
            return HostPool.create(path, block_bytes, blocks, node=self._placement.node, uid=uid)

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
                self._feed(out.PoolBroken(pool_id, message, usable))

    def _have(self, pool_id: str, pool: Pool) -> None:
        self._pools[pool_id] = pool
        if self._registry is not None:
            device = HOST_MEMORY if pool.cuda_index is None else pool.cuda_index + 1
            memory = Memory(pool.address, pool.block_bytes, pool.blocks, pool, device)
            self._registry.add_pool(pool_id, memory)
        self._make_board(pool_id)

    # --- status boards ---

    def _make_board(self, pool_id: str) -> None:
        """Without one, its workers poll by message."""
        path = Path(board_path(str(self._directory / pool_id)))
        try:
            board = Board.create(path, SLOTS, self._boot_id, self._lost_s, uid_in(pool_id))
        except OSError as error:
            log.warning("no status board at %s: %s", path, error)
        else:
            self._boards[pool_id] = board

    def beat(self) -> None:
        """Show on every board that this daemon lives."""
        for board in list(self._boards.values()):  # a thread may add one
            board.beat()

    def show_slot(self, effect: out.ShowSlot) -> None:
        """Write a snapshot where a worker looks."""
        board = self._boards.get(effect.pool_id)
        if board is not None:
            board.show(effect.snapshot)

    def clear_slot(self, effect: out.ClearSlot) -> None:
        """A slot is nobody's."""
        board = self._boards.get(effect.pool_id)
        if board is not None:
            board.clear(effect.index)
