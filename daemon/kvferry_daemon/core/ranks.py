"""The workers of one side of a transfer: one, or the ranks of a group. Only books are kept here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvferry_daemon.core.records import RankRecord

NEVER = -1
FOREVER = 1 << 63  # of a rank that has no more to do with it


@dataclass(slots=True)
class Rank:
    """One worker of a group, as far as the transfer has heard of it."""

    session: str = ""  # has not come yet
    level_tokens: int = 0  # source: ready up to here; sink: the offset of its last resume
    released: bool = False  # touches no block any more, or is dead
    acted_at: int = NEVER  # the newest snapshot number that it has acted on
    total_tokens: int | None = None  # what it said itself


class Ranks:
    """All of them; a worker that is in no group is rank 0 of 1."""

    __slots__ = ("_missing", "_ranks", "size")

    def __init__(self, size: int, level_tokens: int) -> None:
        self.size = size
        self._ranks = [Rank(level_tokens=level_tokens) for _ in range(size)]
        self._missing = size

    def __getitem__(self, rank: int) -> Rank:
        return self._ranks[rank]

    @property
    def missing(self) -> list[int]:
        """Ranks that nobody has opened yet."""
        if not self._missing:
            return []
        return [number for number, rank in enumerate(self._ranks) if not rank.session]

    @property
    def complete(self) -> bool:
        """Whether all have come."""
        return not self._missing

    @property
    def sessions(self) -> tuple[str, ...]:
        """Whose each rank is; empty for one that has not come."""
        return tuple([rank.session for rank in self._ranks])

    @property
    def released(self) -> bool:
        """Whether none of them touches a block any more."""
        if self.size == 1:
            rank = self._ranks[0]
            return rank.released or not rank.session
        return all(rank.released or not rank.session for rank in self._ranks)

    @property
    def lowest_tokens(self) -> int:
        """The level that all have reached."""
        if self.size == 1:
            return self._ranks[0].level_tokens
        return min(self.levels)

    @property
    def levels(self) -> list[int]:
        """How far each is."""
        return [rank.level_tokens for rank in self._ranks]

    @property
    def know_total(self) -> bool:
        """Whether each has said itself where the payload ends, or will write no more."""
        if self.size == 1:
            one = self._ranks[0]
            return one.total_tokens is not None or one.released
        return all(one.total_tokens is not None or one.released for one in self._ranks)

    def is_of(self, number: int, session: str) -> bool:
        """Whether a rank is a session's."""
        return number < self.size and self._ranks[number].session == session

    def of(self, session: str) -> list[int]:
        """The ranks of a session."""
        return [number for number, rank in enumerate(self._ranks) if rank.session == session]

    def join(self, number: int, session: str) -> None:
        """A rank has come."""
        if not self._ranks[number].session:
            self._missing -= 1
        self._ranks[number].session = session

    def let_go(self, number: int) -> None:
        """This one touches no block any more, and nobody waits for it."""
        self._ranks[number].released = True
        self._ranks[number].acted_at = FOREVER

    def have_acted(self, snapshot: int) -> bool:
        """Whether all that are here have acted on a snapshot."""
        return all(rank.acted_at >= snapshot or not rank.session for rank in self._ranks)

    @property
    def mark(self) -> tuple[object, ...]:
        """What must last, cheap to compare."""
        if self.size == 1:
            rank = self._ranks[0]
            return rank.released, rank.level_tokens
        return tuple([(r.session, r.released, r.level_tokens, r.total_tokens) for r in self._ranks])

    def rows(self) -> list[dict[str, Any]]:
        """The same as fields of records."""
        return [
            {
                "session": rank.session,
                "released": rank.released,
                "level_tokens": rank.level_tokens,
                "total_tokens": rank.total_tokens,
            }
            for rank in self._ranks
        ]

    def take_up(self, records: Sequence[RankRecord]) -> None:
        """Go on where an earlier life of the daemon was; ValueError if that is another group's."""
        if len(records) != self.size:
            raise ValueError(f"{len(records)} ranks of {self.size}")
        for number, record in enumerate(records):
            if record.session:
                self.join(number, record.session)
            rank = self._ranks[number]
            rank.level_tokens, rank.total_tokens = record.level_tokens, record.total_tokens
            if record.released:
                self.let_go(number)
