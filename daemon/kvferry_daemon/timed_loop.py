"""uvloop with a clock around each callback; it has no hook for one."""

import asyncio
from collections.abc import Callable
from typing import Any

import uvloop

from kvferry_daemon.turns import Turns

_call_soon = uvloop.Loop.call_soon
_call_soon_threadsafe = uvloop.Loop.call_soon_threadsafe
_call_later = uvloop.Loop.call_later


class TimedLoop(uvloop.Loop):
    """Every way in that we and asyncio use; `call_at` goes by `call_later`.

    The types are those of uvloop, which asyncio's are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns()
        self._take = self.turns.take

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """Time it."""
        return _call_soon(self, self._take, callback, *args, context=context)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """Time it."""
        return _call_soon_threadsafe(self, self._take, callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Time it."""
        return _call_later(self, delay, self._take, callback, *args, context=context)

    def add_reader(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        """Time it."""
        super().add_reader(fd, self._take, callback, *args)
