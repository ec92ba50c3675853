"""The one thread that talks to NIXL: it begins reads, looks whether they are done, serves others'.

It sleeps while nothing is under way. While something is, it looks without a pause at first, then
ever more seldom: reads that hardware does need no help, and those that it does not are done in
these very looks, at both ends.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from kvferry_daemon.transports.nixl.agent import Memory, NixlFailed, PoolAgent, Reading
from kvferry_daemon.transports.tcp.events import Enter, stay
from kvferry_proto.offer import PoolFrame, Runs

BUSY_LOOKS = 2000  # without a pause, since anything has happened
PAUSE_S = 20e-6
PAUSE_MAX_S = 1e-3
CLOSE_S = 5.0  # NIXL may be registering gigabytes; the process ends all the same
Done = Callable[[str | None], None]  # called once, with the reason if a read has failed
log = logging.getLogger(__name__)


class _Read(NamedTuple):
    agent: PoolAgent
    reading: Reading
    done: Done


class Poller:
    """Every method may be called from any thread; ``done`` and the like are called on its own."""

    def __init__(self, enter: Enter = stay, eager: bool = True) -> None:
        """``enter`` is called by the thread, before all else.

        ``eager``: pools are registered when they are made, else when somebody wants to read them.
        """
        self._enter = enter
        self._eager = eager
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._memories: dict[str, Memory] = {}
        # A pool has two agents: shutting its readers out must not end its own reads.
        self._servers: dict[str, PoolAgent | None] = {}  # None: it could not be registered
        self._readers: dict[str, PoolAgent] = {}
        self._reads: list[_Read] = []
        self._offers: dict[str, int] = {}  # by pool: how many are not answered yet
        self.reads = 0  # of ours, that have ended well
        self._numbers = 0
        self._closed = False
        self._idle_looks = 0
        self._thread = threading.Thread(target=self._run, name="kvferry-nixl", daemon=True)
        self._thread.start()

    # --- pools ---

    def add_pool(self, pool_id: str, memory: Memory) -> None:
        """Register a pool, now or later."""
        self._memories[pool_id] = memory
        if self._eager:
            self._put(lambda: self._serve_pool(pool_id))

    def drop_pool(self, pool_id: str) -> "Future[None]":
        """Let a pool go; done when nothing here holds its memory any more."""

        def drop() -> None:
            self._memories.pop(pool_id, None)
            self._close(self._servers.pop(pool_id, None))
            self._close(self._readers.pop(pool_id, None))

        return self._ask(drop)

    def frame_of(self, pool_id: str) -> PoolFrame | None:
        """The pool as others read it now; None if it cannot be read (yet)."""
        if pool_id not in self._servers and not self._eager:
            self._put(lambda: self._serve_pool(pool_id))
        server = self._servers.get(pool_id)
        return server.frame if server is not None else None

    def revoke(self, pool_id: str, number: int) -> "Future[None]":
        """Done when nobody can read there any more what was offered under this number."""

        def revoke() -> None:
            server = self._servers.get(pool_id)
            if server is not None and server.frame.number == number:
                log.warning("shutting out who reads pool %s: one cannot be asked", pool_id)
                self._close(self._servers.pop(pool_id))
                self._serve_pool(pool_id)

        return self._ask(revoke)

    def _serve_pool(self, pool_id: str) -> None:
        if pool_id in self._servers or pool_id not in self._memories:
            return
        self._servers[pool_id] = None
        self._numbers += 1
        try:
            self._servers[pool_id] = PoolAgent(self._memories[pool_id], self._numbers)
        except NixlFailed as error:
            log.error("pool %s cannot be read by NIXL, its bytes go by tcp: %s", pool_id, error)

    # --- source ---

    def offered(self, pool_id: str) -> None:
        """Somebody may read there: look after it until ``answered`` was called as often."""
        self._put(lambda: self._count(pool_id, 1))

    def answered(self, pool_id: str) -> None:
        """An offer is over."""
        self._put(lambda: self._count(pool_id, -1))

    def _count(self, pool_id: str, more: int) -> None:
        left = self._offers.pop(pool_id, 0) + more
        if left:
            self._offers[pool_id] = left

    # --- sink ---

    def part(self, user: object) -> None:
        """A connection that has read is over."""

        def part() -> None:
            for reader in self._readers.values():
                reader.part(user)

        self._put(part)

    def read(
        self, user: object, ours: tuple[str, Runs], theirs: tuple[PoolFrame, Runs], done: Done
    ) -> None:
        """Read offered blocks into ours; ``done`` proves that nothing is written there any more.

        ``user`` is the connection, until ``part``.
        """

        def begin() -> None:
            why = "the daemon stops" if self._closed else ""
            try:
                if not why:
                    reader = self._reader_of(ours[0])
                    reader.meet(user, theirs[0])
                    self._reads.append(_Read(reader, reader.begin(*theirs, ours[1]), done))
            except NixlFailed as error:
                why = str(error)
            if why:
                done(why)

        self._put(begin)

    def _reader_of(self, pool_id: str) -> PoolAgent:
        if pool_id not in self._readers:
            if pool_id not in self._memories:
                raise NixlFailed(f"pool {pool_id} is not registered here")
            self._readers[pool_id] = PoolAgent(self._memories[pool_id], 0)
        return self._readers[pool_id]

    def _look_at_reads(self) -> bool:
        """A read that fails takes its agent along: only that ends what may be under way of it."""
        under_way, broken = [], {}
        for read in self._reads:
            try:
                if not read.agent.is_done(read.reading):
                    under_way.append(read)
                    continue
            except NixlFailed as error:
                broken[read.agent] = str(error)
                under_way.append(read)
                continue
            self.reads += 1
            self._do(partial(read.done, None))
        ended = len(under_way) < len(self._reads)
        self._reads = under_way
        while broken:
            self._give_up(*broken.popitem())
        return ended

    def _give_up(self, agent: PoolAgent, why: str) -> None:
        log.warning("giving a NIXL agent up, and what it reads: %s", why)
        over = [read.done for read in self._reads if read.agent is agent]
        self._reads = [read for read in self._reads if read.agent is not agent]
        self._readers = {one: kept for one, kept in self._readers.items() if kept is not agent}
        self._close(agent)
        for done in over:
            self._do(partial(done, why))

    # --- the thread ---

    def close(self) -> None:
        """End the thread, and with it every agent; reads under way are given up with them."""
        self._closed = True
        self._wake.set()
        self._thread.join(CLOSE_S)

    def _put(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._wake.set()

    def _ask(self, job: Callable[[], None]) -> "Future[None]":
        """Put a job that somebody waits for."""
        done: Future[None] = Future()

        def work() -> None:
            try:
                job()
            finally:
                done.set_result(None)

        self._put(work)
        if not self._thread.is_alive() and not done.done():
            done.set_result(None)  # nobody reads or writes any more
        return done

    def _run(self) -> None:
        self._enter()
        while not self._closed:
            happened = False
            while self._jobs:
                self._do(self._jobs.popleft())
                happened = True
            happened |= self._look_at_reads()
            for pool_id in self._offers:
                server = self._servers.get(pool_id)
                if server is not None:
                    self._do(server.serve)
            self._idle_looks = 0 if happened else self._idle_looks + 1
            self._pause()
        for agent in (*self._servers.values(), *self._readers.values()):
            self._close(agent)
        while self._jobs:  # who waits for one of these must not wait for ever
            self._do(self._jobs.popleft())

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:  # one fault of ours must not end everybody's reads
            log.exception("a job of the NIXL thread has failed")

    def _close(self, agent: PoolAgent | None) -> None:
        if agent is not None:
            self._do(agent.close)

    def _pause(self) -> None:
        if not self._reads and not self._offers:
            self._wake.wait()
        elif self._idle_looks < BUSY_LOOKS:
            time.sleep(0)  # others' turn at the GIL
        else:
            self._wake.wait(min(PAUSE_S * (self._idle_looks / BUSY_LOOKS), PAUSE_MAX_S))
        self._wake.clear()
