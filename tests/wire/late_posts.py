"""`kvferry` whose threads reach its loop late: python tests/wire/late_posts.py serve ...

As on a machine with little time: what a thread posts waits for its turn while messages are read.
"""

from collections.abc import Callable
from typing import Any

from kvferry_daemon.command import main
from kvferry_daemon.transports.tcp import bridge

LATE_S = 3600.0
plain: Any = bridge.LoopBridge.__init__


class Late:
    """A loop that takes threads' calls after an hour."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(self._loop.call_later, LATE_S, callback)


def begin(self: Any, loop: Any, handle: Callable[[Any], None]) -> None:
    plain(self, Late(loop), handle)


if __name__ == "__main__":
    setattr(bridge.LoopBridge, "__init__", begin)  # noqa: B010  mypy takes it for a mistake
    main()
