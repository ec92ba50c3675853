"""The two sides of a transfer between an engine's pages and windows: see ``engine``. Needs torch."""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from kvferry_client.aio import AsyncClient, AsyncReceiving, AsyncSending
from kvferry_client.engine_pages import Pages, Tables
from kvferry_client.views import Pool, WindowView
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import State

PIECE_TOKENS = 1024  # copied at a stretch: what ``forget`` may have to wait for
LET_GO_AGAIN_S = 1.0
logger = logging.getLogger(__name__)


def typed(error: BaseException) -> FerryError:
    """The error itself, or an internal one that tells what it was."""
    if isinstance(error, FerryError):
        return error
    return FerryError(Code.INTERNAL, f"{type(error).__name__}: {error}")


class Side:
    """One transfer as its engine sees it; any thread may look at it and abort it."""

    def __init__(self, pages: Pages, transfer_id: str, attempt: int) -> None:
        self.transfer_id = transfer_id
        self.attempt = attempt
        self.error: FerryError | None = None
        self.reason = "the engine is stopping"
        self.tell: Callable[[Callable[[], object]], object] = lambda _: None  # set by the ferry
        self.task: asyncio.Task[None] | None = None  # the same, once it has begun
        self._pages = pages
        self._ended = threading.Event()

    @property
    def ended(self) -> bool:
        """Whether the engine's pages are touched no more; ``error`` says how it went."""
        return self._ended.is_set()

    def wait(self, wait_s: float) -> bool:
        """Wait for the end, for engines that have nothing else to do; whether it came."""
        return self._ended.wait(wait_s)

    def abort(self, reason: str) -> None:
        """Give it up. Pages may be used again once ``ended`` is true."""
        self.reason = reason
        self.tell(self._stop)

    def end(self, error: BaseException | None = None) -> None:
        """No page is touched from now on; the first word counts."""
        if self._ended.is_set():
            return
        if isinstance(error, asyncio.CancelledError):
            error = FerryError(Code.ABORTED, self.reason)
        self.error = None if error is None else typed(error)
        self._ended.set()

    async def move(self, client: AsyncClient) -> None:
        """Do all of it, in the ferry's thread."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Once only: what tells the daemon of the end is part of the same task."""
        assert self.task is not None
        if not self.ended and not self.task.cancelling():
            self.task.cancel()

    def _give_up(self, error: BaseException) -> FerryError:
        """Let the engine go on before the daemon is told, which may be dead and keep us waiting."""
        self._pages.settle()
        if not isinstance(error, FerryError | asyncio.CancelledError):
            logger.error("transfer %s, attempt %d", self.transfer_id, self.attempt, exc_info=error)
        self.end(error)
        assert self.error is not None
        return self.error

    async def _let_go(self, transfer: AsyncSending | AsyncReceiving) -> None:
        """Tell a daemon that was away, once it is back, that its blocks are touched no more.

        One that goes on from its ledger would keep them until this process ends.
        """
        while not transfer.logic.released and not self._pages.are_left:
            try:
                if self.error is None:
                    await transfer.release()
                else:
                    await transfer.abort(str(self.error))
            except FerryError as error:
                if error.code is not Code.DAEMON_UNREACHABLE:
                    return  # it knows nothing of the transfer any more
                await asyncio.sleep(LET_GO_AGAIN_S)


class _Computed(NamedTuple):
    """What an engine has computed, and where it lies; ``event``: the GPU's work on it."""

    tables: Tables
    tokens: int
    event: Any


class Outgoing(Side):
    """The prefill side: ``ended`` once every token was copied into a window, long before it arrived.

    From then on the payload is the daemon's: its lease and deadlines hold, and the engine's pages
    are free whatever becomes of decode.
    """

    def __init__(self, pages: Pages, transfer_id: str, attempt: int, total_tokens: int) -> None:
        super().__init__(pages, transfer_id, attempt)
        self.total_tokens = total_tokens
        self.copied_tokens = 0
        self._have: _Computed | None = None
        self._news = asyncio.Event()
        self._copying = threading.Lock()

    def computed(self, tables: Tables, tokens: int) -> None:
        """Tokens below ``tokens`` lie in these pages, once the GPU has done what it was given.

        Entries of pages that are gone are ``NO_BLOCK``: those tokens travel as they are, unread.
        """
        self._have = _Computed(tables, min(tokens, self.total_tokens), self._pages.event())
        self.tell(self._news.set)

    def forget(self) -> None:
        """The pages are about to be another's: a preempted request's. Waits for a copy under way.

        What was copied stays; the rest comes when it has been ``computed`` again.
        """
        self._have = None
        with self._copying:
            self._pages.settle()

    async def move(self, client: AsyncClient) -> None:
        """Fill windows until the payload is complete."""
        sending = await client.send(
            self.transfer_id,
            attempt=self.attempt,
            rank=self._pages.rank,
            world_size=self._pages.world_size,
            total_tokens=self.total_tokens,
        )
        try:
            async with sending:
                try:
                    await self._fill(sending)
                except BaseException as error:
                    raise self._give_up(error) from error
                self.end()
        finally:
            await self._let_go(sending)

    async def _fill(self, sending: AsyncSending) -> None:
        async for window in sending.windows():
            while not (end := self._copy(window, sending.logic.pool)):
                await self._news.wait()
                self._news.clear()
            await sending.ready(end)
            self.copied_tokens = end

    def _copy(self, window: WindowView, pool: Pool) -> int:
        """Copy what is computed and fits; up to which token, or 0 if there is nothing new."""
        with self._copying:
            have, first = self._have, window.first_token
            if have is None or have.tokens <= first:
                return 0
            end = min(have.tokens, window.end_token, first + PIECE_TOKENS)
            self._pages.follow(have.event)
            self._pages.copy(have.tables, window, pool, range(first, end), out=True)
            return end


class Incoming(Side):
    """The decode side: ``ended`` once tokens below ``taken_tokens`` lie in the engine's pages.

    Without an ``error`` these are all of them.
    """

    def __init__(
        self,
        pages: Pages,
        transfer_id: str,
        attempt: int,
        source: str | None,
        tables: Tables,
        tokens: range,
    ) -> None:
        super().__init__(pages, transfer_id, attempt)
        self.source = source
        self.taken_tokens = tokens.start
        self._tables = tables
        self._tokens = tokens
        self._event = pages.event()
        self._taking: asyncio.Task[None] | None = None

    async def move(self, client: AsyncClient) -> None:
        """Take windows over until the payload is complete."""
        size = self._pages.pool_block_tokens
        receiving = await client.receive(
            self.transfer_id,
            source=self.source,
            attempt=self.attempt,
            rank=self._pages.rank,
            world_size=self._pages.world_size,
            start_tokens=self._tokens.start // size * size,
        )
        try:
            async with receiving:
                try:
                    await self._take_all(client, receiving)
                    await client.drive(receiving.logic.settled(), receiving.logic.pool)
                except BaseException as error:
                    raise self._give_up(error) from error
                self.end()
        finally:
            await self._let_go(receiving)

    def _stop(self) -> None:
        """Let the engine go on, and stop once the source can be told: see ``_take_all``."""
        if self.ended:
            return
        self._give_up(asyncio.CancelledError())
        if self._taking is not None:
            self._taking.cancel()

    async def _take_all(self, client: AsyncClient, receiving: AsyncReceiving) -> None:
        """Take windows over, unless they are not wanted.

        That is said only to a source that has answered: one that has not heard of this side would
        keep what it has until a deadline passes.
        """
        while receiving.snapshot.state is State.BOOTSTRAPPING:
            await client.drive(receiving.logic.change(), receiving.logic.pool)
        if self.ended or not self._tokens:
            raise FerryError(Code.ABORTED, self.reason if self.ended else "no token is wanted here")
        self._taking = asyncio.ensure_future(self._windows(receiving))
        await self._taking

    async def _windows(self, receiving: AsyncReceiving) -> None:
        async for window in receiving.windows(PIECE_TOKENS):
            self._take(window, receiving.logic.pool)
        self._check(receiving.total_tokens)

    def _take(self, window: WindowView, pool: Pool) -> None:
        end = min(window.end_token, self._tokens.stop)
        tokens = range(max(window.first_token, self._tokens.start), end)
        if tokens:
            self._pages.follow(self._event)
            self._pages.copy(self._tables, window, pool, tokens, out=False)
            self.taken_tokens = end

    def _check(self, total_tokens: int | None) -> None:
        if total_tokens != self._tokens.stop:
            self.taken_tokens = self._tokens.start  # of another prompt, then
            raise FerryError(
                Code.TOTAL_MISMATCH,
                f"{self.transfer_id}: the source sent {total_tokens} tokens, "
                f"{self._tokens.stop} are needed",
            )
