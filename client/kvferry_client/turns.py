"""Room for so many threads at once; the others come in the order in which they came."""

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A semaphore of the standard library lets who leaves and comes back at once go first.

    Threads that wait for news in a loop would keep the others out for ever.
    """

    def __init__(self, room: int) -> None:
        self._lock = threading.Lock()
        self._room = room
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if self._room:
                self._room -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()  # whoever leaves releases it
        except BaseException:  # an interrupt: the turn that is ours, or will be, goes on
            with self._lock:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._leave()
            raise

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        with self._lock:
            self._leave()

    def _leave(self) -> None:
        if self._waiting:
            self._waiting.popleft().release()
        else:
            self._room += 1
