"""One end of a way: a process with a pool of its own that does what it is told, line by line.

Imports the standard library alone: NIXL and Mooncake run in a venv without ours.
"""

import ctypes
import json
import mmap
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEP_BYTES = 1 << 20  # of one system call
SEEDS = {"source": 2, "sink": 3}
OTHER = {"source": "sink", "sink": "source"}


class Mapped:
    """A pool's file in this process."""

    def __init__(self, path: str) -> None:
        self.path = path
        with Path(path).open("r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), 0)
        self.view = memoryview(self._mapping)
        self._anchor = (ctypes.c_char * len(self.view)).from_buffer(self._mapping)
        self.address = ctypes.addressof(self._anchor)


class End:
    """What every way says of its ends. Times are `time.monotonic()`: one clock for all processes."""

    def __init__(self, pool: Mapped) -> None:
        self.pool = pool

    def offer(self) -> Any:
        """What the other end has to know, as JSON."""
        return None

    def meet(self, offer: Any) -> None:
        """Connect, or let the other end connect."""

    def prepare(self, mine: list[int], theirs: list[int], piece_bytes: int) -> None:
        """Get everything ready to move: piece i goes from the source's i-th offset to the sink's."""
        raise NotImplementedError

    def move(self) -> dict[str, float]:
        """Move it all. ``begun`` and ``done`` come from the ends that can tell."""
        raise NotImplementedError


def scattered(total_bytes: int, piece_bytes: int, role: str) -> list[int]:
    """Where a role's pieces lie, in the order in which they travel."""
    offsets = list(range(0, total_bytes, piece_bytes))
    random.Random(SEEDS[role]).shuffle(offsets)
    return offsets


def groups(view: memoryview, offsets: list[int], piece_bytes: int) -> list[list[memoryview]]:
    """Views of the pieces, those that fit into STEP_BYTES together."""
    pieces = [view[offset : offset + piece_bytes] for offset in offsets]
    size = max(1, STEP_BYTES // piece_bytes)
    return [pieces[first : first + size] for first in range(0, len(pieces), size)]


def serve(source: Callable[..., End], sink: Callable[..., End]) -> None:
    """Be the end that the command line names, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers)

    role, path, *more = sys.argv[1:]
    end = {"source": source, "sink": sink}[role](Mapped(path), *more)
    say(end.offer())
    end.meet(json.loads(sys.stdin.readline()))
    say("met")
    while line := sys.stdin.readline():
        piece_bytes = json.loads(line)
        size = len(end.pool.view)
        mine, theirs = (scattered(size, piece_bytes, each) for each in (role, OTHER[role]))
        end.prepare(mine, theirs, piece_bytes)
        say("prepared")
        sys.stdin.readline()
        say(end.move())
