"""Host memory of a pool: one file on tmpfs, mapped by the daemon and by every worker."""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Self

CGROUP = Path("/sys/fs/cgroup")


class MemoryRefused(ValueError):
    """There is not enough of what would back the pool."""

    def __init__(self, needed_bytes: int, available_bytes: int, where: str) -> None:
        super().__init__(f"{needed_bytes} bytes are needed; {where} has {available_bytes} left")
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.where = where


class HostPool:
    """``blocks`` blocks of ``block_bytes`` each, shared through the file at ``path``."""

    def __init__(self, path: Path, mapping: mmap.mmap, block_bytes: int, blocks: int) -> None:
        self.path = path
        self.block_bytes = block_bytes
        self.blocks = blocks
        self._mapping = mapping
        self._view = memoryview(mapping)
        self._anchor = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        self._address = ctypes.addressof(self._anchor)

    @classmethod
    def create(cls, path: Path, block_bytes: int, blocks: int, cgroup: Path = CGROUP) -> Self:
        """Make the file (mode 0600) and allocate all its space now, so that nobody meets SIGBUS.

        Raises MemoryRefused with the numbers, or OSError; leaves no file behind then.
        """
        size = block_bytes * blocks
        stats = os.statvfs(path.parent)
        _check(size, stats.f_bavail * stats.f_frsize, f"the file system of {path.parent}")
        limit = container_bytes_left(cgroup)
        if limit is not None:
            _check(size, limit, "the container's memory limit")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            mapping = mmap.mmap(descriptor, size)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return cls(path, mapping, block_bytes, blocks)

    def piece(self, offset_bytes: int, length_bytes: int) -> memoryview:
        """A writable view of a byte range of the pool."""
        return self._view[offset_bytes : offset_bytes + length_bytes]

    def view(self, first_block: int, blocks: int) -> memoryview:
        """A writable view of neighbouring blocks."""
        return self.piece(first_block * self.block_bytes, blocks * self.block_bytes)

    def zero(self, first_block: int, blocks: int) -> None:
        """Wipe neighbouring blocks. ctypes releases the GIL meanwhile."""
        assert first_block >= 0
        assert first_block + blocks <= self.blocks
        ctypes.memset(self._address + first_block * self.block_bytes, 0, blocks * self.block_bytes)

    def close(self) -> None:
        """Remove the file. The mapping goes with the last view of it."""
        self.path.unlink(missing_ok=True)


def container_bytes_left(cgroup: Path = CGROUP) -> int | None:
    """What the memory cgroup still allows (tmpfs pages count against it); None: no limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = (cgroup / limit_name).read_text().strip()
            used = int((cgroup / used_name).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit() and int(limit) < 1 << 60:
            return max(0, int(limit) - used)
    return None


def _check(needed_bytes: int, available_bytes: int, where: str) -> None:
    if needed_bytes > available_bytes:
        raise MemoryRefused(needed_bytes, available_bytes, where)
