"""The thread that stands beside an engine: it joins the daemon, and moves one transfer or many.

No step of the engine ever waits for a daemon. What is moved is a ``Side``: see ``engine`` for pages
of a KV cache, and ``engine_embeddings`` for tensors. Needs torch.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from kvferry_client.aio import AsyncClient
from kvferry_client.engine_leftovers import Leftovers
from kvferry_client.engine_pages import Memory
from kvferry_client.engine_sides import Side, typed
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout

JOIN_AGAIN_S = 1.0
JOIN_WAIT_S = 10.0  # how long a transfer waits for a daemon that has not been met yet
# What a daemon answers and will answer again: we try on, but no transfer waits for that. Not so a refused
# pool: others may give back what is in the way, and a daemon with larger pools may be on its way.
LASTING = (Code.NO_COMMON_VERSION, Code.BAD_MESSAGE)
logger = logging.getLogger(__name__)


class FerryThread:
    """One engine worker's thread for moving bytes. Its methods return at once, from any thread."""

    def __init__(self, runtime_dir: Path | str, layout: Layout, name: str, memory: Memory) -> None:
        """Begin to join the daemon of a runtime directory; it may come later."""
        self._arguments = (Path(runtime_dir), layout, name)
        self._memory = memory
        self._client: AsyncClient | None = None
        self._refusal: FerryError | None = None
        self._tasks: dict[Side, asyncio.Task[None]] = {}
        self._leftovers = Leftovers()
        self._met = threading.Event()
        self._closing, self._closed = threading.Lock(), False
        self._loop = asyncio.new_event_loop()
        self._answered, self._stopped = asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="kvferry-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def wait_until_joined(self, wait_s: float) -> bool:
        """Wait for the daemon; whether it was met."""
        return self._met.wait(wait_s)

    @property
    def peer_address(self) -> str | None:
        """What a sink elsewhere gives as ``source`` to receive from here; None before the join."""
        return self._client.welcome.peer_address if self._client and self._met.is_set() else None

    @property
    def refusal(self) -> FerryError | None:
        """Why the daemon has not been joined yet, as of the newest try."""
        return self._refusal

    def start(self, side: Side) -> None:
        """Begin to move one transfer."""
        side.tell, side.leave = self.tell, self._leftovers.add
        if not self.tell(lambda: self._spawn(side)):
            side.end(FerryError(Code.CLIENT_CLOSED, "the ferry is closed"))

    def tell(self, call: Callable[[], object], *, last: bool = False) -> bool:
        """Have something done in the thread, in the order of telling; False once it is closed."""
        with self._closing:
            if self._closed:
                return False
            self._closed = last
            self._loop.call_soon_threadsafe(call)
        return True

    def close(self) -> None:
        """Abort what is under way and leave the daemon. No memory is touched afterwards."""
        self.tell(self._stopped.set, last=True)
        self._thread.join()

    def _spawn(self, side: Side) -> None:
        self._tasks[side] = side.task = task = self._loop.create_task(self._carry(side))
        task.add_done_callback(lambda _: self._over(side))

    def _over(self, side: Side) -> None:
        del self._tasks[side]
        side.end(asyncio.CancelledError())  # of one that was aborted before it began

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        async with AsyncExitStack() as stack:
            standing_by = self._loop.create_task(self._stand_by(stack))
            await self._stopped.wait()
            self._memory.is_left = True
            tasks = [standing_by, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stand_by(self, stack: AsyncExitStack) -> None:
        """Join the daemon, and tell it from then on what it did not hear."""
        await self._leftovers.tell(await self._join(stack))

    async def _join(self, stack: AsyncExitStack) -> AsyncClient:
        """Join the daemon, however long it takes to come; say so once for each reason."""
        while True:
            try:
                client = await stack.enter_async_context(AsyncClient(*self._arguments))
            except Exception as error:  # of any kind: nobody else would ever join
                refusal = typed(error)
                if self._refusal is None or self._refusal.code != refusal.code:
                    words = "kvferry's daemon is not joined yet; trying on: %s"
                    logger.warning(words, refusal, exc_info=refusal.code is Code.INTERNAL)
                self._refusal = refusal
                if refusal.code in LASTING:
                    self._answered.set()
                else:
                    self._answered.clear()
                await asyncio.sleep(JOIN_AGAIN_S)
            else:
                self._client, self._refusal = client, None
                self._answered.set()
                self._met.set()
                return client

    async def _carry(self, side: Side) -> None:
        """Move one transfer. Whatever becomes of it, the side ends, and the thread lives on."""
        try:
            await side.move(await self._the_client())
        except FerryError as error:
            side.end(error)
        except Exception as error:
            logger.exception("transfer %s, attempt %d", side.transfer_id, side.attempt)
            side.end(error)

    async def _the_client(self) -> AsyncClient:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(JOIN_WAIT_S):
                await self._answered.wait()
        if self._client is None:
            where = self._arguments[0]
            raise self._refusal or FerryError(
                Code.DAEMON_UNREACHABLE, f"no daemon has answered in {where}"
            )
        return self._client
