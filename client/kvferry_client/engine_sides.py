"""One transfer as its engine sees it, and the decode side of pages: see ``engine``. Needs torch."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, Unpack

from kvferry_client.aio import AsyncClient, AsyncReceiving, AsyncSending
from kvferry_client.calls import SendOptions, send_call
from kvferry_client.engine_leftovers import Leftover
from kvferry_client.engine_pages import Memory, Pages, Tables
from kvferry_client.views import Pool, WindowView
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import Role, State

PIECE_TOKENS = 1024  # copied at a stretch: what ``forget`` may have to wait for
T = TypeVar("T", AsyncSending, AsyncReceiving)
Identity = Mapping[str, str]  # what a payload is of: both sides tell the same, or it is refused
NOTHING: Identity = MappingProxyType({})
logger = logging.getLogger(__name__)


def typed(error: BaseException) -> FerryError:
    """The error itself, or an internal one that tells what it was."""
    if isinstance(error, FerryError):
        return error
    return FerryError(Code.INTERNAL, f"{type(error).__name__}: {error}")


class Side:
    """One transfer as its engine sees it; any thread may look at it and abort it."""

    role: ClassVar[Role] = Role.SOURCE

    def __init__(self, memory: Memory, transfer_id: str, attempt: int, identity: Identity) -> None:
        self.transfer_id = transfer_id
        self.attempt = attempt
        self.error: FerryError | None = None
        self.traceparent: str | None = None
        self.reason = "the engine is stopping"
        self.tell: Callable[[Callable[[], object]], object] = lambda _: None  # set by the ferry
        self.leave: Callable[[Leftover], object] = lambda _: None  # the same
        self.task: asyncio.Task[None] | None = None  # the same, once it has begun
        self._memory = memory
        self._identity = identity
        self._ended = threading.Event()

    @property
    def ended(self) -> bool:
        """Whether the engine's memory is touched no more; ``error`` says how it went."""
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

    @property
    def _aux(self) -> dict[str, str] | None:
        """How the identity travels."""
        return dict(self._identity) or None

    def _stop(self) -> None:
        """Once only: what tells the daemon of the end is part of the same task."""
        assert self.task is not None
        if not self.ended and not self.task.cancelling():
            self.task.cancel()

    def _give_up(self, error: BaseException) -> FerryError:
        """Let the engine go on before the daemon is told, which may be dead and keep us waiting."""
        self._memory.settle()
        if not isinstance(error, FerryError | asyncio.CancelledError):
            logger.error("transfer %s, attempt %d", self.transfer_id, self.attempt, exc_info=error)
        self.end(error)
        assert self.error is not None
        return self.error

    async def _opened(
        self, opening: Awaitable[T], again: worker.Send | None = None, why: str | None = None
    ) -> T:
        """Open it. A daemon whose answer was not heard may have done so: that is let go of, too.

        ``again``, ``why``: what opens it and the reason that a sink is told, if it is to hear of this.
        """
        try:
            return await opening
        except asyncio.CancelledError:
            self._leave(self.reason, again)
            raise
        except FerryError as error:
            if error.code is Code.DAEMON_UNREACHABLE:
                self._leave(why or str(error), again)
            raise

    async def _send(
        self, client: AsyncClient, why: str | None = None, **more: Unpack[SendOptions]
    ) -> AsyncSending:
        """Open it as a source; ``why``: see ``_opened``."""
        options: SendOptions = {
            "attempt": self.attempt,
            "rank": self._memory.rank,
            "world_size": self._memory.world_size,
            **more,
        }
        again = send_call(self.transfer_id, options)
        return await self._opened(client.send(self.transfer_id, **options), again, why)

    async def _let_go(self, transfer: AsyncSending | AsyncReceiving) -> None:
        """Tell the daemon that its blocks are touched no more.

        One that is away for a while and goes on from its ledger would keep them until this process ends.
        """
        if transfer.logic.released or self._memory.is_left:
            return
        reason = None if self.error is None else str(self.error)
        try:
            await (transfer.release() if reason is None else transfer.abort(reason))
        except FerryError as error:
            if error.code in (Code.DAEMON_UNREACHABLE, Code.RESOURCE_EXHAUSTED):
                self._leave(reason)  # others: it knows nothing of the transfer any more

    def _leave(self, reason: str | None, opening: worker.Send | None = None) -> None:
        name = (self.transfer_id, self.attempt, self._memory.rank)
        self.leave(Leftover(self.role, *name, reason, opening))


class Fetching(Side):
    """The side that fetches, whatever it fetches into."""

    role = Role.SINK

    def __init__(
        self,
        memory: Memory,
        transfer_id: str,
        attempt: int,
        identity: Identity,
        source: str | None,
        *,
        start_tokens: int,
        is_wanted: bool,
    ) -> None:
        super().__init__(memory, transfer_id, attempt, identity)
        self.source = source
        self._start_tokens = start_tokens
        self._is_wanted = is_wanted
        self._taking: asyncio.Task[None] | None = None

    async def move(self, client: AsyncClient) -> None:
        """Take windows over until the payload is complete."""
        is_ours = self.source == client.welcome.peer_address
        receiving = await self._opened(
            client.receive(
                self.transfer_id,
                source=None if is_ours else self.source,
                attempt=self.attempt,
                rank=self._memory.rank,
                world_size=self._memory.world_size,
                start_tokens=self._start_tokens,
                traceparent=self.traceparent,
            )
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
        if self.ended or not self._is_wanted:
            raise FerryError(Code.ABORTED, self.reason if self.ended else "no token is wanted here")
        self._taking = asyncio.ensure_future(self._windows(receiving))
        await self._taking

    async def _windows(self, receiving: AsyncReceiving) -> None:
        """Take every window over."""
        raise NotImplementedError

    def _check_identity(self, told: Mapping[str, Any] | None) -> None:
        """FerryError(payload_mismatch) if the source has told anything else."""
        told = told or {}
        for name, here in self._identity.items():
            if told.get(name) != here:
                raise FerryError(
                    Code.PAYLOAD_MISMATCH,
                    f"{self.transfer_id}: {name}: {told.get(name)} at the source, {here} here",
                )

    def _check_total(self, found: int | None, needed: int) -> None:
        """FerryError(total_mismatch) if the payload is of another length."""
        if found != needed:
            raise FerryError(
                Code.TOTAL_MISMATCH,
                f"{self.transfer_id}: the source sent {found} tokens, {needed} are needed",
            )


class Incoming(Fetching):
    """The decode side: ``ended`` once tokens below ``taken_tokens`` lie in the engine's pages.

    Without an ``error`` these are all of them.
    """

    def __init__(
        self,
        pages: Pages,
        transfer_id: str,
        attempt: int,
        identity: Identity,
        source: str | None,
        tables: Tables,
        tokens: range,
    ) -> None:
        size = pages.pool_block_tokens
        super().__init__(
            pages,
            transfer_id,
            attempt,
            identity,
            source,
            start_tokens=tokens.start // size * size,
            is_wanted=bool(tokens),
        )
        self.taken_tokens = tokens.start
        self.least_tokens = tokens.stop  # of the payload
        self.aux: dict[str, Any] | None = None  # once it has ended
        self._pages = pages
        self._tables = tables
        self._tokens = tokens
        self._event = pages.event()

    async def _windows(self, receiving: AsyncReceiving) -> None:
        async for window in receiving.windows(PIECE_TOKENS):
            self._check_identity(receiving.aux)
            self._take(window, receiving.logic.pool)
        total = receiving.total_tokens
        if total is None or not self.least_tokens <= total <= self._tokens.stop:
            self.taken_tokens = self._tokens.start  # of another prompt, then
            self._check_total(total, self._tokens.stop)
        self.aux = receiving.aux

    def _take(self, window: WindowView, pool: Pool) -> None:
        end = min(window.end_token, self._tokens.stop)
        tokens = range(max(window.first_token, self._tokens.start), end)
        if tokens:
            self._pages.follow(self._event)
            self._pages.copy(self._tables, window, pool, tokens, out=False)
            self.taken_tokens = end
