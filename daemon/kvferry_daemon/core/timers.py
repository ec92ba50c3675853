"""When what is to be woken: a transfer (Key), a peer (address) or a waiting poll (number)."""

import heapq

from kvferry_daemon.core.transfer import NEVER_S

A_TURN = 32  # then what else waits gets its turn: a pull costs some 30 us
SPARE = 256  # wake-ups that are over, before they are swept out


class Timers:
    """One wake-up each, the earliest that was asked for."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, object]] = []
        self._count = 0
        self._due: dict[object, float] = {}

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def wake_at_s(self) -> float:
        """When ``take_due`` has something at the earliest."""
        return self._heap[0][0] if self._heap else NEVER_S

    def schedule(self, thing: object, at_s: float) -> None:
        """Wake it at ``at_s``, if it is not woken before."""
        if at_s < self._due.get(thing, NEVER_S):
            self._due[thing] = at_s
            self._count += 1
            heapq.heappush(self._heap, (at_s, self._count, thing))
            if len(self._heap) > SPARE + 2 * len(self._due):
                self._heap = [one for one in self._heap if self._due.get(one[2]) == one[0]]
                heapq.heapify(self._heap)

    def unschedule(self, thing: object) -> None:
        """A wake-up is needed no more."""
        self._due.pop(thing, None)

    def take_due(self, now_s: float) -> list[object]:
        """What is to be woken in this turn; what is left is due at once, in the next one."""
        due: list[object] = []
        while self._heap and self._heap[0][0] <= now_s and len(due) < A_TURN:
            at_s, _, thing = heapq.heappop(self._heap)
            if self._due.get(thing) == at_s:  # else an earlier wake-up took its place
                del self._due[thing]
                due.append(thing)
        return due
