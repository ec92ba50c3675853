"""The contract for engines: page tables in, windows out.

An engine keeps the KV cache in pages of its own and finds a request's through a block table. A
``Ferry`` stands beside one engine worker, in a thread of its own, so that no step of the engine
ever waits for a daemon. Prefill opens a ``send`` and says after each step how many tokens are
computed; decode opens a ``receive`` and looks whether it has ended. Either may free or use its
pages as soon as ``ended`` is true, and must not before.

Not imported by ``kvferry_client`` itself: it needs torch.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from kvferry_client.aio import AsyncClient
from kvferry_client.engine_pages import NO_BLOCK, Pages, Tables
from kvferry_client.engine_sides import Incoming, Outgoing, Side, typed
from kvferry_client.paged import CachePlane, PagedCache
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Dtype, Layout, Order, Plane

__all__ = ["NO_BLOCK", "Ferry", "Incoming", "Outgoing", "Side", "Tables", "layout_of"]

JOIN_AGAIN_S = 1.0
JOIN_WAIT_S = 10.0  # how long a transfer waits for a daemon that has not been met yet
logger = logging.getLogger(__name__)


def layout_of(
    groups: Sequence[Mapping[str, CachePlane]],
    *,
    heads_total: Mapping[str, int] | None = None,
    block_size_tokens: int = 128,
) -> Layout:
    """The layout that carries the planes of an engine's caches, in their order.

    ``heads_total``: of planes whose first axis are heads, how many there are over all ranks.
    ``block_size_tokens``: of the daemon's pool; the engine's own block size may be any other.
    """
    totals = heads_total or {}
    planes = []
    for name, (tensor, order) in ((name, one) for group in groups for name, one in group.items()):
        shape = list(tensor.shape[1:])
        del shape[1 if order is Order.HND else 0]  # the tokens of a block
        planes.append(
            Plane(
                name=name,
                dtype=Dtype(str(tensor.dtype).removeprefix("torch.")),
                shape=tuple(shape),
                heads_total=totals.get(name),
                order=order,
            )
        )
    return Layout(planes=tuple(planes), block_size_tokens=block_size_tokens)


class Ferry:
    """One engine worker's thread for moving pages. Its methods return at once, from any thread."""

    def __init__(
        self,
        runtime_dir: Path | str,
        layout: Layout,
        caches: Sequence[PagedCache],
        *,
        name: str = "",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Begin to join the daemon of a runtime directory; it may come later.

        ``caches``: one for each kind of block table that the engine has, one mostly. ``rank`` of
        ``world_size``: which worker this is of a tensor-parallel group.
        """
        self._arguments = (Path(runtime_dir), layout, name)
        self._pages = Pages(caches, layout.block_size_tokens, rank, world_size)
        self._client: AsyncClient | None = None
        self._refusal: FerryError | None = None
        self._tasks: dict[Side, asyncio.Task[None]] = {}
        self._met = threading.Event()
        self._closing, self._closed = threading.Lock(), False
        self._loop = asyncio.new_event_loop()
        self._joined, self._stopped = asyncio.Event(), asyncio.Event()
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

    def send(self, transfer_id: str, *, total_tokens: int, attempt: int = 0) -> Outgoing:
        """Send a request's pages as they are computed: see ``Outgoing.computed``."""
        side = Outgoing(self._pages, transfer_id, attempt, total_tokens)
        self._start(side)
        return side

    def receive(
        self,
        transfer_id: str,
        *,
        source: str | None,
        tables: Tables,
        first_token: int,
        end_token: int,
        attempt: int = 0,
    ) -> Incoming:
        """Fetch tokens [first_token, end_token) of a payload of ``end_token`` into an engine's pages.

        No other token is written, so that pages may be shared below ``first_token``. None at all
        tells the source that nobody will fetch what it holds.
        """
        tokens = range(first_token, end_token)
        side = Incoming(self._pages, transfer_id, attempt, source, tables, tokens)
        self._start(side)
        return side

    def close(self) -> None:
        """Abort what is under way and leave the daemon. No page is touched afterwards."""
        self._tell(self._stopped.set, last=True)
        self._thread.join()

    def _tell(self, call: Callable[[], object], *, last: bool = False) -> bool:
        """Have something done in the thread, in the order of telling; False once it is closed."""
        with self._closing:
            if self._closed:
                return False
            self._closed = last
            self._loop.call_soon_threadsafe(call)
        return True

    def _start(self, side: Side) -> None:
        side.tell = self._tell
        if not self._tell(lambda: self._spawn(side)):
            side.end(FerryError(Code.CLIENT_CLOSED, "the ferry is closed"))

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
            joining = self._loop.create_task(self._join(stack))
            await self._stopped.wait()
            self._pages.are_left = True
            tasks = [joining, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _join(self, stack: AsyncExitStack) -> None:
        """Join the daemon, however long it takes to come; say so once for each reason."""
        while True:
            try:
                self._client = await stack.enter_async_context(AsyncClient(*self._arguments))
            except Exception as error:  # of any kind: nobody else would ever join
                refusal = typed(error)
                if self._refusal is None or self._refusal.code != refusal.code:
                    words = "kvferry's daemon is not joined yet; trying on: %s"
                    logger.warning(words, refusal, exc_info=refusal.code is Code.INTERNAL)
                self._refusal = refusal
                await asyncio.sleep(JOIN_AGAIN_S)
            else:
                self._refusal = None
                self._joined.set()
                self._met.set()
                return

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
        try:
            async with asyncio.timeout(JOIN_WAIT_S):
                await self._joined.wait()
        except TimeoutError:
            where = self._arguments[0]
            raise self._refusal or FerryError(
                Code.DAEMON_UNREACHABLE, f"no daemon has answered in {where}"
            ) from None
        assert self._client is not None
        return self._client
