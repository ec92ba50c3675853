"""What many transfers are told at once, and each is told when its turn comes.

A worker that dies may leave 16,000 transfers behind, a link or a sleep may concern as many: to tell
them all takes a second. So a turn tells some. A transfer that something else reaches is told first
what it is owed: for itself, and for whoever acts on it, all were told at once. Who only looks at one
sees it as it was before, as if the news had come a moment later.
"""

from dataclasses import dataclass

from kvferry_daemon.core.events import Fail, Key, NewsLost, Slept, StreamDown, StreamUp

ONCE = (NewsLost, Fail)  # a second one says nothing to who has not heard the first


@dataclass(slots=True, eq=False)
class Loss:
    """A worker is lost to its transfers; each of them knows which ranks it was."""

    session: str
    dead: bool
    message: str
    untold: int


class Owed:
    """By transfer, in the order of coming."""

    def __init__(self) -> None:
        self._events: dict[Key, tuple[object, ...]] = {}

    def __len__(self) -> int:
        return len(self._events)

    def add(self, keys: dict[Key, None], event: object) -> None:
        """All of them are to be told. This is done within a turn: it looks at who is owed more only.

        A source can have us say some things again and again: those are owed once. So can its
        connections come and go: of one that went before it was told of nothing is said.
        """
        fresh: dict[Key, tuple[object, ...]] = dict.fromkeys(keys, (event,))
        undone = StreamUp(event.key) if isinstance(event, StreamDown) else None
        for key in self._events.keys() & keys.keys():
            owed = self._events[key]
            if undone in owed:
                fresh[key] = tuple([one for one in owed if one != undone])
            elif not _is_said(event, owed):
                fresh[key] = (*owed, event)
            else:
                fresh[key] = owed
        self._events |= fresh
        if undone is not None:
            for key in [key for key, owed in fresh.items() if not owed]:
                del self._events[key]

    def take(self, key: Key) -> tuple[object, ...]:
        """What a transfer has to hear now, oldest first.

        But first of all that we slept: whatever else it hears brings it the time, all of it.
        """
        owed = self._events.pop(key, ())
        return tuple(sorted(owed, key=_is_no_sleep)) if len(owed) > 1 else owed

    def is_lost(self, key: Key) -> bool:
        """Whether a transfer is still to hear that its worker is lost: it needs nothing any more."""
        return any(isinstance(event, Loss) for event in self._events.get(key, ()))

    def first(self, events: int) -> list[Key]:
        """Those who have waited longest, so many that they are owed as much as this."""
        found: list[Key] = []
        for key, owed in self._events.items():
            found.append(key)
            events -= len(owed)
            if events <= 0:
                break
        return found


def _is_said(event: object, owed: tuple[object, ...]) -> bool:
    return isinstance(event, ONCE) and any(type(one) is type(event) for one in owed)


def _is_no_sleep(event: object) -> bool:
    return not isinstance(event, Slept)
