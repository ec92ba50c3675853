"""The asyncio client: the same logic, awaited. Calls run on threads of their own.

A call blocks in ZeroMQ, so each goes to a small pool of threads with a connection each; a poll that
waits then holds up nobody else, and nothing of the protocol exists twice.
"""

import asyncio
import queue
from collections.abc import AsyncIterator, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from kvferry_client.connection import CALL_S, Connection
from kvferry_client.logic import ReceiveLogic, SendLogic, restarted
from kvferry_client.sync import Client
from kvferry_client.views import WindowView
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout

CONNECTIONS_MAX = 8  # calls under way at once; more wait for one of these


class AsyncClient:
    """One worker on an event loop. Use as an async context manager."""

    def __init__(self, runtime_dir: Path | str, layout: Layout, name: str = "") -> None:
        self._arguments = (Path(runtime_dir), layout, name)
        self._threads = ThreadPoolExecutor(CONNECTIONS_MAX, "kvferry-call")
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._client: Client | None = None

    async def __aenter__(self) -> Self:
        """Join the daemon; FerryError if it refuses or is not there."""
        self._client = await self._off_loop(lambda: Client(*self._arguments))
        for _ in range(CONNECTIONS_MAX):
            self._idle.put(self.sync.another_connection())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._off_loop(self._close)
        self._threads.shutdown(wait=False)

    def _close(self) -> None:
        for _ in range(CONNECTIONS_MAX):
            self._idle.get().close()
        self.sync.close()

    @property
    def sync(self) -> Client:
        """The blocking client underneath: its pool and welcome."""
        assert self._client is not None, "use `async with`"
        return self._client

    async def _off_loop(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def call(self, call: Any, wait_s: float = CALL_S) -> Any:
        """Make any call of the worker socket; FerryError if it is refused or unanswered."""

        def work() -> Any:
            connection = self._idle.get()
            try:
                return connection.call(call, wait_s)
            except FerryError as error:
                self.sync.note(error)
                raise
            finally:
                self._idle.put(connection)

        return await self._off_loop(work)

    async def drive(self, steps: Generator[Any, Any, None]) -> None:
        """Run logic to its end."""
        try:
            call = next(steps)
            while True:
                call = steps.send(await self.call(call))
        except StopIteration:
            return

    async def poll(self, *transfers: worker.Watched, wait_s: float = 0.0) -> worker.Snapshots:
        """Snapshots of transfers whose number is above ``after``; waits for one if told to."""
        reply = await self.call(worker.Poll(transfers=list(transfers), wait_s=wait_s))
        assert isinstance(reply, worker.Snapshots), reply
        return reply

    async def send(self, call: worker.Send) -> "AsyncSending":
        """Open the source side; FerryError if it is refused."""
        logic = SendLogic(self.sync.pool, call.transfer_id, call.attempt)
        await self.drive(logic.ask(call))
        return AsyncSending(self, logic)

    async def receive(self, call: worker.Receive) -> "AsyncReceiving":
        """Open the sink side; FerryError if it is refused."""
        logic = ReceiveLogic(self.sync.pool, call.transfer_id, call.attempt)
        logic.taken_tokens = call.start_tokens
        await self.drive(logic.ask(call))
        return AsyncReceiving(self, logic)


class _AsyncTransfer:
    """What both sides have in common."""

    logic: SendLogic | ReceiveLogic

    def __init__(self, client: AsyncClient) -> None:
        self._drive = client.drive

    async def __aenter__(self) -> Self:
        return self

    @property
    def snapshot(self) -> worker.Snapshot:
        """The newest snapshot."""
        return self.logic.now

    async def wait(self, wait_s: float = 60.0) -> None:
        """Wait for the end; FerryError if it failed, or after ``wait_s``."""
        try:
            async with asyncio.timeout(wait_s):
                await self._drive(self.logic.end())
        except TimeoutError:
            raise FerryError(Code.STALLED, f"not ended after {wait_s:g} s") from None

    async def abort(self, reason: str = "") -> None:
        """Give it up."""
        await self._drive(self.logic.abort(reason))

    async def _give_up(self, error: BaseException | None) -> None:
        try:
            await self.abort(f"{type(error).__name__}: {error}")
        except FerryError as refusal:
            if not restarted(refusal):
                raise


class AsyncSending(_AsyncTransfer):
    """The source side of one attempt. Leaving its block finishes it; an exception aborts it."""

    def __init__(self, client: AsyncClient, logic: SendLogic) -> None:
        super().__init__(client)
        self.logic: SendLogic = logic

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        if error is not None:
            await self._give_up(error)
        elif not self.logic.released:
            await self.finish()

    async def fill(
        self, first_token: int, arrays: dict[str, NDArray[Any]], aux: dict[str, Any] | None = None
    ) -> None:
        """Copy the next tokens in, (tokens, *shape) a plane, waiting for room."""
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

    def __init__(self, client: AsyncClient, logic: ReceiveLogic) -> None:
        super().__init__(client)
        self.logic: ReceiveLogic = logic

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        if error is None:
            await self._drive(self.logic.leave())
        else:
            await self._give_up(error)

    async def windows(self, min_tokens: int | None = None) -> AsyncIterator[WindowView]:
        """Yield windows to take over; asking for the next gives the one before back."""
        while True:
            await self._drive(self.logic.next_window(min_tokens))
            if self.logic.window is None:
                return
            yield self.logic.window
