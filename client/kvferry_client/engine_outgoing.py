"""The prefill side of a transfer between an engine's pages and windows: see ``engine``. Needs torch."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from kvferry_client.aio import AsyncClient, AsyncSending
from kvferry_client.engine_pages import Pages, Tables
from kvferry_client.engine_sides import PIECE_TOKENS, Identity, Side
from kvferry_client.views import Pool, WindowView
from kvferry_proto.errors import Code, FerryError


class ForwardPass:
    """One pass of an engine through its layers, and which planes are written in it so far."""

    def __init__(self, pages: Pages, tell: Callable[[Callable[[], object]], object]) -> None:
        self.events: dict[str, Any] = {}  # by plane: the GPU's work on it
        self._pages = pages
        self._tell = tell
        self._news: list[asyncio.Event] = []

    def serves(self, news: asyncio.Event) -> None:
        """Wake this one after each plane."""
        self._news.append(news)

    def plane_computed(self, plane: str) -> None:
        """All tokens of the pass are written into a plane, once the GPU has done what it was given.

        To be said once for a plane, and not while a part of the pass's tokens is still to come.
        """
        if self._news and plane in self._pages.planes:
            self.events[plane] = self._pages.event()
            self._tell(self._wake)

    def _wake(self) -> None:
        for news in self._news:
            news.set()


class _Have(NamedTuple):
    """Where an engine's tokens lie, and how many are computed; ``event``: the GPU's work on them."""

    tables: Tables
    tokens: int
    event: Any
    coming_tokens: int  # these as well, but only in the planes that ``under_way`` names
    under_way: ForwardPass | None


class _Piece:
    """Tokens that are being copied, and the planes that are not yet."""

    def __init__(self, tokens: range, planes: frozenset[str]) -> None:
        self.tokens = tokens
        self.left = set(planes)


class Outgoing(Side):
    """The prefill side: ``ended`` once every token was copied into a window, long before it arrived.

    From then on the payload is the daemon's: its lease and deadlines hold, and the engine's pages
    are free whatever becomes of decode.
    """

    def __init__(
        self,
        pages: Pages,
        transfer_id: str,
        attempt: int,
        identity: Identity,
        total_tokens: int | None,
    ) -> None:
        super().__init__(pages, transfer_id, attempt, identity)
        self.total_tokens = total_tokens
        self.copied_tokens = 0
        self.early_planes = 0  # how often one was copied before its pass was over
        self._pages = pages
        self._have: _Have | None = None
        self._values: dict[str, Any] | None = None  # told with the last tokens
        self._piece: _Piece | None = None
        self._news = asyncio.Event()
        self._copying = threading.Lock()

    def computed(
        self,
        tables: Tables,
        tokens: int,
        *,
        are_all: bool = False,
        aux: dict[str, Any] | None = None,
        after: Any = None,
    ) -> None:
        """Tokens below ``tokens`` lie in these pages, once the GPU has done what it was given.

        Entries of pages that are gone are ``NO_BLOCK``: those tokens travel as they are, unread.
        ``are_all``: the payload ends with these, of which some are new. ``aux``: its values, no
        later than then. ``after``: a CUDA event, if it is not this thread's stream that writes.
        """
        if aux is not None:
            self._values = aux  # first: who sees the total takes these
        if are_all:
            self.total_tokens = tokens
        tokens = self._within(tokens)
        event = self._pages.event() if after is None else after
        self._have = _Have(tables, tokens, event, tokens, None)
        self.tell(self._news.set)

    def _within(self, tokens: int) -> int:
        return tokens if self.total_tokens is None else min(tokens, self.total_tokens)

    def computing(
        self, tables: Tables, computed_tokens: int, tokens: int, under_way: ForwardPass
    ) -> None:
        """A pass begins that computes tokens [computed_tokens, tokens), plane by plane.

        Those before lie in these pages already. ``computed`` is said all the same when it is over.
        """
        computed_tokens, tokens = self._within(computed_tokens), self._within(tokens)
        under_way.serves(self._news)
        self._have = _Have(tables, computed_tokens, self._pages.event(), tokens, under_way)
        self.tell(self._news.set)

    def forget(self) -> None:
        """The pages are about to be another's: a preempted request's. Waits for a copy under way.

        What was copied stays; the rest comes when it has been ``computed`` again.
        """
        self._have = None
        with self._copying:
            self._piece = None
            self._pages.settle()

    async def move(self, client: AsyncClient) -> None:
        """Fill windows until the payload is complete."""
        sending = await self._send(
            client,
            total_tokens=self.total_tokens,
            aux=self._aux,
            traceparent=self.traceparent,
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
                if end is None:
                    await self._news.wait()
                    self._news.clear()
                else:
                    await asyncio.sleep(0)  # others of the same pass have planes to copy, too
            total = self.total_tokens
            await sending.ready(end, total, self._values if end == total else None)
            self.copied_tokens = end

    def _copy(self, window: WindowView, pool: Pool) -> int | None:
        """Copy some of what is computed and fits, without waiting.

        Up to which token all planes are copied; 0 if some are left; None if there is nothing new.
        """
        with self._copying:
            have = self._have
            if have is None:
                return None
            self._piece = piece = self._piece or self._next_piece(have, window)
            if piece is None:
                return None
            if len(piece.left) == len(self._pages.planes) and piece.tokens.stop <= have.tokens:
                return self._copy_whole(piece.tokens[:PIECE_TOKENS], have, window, pool)
            if not self._copy_plane(piece, have, window, pool):
                return None
            if piece.left:
                return 0
            self._piece = None
            return piece.tokens.stop

    def _copy_whole(self, tokens: range, have: _Have, window: WindowView, pool: Pool) -> int:
        """All planes of them. Few enough at once: `forget` waits for it."""
        self._pages.follow(have.event)
        self._pages.copy(have.tables, window, pool, tokens, out=True)
        self._piece = None
        return tokens.stop

    def _next_piece(self, have: _Have, window: WindowView) -> _Piece | None:
        first = window.first_token
        if have.tokens > first:
            end = min(have.tokens, window.end_token, first + PIECE_TOKENS)
        else:
            end = min(have.coming_tokens, window.end_token)
        return _Piece(range(first, end), self._pages.planes) if end > first else None

    def _copy_plane(self, piece: _Piece, have: _Have, window: WindowView, pool: Pool) -> bool:
        """Copy one plane of a piece, if there is one that has all of its tokens."""
        events: dict[str, Any] = dict.fromkeys(piece.left, have.event)
        if piece.tokens.stop > have.tokens:
            assert have.under_way is not None
            events = have.under_way.events.copy()  # in one step: the engine adds to it
        plane = next((name for name in events if name in piece.left), None)
        if plane is None:
            return False
        self.early_planes += piece.tokens.stop > have.tokens
        self._pages.follow(events[plane])
        self._pages.copy_plane_out(plane, have.tables, window, pool, piece.tokens)
        piece.left.discard(plane)
        return True


class Withdrawn(Side):
    """Tells a decode that waits for it that nothing will come: opened, to fail at once."""

    async def move(self, client: AsyncClient) -> None:
        """Open it and give it up."""
        sending = await self._send(client, self.reason)
        self.end(FerryError(Code.ABORTED, self.reason))
        await self._let_go(sending)
