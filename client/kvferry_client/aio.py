"""The asyncio client: the same logic, awaited."""

import asyncio
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from kvferry_client.aio_connection import AsyncConnection
from kvferry_client.board import Board, BoardTrouble, Poll
from kvferry_client.calls import ReceiveOptions, SendOptions, receive_call, send_call
from kvferry_client.connection import Heart
from kvferry_client.logic import Progress, ReceiveLogic, SendLogic, nothing_left
from kvferry_client.session import CALL_S, Session
from kvferry_client.views import GpuWork, Pool, WindowView
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout
from kvferry_proto.states import Role

TIDY_S = 2.0  # how long leaving waits for what cancelled calls left behind


class AsyncClient:
    """One worker on an event loop. Use as an async context manager."""

    def __init__(self, runtime_dir: Path | str, layout: Layout, name: str = "") -> None:
        self._arguments = (Path(runtime_dir), layout, name[:128])
        self._tidying: set[asyncio.Task[None]] = set()
        self._session: Session | None = None
        self._connection: AsyncConnection | None = None
        self._heart: Heart | None = None

    async def __aenter__(self) -> Self:
        """Join the daemon; FerryError if it refuses or is not there."""
        self._session = Session(*self._arguments)
        self._connection = AsyncConnection(self._session)
        try:
            member = await self._connection.join()
        except BaseException:  # a cancellation's, too: nothing must be left of a half join
            await self._connection.close()
            self._session.close()
            raise
        self._heart = Heart(self._session, member.welcome.heartbeat_s)
        self._heart.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Leave. The daemon takes it as proof that this worker touches no block any more."""
        assert self._session is not None
        assert self._heart is not None
        if self._tidying:
            await asyncio.wait(self._tidying, timeout=TIDY_S)
        await self._linked.close()
        await asyncio.get_running_loop().run_in_executor(None, self._heart.stop)
        self._session.close()

    @property
    def _linked(self) -> AsyncConnection:
        if self._connection is None:
            raise FerryError(Code.CLIENT_CLOSED, "the client is not open; use `async with`")
        return self._connection

    @property
    def welcome(self) -> worker.Welcome:
        """What the daemon said to the newest hello."""
        assert self._session is not None
        assert self._session.welcome is not None
        return self._session.welcome

    async def call(self, call: Any, wait_s: float = CALL_S, pool: Pool | None = None) -> Any:
        """Make any call of the worker socket; FerryError if it is refused or unanswered."""
        return await self._linked.call(call, wait_s, pool)

    async def drive(self, steps: Generator[Any, Any, None], pool: Pool) -> None:
        """Run logic to its end."""
        try:
            call = next(steps)
            while True:
                if isinstance(call, GpuWork):
                    await asyncio.to_thread(call.wait)
                    call = next(steps)
                else:
                    call = steps.send(await self.call(call, pool=pool))
        except StopIteration:
            return

    async def poll(self, *transfers: worker.Watched, wait_s: float = 0.0) -> worker.Snapshots:
        """Snapshots of transfers whose number is above ``after``; waits for one if told to.

        They come from the daemon's status board, where they can: see ``Client.poll``.
        """
        poll = Poll(self._board, transfers, wait_s)
        reply = None if poll.call is None else await self.call(poll.call)
        return poll.answer(self._board, reply)

    @property
    def _board(self) -> Board | None:
        return None if self._session is None else self._session.board

    @property
    def board_trouble(self) -> BoardTrouble | None:
        """Why polls go by message; None if the status board is used."""
        return None if self._board is None else self._board.trouble

    async def send(self, transfer_id: str, **options: Unpack[SendOptions]) -> "AsyncSending":
        """Open the source side; FerryError if it is refused. Cancelled, it leaves none open."""
        call = send_call(transfer_id, options)
        reply, pool = await self._open(call, Role.SOURCE)
        return AsyncSending(self, SendLogic(pool, call), reply)

    async def receive(
        self, transfer_id: str, **options: Unpack[ReceiveOptions]
    ) -> "AsyncReceiving":
        """Open the sink side; FerryError if it is refused. Cancelled, it leaves none open."""
        call = receive_call(transfer_id, options)
        reply, pool = await self._open(call, Role.SINK)
        logic = ReceiveLogic(pool, call)
        return AsyncReceiving(self, logic, reply)

    async def _open(
        self, call: worker.Send | worker.Receive, role: Role
    ) -> tuple[worker.Snapshots, Pool]:
        try:
            return await self._linked.call_in_pool(call)
        except asyncio.CancelledError:
            task = asyncio.get_running_loop().create_task(self._tidy(call, role))
            self._tidying.add(task)
            task.add_done_callback(self._tidying.discard)
            raise

    async def _tidy(self, call: worker.Send | worker.Receive, role: Role) -> None:
        """Nobody can name a transfer whose opening was cancelled: give it up here."""
        name: dict[str, Any] = {
            "transfer_id": call.transfer_id,
            "attempt": call.attempt,
            "rank": call.rank,
        }
        try:
            await self.call(worker.Abort(role=role, reason="its opening was cancelled", **name))
            await self.call(worker.Release(role=role, **name))
        except FerryError as error:
            refused = (Code.CLIENT_CLOSED, Code.NOT_YOUR_TRANSFER)  # it was not opened, then
            if error.code not in refused and not nothing_left(error):
                raise


class _AsyncTransfer(Progress):
    """What both sides have in common."""

    def __init__(
        self, client: AsyncClient, logic: SendLogic | ReceiveLogic, reply: worker.Snapshots
    ) -> None:
        self.logic = logic
        self._client = client
        logic.note(reply)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        if kind is None:
            await self._leave()
            return
        try:
            await self.abort(f"{kind.__name__}: {error}")
        except FerryError as refused:
            if not nothing_left(refused):
                raise

    async def _leave(self) -> None:
        raise NotImplementedError

    async def _drive(self, steps: Generator[Any, Any, None]) -> None:
        await self._client.drive(steps, self.logic.pool)

    async def wait(self, wait_s: float = 60.0) -> None:
        """Wait for the end; FerryError if it failed, or after ``wait_s``."""
        try:
            async with asyncio.timeout(wait_s):
                await self._drive(self.logic.end())
        except TimeoutError:
            raise FerryError(
                Code.STALLED, f"not ended after {wait_s:g} s: {self.logic.now.stall}"
            ) from None

    async def release(self) -> None:
        """This worker touches no block of it any more."""
        await self._drive(self.logic.release())

    async def abort(self, reason: str = "") -> None:
        """Give it up."""
        await self._drive(self.logic.abort(reason))


class AsyncSending(_AsyncTransfer):
    """The source side of one attempt. Leaving its block finishes it; an exception aborts it."""

    logic: SendLogic

    async def _leave(self) -> None:
        if not self.logic.released:
            await self.finish()

    async def windows(self) -> AsyncIterator[WindowView]:
        """Yield the room behind what is ready, until the payload is complete: see ``Sending``."""
        while self.snapshot.available_tokens != self.snapshot.total_tokens:
            await self._drive(self.logic.room())
            if self.logic.ended:
                return
            yield self.logic.free_window()

    async def fill(
        self, first_token: int, arrays: dict[str, Any], aux: dict[str, Any] | None = None
    ) -> None:
        """Copy the next tokens in, (tokens, *shape) a plane, waiting for room: see ``Sending``."""
        await self._drive(self.logic.fill(first_token, arrays, aux))

    async def ready(
        self, ready_tokens: int, total_tokens: int | None = None, aux: dict[str, Any] | None = None
    ) -> None:
        """Tokens below ``ready_tokens`` are filled, and written no more."""
        await self._drive(self.logic.ready(ready_tokens, total_tokens, aux))

    async def finish(self, aux: dict[str, Any] | None = None) -> None:
        """The payload ends with what is ready; this worker touches its blocks no more."""
        await self._drive(self.logic.finish(aux))


class AsyncReceiving(_AsyncTransfer):
    """The sink side of one attempt. Leaving its block gives the blocks back."""

    logic: ReceiveLogic

    async def _leave(self) -> None:
        await self._drive(self.logic.leave())

    async def windows(self, min_tokens: int | None = None) -> AsyncIterator[WindowView]:
        """Yield windows to take over; asking for the next gives the one before back."""
        while True:
            await self._drive(self.logic.next_window(min_tokens))
            if self.logic.window is None:
                return
            yield self.logic.window

    async def resume(self, sent_tokens: int) -> None:
        """Tokens below ``sent_tokens`` are taken over."""
        await self._drive(self.logic.resume(sent_tokens))
