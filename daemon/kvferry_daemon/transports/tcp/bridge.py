"""Carries events from threads to the event loop, many for one wake-up."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Event = TypeVar("Event")
EVENTS_A_TURN = 64  # then the loop's other callbacks get their turn


class LoopBridge(Generic[Event]):
    """``post`` from any thread; ``handle`` is called on the loop, in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, handle: Callable[[Event], None]) -> None:
        self._loop = loop
        self._handle = handle
        self._events: deque[Event] = deque()
        self._woken = False

    def post(self, event: Event) -> None:
        """Queue an event; wakes the loop only if it is not awake for this already."""
        self._events.append(event)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop is closed: the daemon is gone, nobody listens
                self._events.clear()

    def catch_up(self) -> None:
        """On the loop: handle what was posted by now, before what comes from whoever knows of it."""
        if self._events:
            self._drain()

    def _drain(self) -> None:
        self._woken = False  # before the look: an event posted from here on wakes again
        try:
            for _ in range(EVENTS_A_TURN):
                if not self._events:
                    return
                self._handle(self._events.popleft())
        finally:  # an event that could not be handled holds up none of those behind it
            if self._events and not self._woken:
                self._woken = True
                self._loop.call_soon(self._drain)
