"""The workers of a group, each in a thread of its own."""

import threading
from collections.abc import Callable


class Ranks:
    """Runs one function a rank; ``join`` raises the first error."""

    def __init__(self, work: Callable[[int], None], ranks: int) -> None:
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(work, r)) for r in range(ranks)]
        for thread in self._threads:
            thread.start()

    def _run(self, work: Callable[[int], None], rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:  # noqa: BLE001  raised again by join
            self._errors.append(error)

    def join(self) -> None:
        """Wait for all of them."""
        for thread in self._threads:
            thread.join()
        for error in self._errors:
            raise error
