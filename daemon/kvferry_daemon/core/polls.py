"""Polls that wait for a change."""

from dataclasses import dataclass

from kvferry_daemon.core.events import Key
from kvferry_proto.errors import exhausted

WAITING_MAX = 1 << 14


@dataclass(slots=True)
class WaitingPoll:
    """An answer is due at ``until_s``, or once a key's snapshot is above its number.

    ``after``: by transfer and rank.
    """

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

    def __len__(self) -> int:
        return len(self._polls)

    def add(self, poll: WaitingPoll) -> int:
        """Let a poll wait; FerryError(resource_exhausted) when too many do."""
        if len(self._polls) >= WAITING_MAX:
            raise exhausted(f"{WAITING_MAX} polls are waiting already")
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

    def _take(self, number: int) -> WaitingPoll:
        poll = self._polls.pop(number)
        for key in {key for key, _ in poll.after}:
            numbers = self._by_key[key]
            numbers.pop(number, None)
            if not numbers:
                del self._by_key[key]
        return poll
