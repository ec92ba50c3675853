"""Host memory of a pool: one file on tmpfs, mapped by the daemon and by every worker."""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Literal, Self

from kvferry_daemon.memory.huge_pages import advise, huge_pages
from kvferry_daemon.memory.opened import open_as_directory, open_to_user
from kvferry_daemon.memory.placement import node_bytes_left, prefer_node

Where = Literal["tmpfs", "container memory limit", "NUMA node"]
CGROUP = Path("/sys/fs/cgroup")


class MemoryRefused(ValueError):
    """There is not enough of what would back the pool."""

    def __init__(self, path: Path, needed_bytes: int, available_bytes: int, where: Where) -> None:
        super().__init__(
            f"{path} needs {needed_bytes} bytes; the {where} has {available_bytes} left"
        )
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.where = where


class HostPool:
    """``blocks`` blocks of ``block_bytes`` each, shared through the file at ``path``."""

    cuda_index: int | None = None  # as device pools have one

    def __init__(self, path: Path, mapping: mmap.mmap, block_bytes: int, blocks: int) -> None:
        self.path = path
        self.block_bytes = block_bytes
        self.blocks = blocks
        self._mapping = mapping
        self._view = memoryview(mapping)
        self._anchor = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        self.address = ctypes.addressof(self._anchor)

    @classmethod
    def create(
        cls,
        path: Path,
        block_bytes: int,
        blocks: int,
        cgroup: Path = CGROUP,
        node: int | None = None,
        uid: int | None = None,
    ) -> Self:
        """Make the file (mode 0600, or 0660) and allocate all its space now, so that nobody meets SIGBUS.

        ``node``: the NUMA node that it is to lie on. ``uid``: the one user that may open it, too.
        Raises MemoryRefused with the numbers, or OSError; leaves no file behind then.
        """
        size = block_bytes * blocks
        stats = os.statvfs(path.parent)
        _check(path, size, stats.f_bavail * stats.f_frsize, "tmpfs")
        limit = container_bytes_left(cgroup)
        if limit is not None:
            _check(path, size, limit, "container memory limit")
        on_node = None if node is None else node_bytes_left(node)
        if on_node is not None:
            _check(path, size, on_node, "NUMA node")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if uid is None:
                open_as_directory(descriptor, path.parent, 0o660)
            else:
                open_to_user(descriptor, uid, writable=True)
            os.ftruncate(descriptor, size)
            mapping = mmap.mmap(descriptor, size)
            pool = cls(path, mapping, block_bytes, blocks)
            try:
                if node is not None:
                    prefer_node(pool.address, size, node)
                advise(pool.address, size, huge_pages(path.parent))
                os.posix_fallocate(descriptor, 0, size)
            except BaseException:
                pool._unmap()  # a mapping has a descriptor of its own, and the error holds us
                raise
        except BaseException:  # a signal's, too: Python calls handlers while it allocates
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return pool

    @classmethod
    def attach(cls, path: Path, block_bytes: int, blocks: int) -> Self:
        """Map the file of an earlier life, bytes and all; OSError or ValueError if it is not that."""
        with path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if size != block_bytes * blocks:
                raise ValueError(f"{path} has {size} bytes, not {block_bytes * blocks}")
            return cls(path, mmap.mmap(file.fileno(), size), block_bytes, blocks)

    def piece(self, offset_bytes: int, length_bytes: int) -> memoryview:
        """A writable view of a byte range of the pool."""
        self._check_inside(offset_bytes, length_bytes)
        return self._view[offset_bytes : offset_bytes + length_bytes]

    def view(self, first_block: int, blocks: int) -> memoryview:
        """A writable view of neighbouring blocks."""
        return self.piece(first_block * self.block_bytes, blocks * self.block_bytes)

    def zero(self, first_block: int, blocks: int) -> None:
        """Wipe neighbouring blocks. ctypes releases the GIL meanwhile."""
        offset, length = first_block * self.block_bytes, blocks * self.block_bytes
        self._check_inside(offset, length)
        ctypes.memset(self.address + offset, 0, length)

    def remove(self) -> None:
        """Remove the file. The mapping goes with the last view of it."""
        self.path.unlink(missing_ok=True)

    def _unmap(self) -> None:
        self._view.release()
        del self._anchor
        self._mapping.close()

    def _check_inside(self, offset_bytes: int, length_bytes: int) -> None:
        # A slice would be cut short in silence, and memset would write over other memory.
        if not 0 <= offset_bytes <= offset_bytes + length_bytes <= len(self._view):
            raise IndexError(
                f"{length_bytes} bytes at {offset_bytes} are not in a pool of {len(self._view)}"
            )


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


def _check(path: Path, needed_bytes: int, available_bytes: int, where: Where) -> None:
    if needed_bytes > available_bytes:
        raise MemoryRefused(path, needed_bytes, available_bytes, where)
