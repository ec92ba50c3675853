"""The blocks that a transfer holds, for tokens [base_tokens, edge_tokens)."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from kvferry_daemon.core.allocator import Run
from kvferry_daemon.core.pool import Lease


class Place(NamedTuple):
    """Blocks in token order; the first one starts at ``base_tokens``."""

    base_tokens: int
    runs: tuple[Run, ...]


class Window:
    """Leases in token order. It only keeps the books; the pool does the granting.

    A group has as many blocks for each of its ranks: ``blocks`` and everything in tokens is what
    one rank has, leases are those of all, rank after rank.
    """

    def __init__(self, base_tokens: int, block_size_tokens: int, ranks: int = 1) -> None:
        assert base_tokens % block_size_tokens == 0, base_tokens  # I11
        self.base_tokens = base_tokens
        self.blocks = 0
        self._block_size_tokens = block_size_tokens
        self._ranks: list[deque[Lease]] = [deque() for _ in range(ranks)]

    @property
    def allocated_tokens(self) -> int:
        """Tokens that the blocks have room for; never the number that was asked for."""
        return self.blocks * self._block_size_tokens

    @property
    def edge_tokens(self) -> int:
        """First token that has no block yet."""
        return self.base_tokens + self.allocated_tokens

    @property
    def leases(self) -> tuple[Lease, ...]:
        """Every lease, in token order, one rank after the other."""
        return tuple([lease for rank in self._ranks for lease in rank])

    def add(self, leases: Iterable[Lease]) -> int:
        """Append blocks at the edge, the same number for each rank; return that number.

        No lease belongs to two ranks.
        """
        leases = tuple(leases)
        blocks = sum([lease.run.blocks for lease in leases]) // len(self._ranks)
        rest = iter(leases)
        for rank in self._ranks:
            got = 0
            while got < blocks:
                lease = next(rest)
                rank.append(lease)
                got += lease.run.blocks
            assert got == blocks, leases
        self.blocks += blocks
        return blocks

    def drop_to(self, base_tokens: int) -> list[Lease]:
        """Move the base up and return the leases (or their fronts) that lie below it now.

        A base beyond the edge drops everything; the next block added is then that base's.
        """
        assert base_tokens % self._block_size_tokens == 0, base_tokens  # I11
        assert base_tokens >= self.base_tokens, (base_tokens, self.base_tokens)
        drop = min((base_tokens - self.base_tokens) // self._block_size_tokens, self.blocks)
        self.base_tokens = base_tokens
        self.blocks -= drop
        return [lease for rank in self._ranks for lease in _fronts(rank, drop)]

    def cut_to(self, edge_tokens: int) -> tuple[Lease, ...]:
        """Give up the blocks at and behind ``edge_tokens``, rounded up to a block; return them."""
        size = self._block_size_tokens
        keep = max(0, -(-(edge_tokens - self.base_tokens) // size))
        cut = max(0, self.blocks - keep)
        self.blocks -= cut
        return tuple([lease for rank in self._ranks for lease in _tails(rank, cut)])

    def clear(self) -> tuple[Lease, ...]:
        """Give every lease up and return them all."""
        leases = self.leases
        for rank in self._ranks:
            rank.clear()
        self.blocks = 0
        return leases

    def runs(self, rank: int = 0) -> list[tuple[int, int]]:
        """A rank's blocks as (first_block, blocks) in token order, neighbours joined."""
        runs: list[tuple[int, int]] = []
        for lease in self._ranks[rank]:
            first, blocks = lease.run
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + blocks)
            else:
                runs.append((first, blocks))
        return runs

    def cover(self, first_token: int, tokens: int, rank: int = 0) -> Place:
        """A rank's blocks that hold [first_token, first_token + tokens), and where they start."""
        size = self._block_size_tokens
        assert self.base_tokens <= first_token, (self.base_tokens, first_token)
        assert first_token + tokens <= self.edge_tokens, (first_token, tokens, self.edge_tokens)
        skip = (first_token - self.base_tokens) // size
        need = -(-(first_token + tokens) // size) - first_token // size
        place = first_token // size * size
        runs: list[Run] = []
        for lease in self._ranks[rank]:
            first, blocks = lease.run
            if skip >= blocks:
                skip -= blocks
                continue
            take = min(blocks - skip, need)
            runs.append(Run(first + skip, take))
            skip, need = 0, need - take
            if not need:
                break
        return Place(place, tuple(runs))


def _fronts(leases: deque[Lease], drop: int) -> Iterable[Lease]:
    """Take the first blocks out of one rank's leases."""
    while drop:
        lease = leases.popleft()
        first, blocks = lease.run
        if blocks > drop:
            leases.appendleft(lease._replace(run=Run(first + drop, blocks - drop)))
            lease = lease._replace(run=Run(first, drop))
        drop -= lease.run.blocks
        yield lease


def _tails(leases: deque[Lease], cut: int) -> Iterable[Lease]:
    """Take the last blocks out of one rank's leases."""
    while cut:
        lease = leases.pop()
        first, blocks = lease.run
        if blocks > cut:
            leases.append(lease._replace(run=Run(first, blocks - cut)))
            lease = lease._replace(run=Run(first + blocks - cut, cut))
        cut -= lease.run.blocks
        yield lease
