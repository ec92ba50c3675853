"""An engine's pages, and the copies between them and the daemon's pool: see ``engine``. Needs torch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from kvferry_client.paged import BlockTable, PagedCache, PagedCopy, PagedPool
from kvferry_client.views import Pool, WindowView
from kvferry_proto.errors import Code, FerryError

NO_BLOCK = -1  # in a block table: the engine keeps nothing of these tokens
Tables = Sequence[BlockTable]  # one for each cache of the engine


class Memory:
    """What one engine worker shows a ferry: on which device it lies, and which worker it is."""

    def __init__(self, device: torch.device, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.is_left = False  # the ferry closes: by leaving it says all that a daemon has to know
        self._device = device

    def event(self) -> Any:
        """What the calling thread's GPU stream has been given so far; None in host memory."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_stream(self._device).record_event()

    def follow(self, event: Any) -> None:
        """Let what this thread gives its GPU stream come after an event."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def settle(self) -> None:
        """Wait until no copy is under way on a GPU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Pages(Memory):
    """The caches of one engine worker."""

    def __init__(
        self, caches: Sequence[PagedCache], pool_block_tokens: int, rank: int, world_size: int
    ) -> None:
        super().__init__(caches[0].device, rank, world_size)
        self.pool_block_tokens = pool_block_tokens
        self.planes = frozenset(name for cache in caches for name in cache.planes)
        self._caches = list(caches)
        self._built: tuple[Pool, list[PagedCopy]] | None = None
        self._built_planes: tuple[Pool, dict[str, tuple[int, PagedCopy]]] | None = None

    def copy(
        self, tables: Tables, window: WindowView, pool: Pool, tokens: range, *, out: bool
    ) -> None:
        """Copy tokens out of the pages into a window, or the other way."""
        for cache, copy, table in zip(self._caches, self._copies(pool), tables, strict=True):
            for span in _kept(table, cache.block_size_tokens, tokens):
                move = copy.gather if out else copy.scatter
                move(table, window, span.start, len(span))

    def copy_plane_out(
        self, plane: str, tables: Tables, window: WindowView, pool: Pool, tokens: range
    ) -> None:
        """Copy tokens of one plane out of the pages into a window."""
        index, copy = self._plane_copies(pool)[plane]
        for span in _kept(tables[index], self._caches[index].block_size_tokens, tokens):
            copy.gather(tables[index], window, span.start, len(span))

    def _copies(self, pool: Pool) -> list[PagedCopy]:
        """Built once for a pool; another life of the daemon may bring another."""
        if self._built is None or self._built[0] is not pool:
            paged = PagedPool(pool.torch_blocks(), pool.layout)
            self._built = pool, [PagedCopy(cache, paged) for cache in self._caches]
        return self._built[1]

    def _plane_copies(self, pool: Pool) -> dict[str, tuple[int, PagedCopy]]:
        """The same of each plane alone, and of which cache it is."""
        if self._built_planes is None or self._built_planes[0] is not pool:
            paged = PagedPool(pool.torch_blocks(), pool.layout)
            self._built_planes = (
                pool,
                {
                    name: (index, PagedCopy(cache.only(name), paged))
                    for index, cache in enumerate(self._caches)
                    for name in cache.planes
                },
            )
        return self._built_planes[1]


def _kept(table: BlockTable, size: int, tokens: range) -> Iterator[range]:
    """The parts of ``tokens`` that a table has blocks for, as few as can be."""
    first, end = tokens.start // size, -(-tokens.stop // size)
    entries = np.asarray(table[first:end])
    if len(entries) < end - first:  # they are not gone: nothing is said of them
        raise FerryError(
            Code.BAD_BLOCK_TABLE,
            f"a block table of {len(table)} entries, {end} are needed for {tokens.stop} tokens",
        )
    edges = np.flatnonzero(np.diff(np.concatenate([[False], entries != NO_BLOCK, [False]])))
    for low, high in edges.reshape(-1, 2).tolist():
        yield range(
            max(tokens.start, (first + low) * size), min(tokens.stop, (first + high) * size)
        )
