"""The status board of a pool: one file on tmpfs that the daemon writes and its workers map."""

import mmap
import os
from pathlib import Path
from time import monotonic_ns
from typing import Self

from kvferry_daemon.memory.opened import open_as_directory, open_to_user
from kvferry_proto.board import (
    BEAT_WORD,
    HEADER_BYTES,
    SLOT_BYTES,
    WORD_BYTES,
    board_bytes,
    pack_empty,
    pack_header,
    pack_slot,
    word_of,
)
from kvferry_proto.worker import Snapshot

GIVEN_UP = b"\0" * WORD_BYTES  # a heartbeat that no clock takes for fresh


class Board:
    """Slots of one life of the daemon. It is never read here: sequences are counted beside it."""

    def __init__(self, path: Path, mapping: mmap.mmap, slots: int) -> None:
        self.path = path
        self._mapping = mapping
        self._words = memoryview(mapping).cast("Q")
        self._sequences = [0] * slots

    @classmethod
    def create(
        cls, path: Path, slots: int, boot_id: str, stale_s: float, uid: int | None = None
    ) -> Self:
        """Make the file anew (mode 0600, or 0640), all its space allocated, and beat once; or OSError.

        ``uid``: the one user that may read it, too.
        """
        give_up(path)
        size = board_bytes(slots)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if uid is None:
                open_as_directory(descriptor, path.parent, 0o640)
            else:
                open_to_user(descriptor, uid, writable=False)
            os.posix_fallocate(descriptor, 0, size)
            mapping = mmap.mmap(descriptor, size)
        except BaseException:  # a signal's, too
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        board = cls(path, mapping, slots)
        mapping[:HEADER_BYTES] = pack_header(slots, boot_id, round(stale_s * 1e9), monotonic_ns())
        return board

    def beat(self) -> None:
        """Say that what stands here is still kept up to date."""
        self._words[BEAT_WORD] = monotonic_ns()

    def show(self, snapshot: Snapshot) -> None:
        """Write a snapshot into the slot that it names."""
        assert snapshot.slot is not None, snapshot
        index = snapshot.slot.index
        sequence = self._sequences[index] + 2
        self._write(index, sequence, pack_slot(sequence, snapshot.slot.key, snapshot))

    def clear(self, index: int) -> None:
        """Nobody has this slot now."""
        sequence = self._sequences[index] + 2
        self._write(index, sequence, pack_empty(sequence))

    def _write(self, index: int, sequence: int, packed: bytes) -> None:
        """An odd sequence while it is under way; a word is stored at once, the rest is not."""
        self._sequences[index] = sequence
        word, first = word_of(index), HEADER_BYTES + index * SLOT_BYTES
        self._words[word] = sequence - 1
        self._mapping[first + WORD_BYTES : first + SLOT_BYTES] = packed[WORD_BYTES:]
        self._words[word] = sequence

    def remove(self) -> None:
        """Tell who maps it to look here no more, and remove the file."""
        self._words[BEAT_WORD] = 0
        self.path.unlink(missing_ok=True)


def give_up(path: Path) -> None:
    """Take the board of an earlier life away, under the eyes of those who map it; or OSError."""
    try:
        with path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size >= HEADER_BYTES:
                file.seek(BEAT_WORD * WORD_BYTES)
                file.write(GIVEN_UP)
    except FileNotFoundError:
        return
    path.unlink(missing_ok=True)
