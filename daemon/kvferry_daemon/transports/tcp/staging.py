"""Where a chunk's bytes lie: in views, sent and received as they are, or where they are copied."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol


class Sliced(Protocol):
    """Bytes that go through a buffer of the thread; the copies are the thread's work too.

    A copy raises OSError when what it copies from or to fails: that ends the connection.
    """

    @property
    def payload_bytes(self) -> int:
        """Size of the buffer."""

    def gather(self, out: memoryview) -> None:
        """Fill the buffer from the pool."""

    def scatter(self, data: memoryview) -> None:
        """Write the buffer into the pool."""


class Blocks(NamedTuple):
    """Whole blocks of a pool, in token order."""

    pool_id: str
    runs: tuple[tuple[int, int], ...]  # (first_block, blocks)

    @property
    def total(self) -> int:
        """How many."""
        return sum([blocks for _, blocks in self.runs])


Place = list[memoryview] | Sliced
NewBuffer = Callable[[int], memoryview]  # of so many bytes


def plain_buffer(size_bytes: int) -> memoryview:
    """Ordinary memory of the process."""
    return memoryview(bytearray(size_bytes))


def payload_bytes_of(place: Place) -> int:
    """How many bytes there are."""
    if isinstance(place, list):
        return sum(map(len, place))
    return place.payload_bytes


def pieces(views: list[memoryview], step_bytes: int) -> Iterator[memoryview]:
    """The same bytes in views of a step at most."""
    for view in views:
        if 0 < len(view) <= step_bytes:
            yield view
            continue
        for first in range(0, len(view), step_bytes):
            yield view[first : first + step_bytes]


class Staging:
    """One thread's buffer, used again for every sliced chunk: as large as the largest so far."""

    def __init__(self, new_buffer: NewBuffer = plain_buffer) -> None:
        self._new_buffer = new_buffer
        self._buffer = memoryview(bytearray(0))

    def view(self, size_bytes: int) -> memoryview:
        """The first bytes of it. What an earlier view showed is gone."""
        if len(self._buffer) < size_bytes:
            self._buffer = memoryview(bytearray(0))  # not both at once
            self._buffer = self._new_buffer(size_bytes)
        return self._buffer[:size_bytes]
