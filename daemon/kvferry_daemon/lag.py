"""How late the event loop comes to what is due: the time that a message may have waited for it.

What the loop itself does then is told by its turns, see `turns`. Lateness is also of what they do not
show: a thread that waits for the GIL or for a core before its turn begins.
"""

import asyncio
from time import monotonic

from kvferry_daemon.turns import Turns
from kvferry_proto.control import LoopStatus

LOOK_S = 0.1


class LoopLag:
    """A timer, and by how much it was missed. Ten looks a second: it is cheap, and no log.

    A single pause is seen with a chance of its length to 0.1 s, so many looks show how often the
    loop is late, not each time that it was. libuv's timers fire up to 1 ms late by themselves.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        turns = getattr(self._loop, "turns", None)
        self._turns = turns if isinstance(turns, Turns) else None
        self._looks = 0
        self._over_2_ms = self._over_10_ms = self._over_100_ms = 0
        self._longest_s = 0.0
        self._wait()

    def begin(self) -> None:
        """Count turns from the next one on: the daemon is ready."""
        if self._turns is not None:
            self._loop.call_soon(self._turns.begin)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def status(self) -> LoopStatus:
        """All looks since the start, and all turns since ``begin``, where the loop has clocks."""
        return LoopStatus(
            looks=self._looks,
            late_over_2_ms=self._over_2_ms,
            late_over_10_ms=self._over_10_ms,
            late_over_100_ms=self._over_100_ms,
            late_max_ms=round(self._longest_s * 1000, 2),
            turns=None if self._turns is None else self._turns.status(),
        )

    def _wait(self) -> None:
        self._due_s = self._loop.time() + LOOK_S  # the loop's clock stands still within a turn
        self._timer = self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        late_s = monotonic() - self._due_s
        self._looks += 1
        self._over_2_ms += late_s > 0.002
        self._over_10_ms += late_s > 0.010
        self._over_100_ms += late_s > 0.100
        self._longest_s = max(self._longest_s, late_s)
        self._wait()
