"""Polls that wait for a change."""

from collections import Counter
from dataclasses import dataclass

from kvferry_daemon.core.events import Key
from kvferry_proto.errors import exhausted

WAITING_MAX = 1 << 14
WATCHED_MAX = 1 << 17  # transfers that they wait for, some 700 bytes each
WATCHED_OF_ONE_MAX = 1 << 15  # of one worker: eight polls of the largest


@dataclass(slots=True)
class WaitingPoll:
    """An answer is due at ``until_s``, or once a key's snapshot is above its number.

    ``after``: by transfer and rank.
    """

    session: str
    route: bytes
    call: int
    after: dict[tuple[Key, int], int]
    until_s: float


class Polls:
    """Finds the polls that wait for a key at the cost of those polls alone."""

    def __init__(self) -> None:
        self._polls: dict[int, WaitingPoll] = {}
        self._by_key: dict[Key, dict[int, int]] = {}  # number -> the lowest snapshot it is after
        self._next = 0
        self._watched: Counter[str] = Counter()  # by session: how many transfers its polls name
        self._watched_by_all = 0

    def __len__(self) -> int:
        return len(self._polls)

    def add(self, poll: WaitingPoll) -> int:
        """Let a poll wait; FerryError(resource_exhausted) when too many do."""
        if len(self._polls) >= WAITING_MAX:
            raise exhausted(f"{WAITING_MAX} polls are waiting already")
        if self._watched[poll.session] + len(poll.after) > WATCHED_OF_ONE_MAX:
            raise exhausted(f"this worker's polls wait for {WATCHED_OF_ONE_MAX} transfers at most")
        if self._watched_by_all + len(poll.after) > WATCHED_MAX:
            raise exhausted(f"polls wait for {WATCHED_MAX} transfers at most")
        self._count(poll, len(poll.after))
        self._next += 1
        self._polls[self._next] = poll
        for (key, _), after in poll.after.items():
            numbers = self._by_key.setdefault(key, {})
            numbers[self._next] = min(after, numbers.get(self._next, after))
        return self._next

    def take_changed(self, key: Key, snapshot: int) -> list[tuple[int, WaitingPoll]]:
        """Take out the polls, with their numbers, that a change of this key answers."""
        numbers = self._by_key.get(key)
        if not numbers:
            return []
        due = [number for number, after in numbers.items() if snapshot > after]
        return [(number, self._take(number)) for number in due]

    def take_expired(self, number: int, now_s: float) -> WaitingPoll | None:
        """Take a poll out if its time is up."""
        poll = self._polls.get(number)
        if poll is None or poll.until_s > now_s:
            return None
        return self._take(number)

    def _count(self, poll: WaitingPoll, watched: int) -> None:
        self._watched_by_all += watched
        self._watched[poll.session] += watched
        if not self._watched[poll.session]:
            del self._watched[poll.session]

    def _take(self, number: int) -> WaitingPoll:
        poll = self._polls.pop(number)
        self._count(poll, -len(poll.after))
        for key in {key for key, _ in poll.after}:
            numbers = self._by_key[key]
            numbers.pop(number, None)
            if not numbers:
                del self._by_key[key]
        return poll
