"""How long each turn of the event loop takes: what nobody else on it can do meanwhile."""

from collections.abc import Callable
from time import monotonic, thread_time
from typing import Any

from kvferry_proto.control import TurnStatus

EDGES_S = (0.001, 0.002, 0.010, 0.100)
LONG_S = EDGES_S[0]
LOOK_S = 0.0002  # of turns; then the CPU's clock is read again, a call of the kernel's (1 us)
LOOK_TURNS = 16  # or so many: between them the loop works, too


class Turns:
    """A clock around every callback, see `timed_loop`.

    ``work`` of a long turn is CPU of the loop's thread, and the rest of it waiting, for the GIL or
    for a core. It is counted from the last look at that thread's clock: never too little, and too
    much by LOOK_S or a little more. Of a short turn it is not asked, and all of it counts.
    """

    __slots__ = (
        "_longest_s", "_look_at", "_looked_s", "_most_work_s", "_over", "_seconds", "_short_s",
        "_since_s", "_turns", "_work_over",
    )  # fmt: skip

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self._turns = 0
        self._look_at = LOOK_TURNS
        self._seconds = self._longest_s = self._short_s = self._most_work_s = 0.0
        self._over = [0] * len(EDGES_S)
        self._work_over = [0] * len(EDGES_S)
        self._since_s = 0.0  # in turns, since the last look
        self._looked_s = thread_time()

    def take(self, callback: Callable[..., object], *args: Any) -> None:
        """One turn."""
        if self._since_s > LOOK_S or self._turns > self._look_at:
            self._look()
        begun_s = monotonic()
        try:
            callback(*args)
        finally:
            took_s = monotonic() - begun_s
            self._turns += 1
            self._since_s += took_s
            if took_s > LONG_S:
                self._long(took_s)
            elif took_s > self._short_s:
                self._short_s = took_s

    def status(self) -> TurnStatus:
        """All turns since they are counted."""
        return TurnStatus(
            turns=self._turns,
            seconds=round(self._seconds + self._since_s, 3),
            over_1_ms=self._over[0],
            over_2_ms=self._over[1],
            over_10_ms=self._over[2],
            over_100_ms=self._over[3],
            max_ms=round(max(self._longest_s, self._short_s) * 1000, 2),
            work_over_1_ms=self._work_over[0],
            work_over_2_ms=self._work_over[1],
            work_over_10_ms=self._work_over[2],
            work_over_100_ms=self._work_over[3],
            work_max_ms=round(max(self._most_work_s, self._short_s) * 1000, 2),
        )

    def _look(self) -> float:
        """CPU since the last look."""
        now_s = thread_time()
        worked_s = now_s - self._looked_s
        self._looked_s = now_s
        self._seconds += self._since_s
        self._since_s = 0.0
        self._look_at = self._turns + LOOK_TURNS
        return worked_s

    def _long(self, took_s: float) -> None:
        work_s = min(took_s, self._look())
        self._longest_s = max(took_s, self._longest_s)
        self._most_work_s = max(work_s, self._most_work_s)
        for index, edge_s in enumerate(EDGES_S):
            self._over[index] += took_s > edge_s
            self._work_over[index] += work_s > edge_s
