"""HostPool: a file that is there in full or not at all, and wiping that lets others run."""

import errno
import mmap
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvferry_daemon.memory.host import HostPool, MemoryRefused, container_bytes_left

BLOCK = mmap.PAGESIZE
NO_LIMIT = Path("/nonexistent")


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A directory where pools live: on tmpfs, whatever pytest's own is on."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        yield Path(root)


def test_the_file_is_private_allocated_in_full_and_shared(tmpfs: Path) -> None:
    pool = HostPool.create(tmpfs / "pool", BLOCK, 8, NO_LIMIT)
    found = (tmpfs / "pool").stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_size == 8 * BLOCK
    assert found.st_blocks * 512 >= 8 * BLOCK, "a hole is a SIGBUS to come"
    pool.view(3, 2)[:] = b"x" * (2 * BLOCK)
    content = (tmpfs / "pool").read_bytes()
    assert content == bytes(3 * BLOCK) + b"x" * (2 * BLOCK) + bytes(3 * BLOCK)
    pool.remove()


def test_a_piece_is_the_bytes_of_the_file(tmpfs: Path) -> None:
    pool = HostPool.create(tmpfs / "pool", BLOCK, 2, NO_LIMIT)
    pool.piece(BLOCK - 1, 3)[:] = b"abc"
    assert bytes(pool.view(0, 1)[-2:]) == b"\0a"
    assert bytes(pool.view(1, 1)[:3]) == b"bc\0"
    pool.remove()


def test_zero_wipes_these_blocks_and_no_others(tmpfs: Path) -> None:
    pool = HostPool.create(tmpfs / "pool", BLOCK, 8, NO_LIMIT)
    pool.view(0, 8)[:] = b"x" * (8 * BLOCK)
    pool.zero(2, 3)
    expected = b"x" * (2 * BLOCK) + bytes(3 * BLOCK) + b"x" * (3 * BLOCK)
    assert bytes(pool.view(0, 8)) == expected
    pool.remove()


@pytest.mark.parametrize(("first", "blocks"), [(-1, 1), (8, 1), (7, 2), (0, 9), (2, -1)])
def test_blocks_outside_the_pool_are_refused(tmpfs: Path, first: int, blocks: int) -> None:
    pool = HostPool.create(tmpfs / "pool", BLOCK, 8, NO_LIMIT)
    with pytest.raises(IndexError):
        pool.view(first, blocks)
    with pytest.raises(IndexError):
        pool.zero(first, blocks)
    pool.remove()


def test_close_removes_the_file_and_may_be_repeated(tmpfs: Path) -> None:
    pool = HostPool.create(tmpfs / "pool", BLOCK, 1, NO_LIMIT)
    pool.remove()
    pool.remove()
    assert not list(tmpfs.iterdir())


def test_a_file_that_is_there_is_left_alone(tmpfs: Path) -> None:
    (tmpfs / "pool").write_bytes(b"another life's")
    with pytest.raises(FileExistsError):
        HostPool.create(tmpfs / "pool", BLOCK, 1, NO_LIMIT)
    assert (tmpfs / "pool").read_bytes() == b"another life's"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failed_allocation_leaves_no_file(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(descriptor: int, offset: int, length: int) -> None:
        assert list(tmpfs.iterdir()), "the file must be there by now, or this proves nothing"
        raise error

    monkeypatch.setattr(os, "posix_fallocate", fails)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(type(error)):
        HostPool.create(tmpfs / "pool", BLOCK, 1, NO_LIMIT)
    assert not list(tmpfs.iterdir())
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_full_file_system_is_refused_before_a_file_is_made(tmpfs: Path) -> None:
    stats = os.statvfs(tmpfs)
    free = stats.f_bavail * stats.f_frsize
    blocks = 2 * free // BLOCK
    with pytest.raises(MemoryRefused) as caught:
        HostPool.create(tmpfs / "pool", BLOCK, blocks, NO_LIMIT)
    assert caught.value.where == "tmpfs"
    assert caught.value.needed_bytes == blocks * BLOCK
    assert 0 < caught.value.available_bytes < caught.value.needed_bytes
    assert not list(tmpfs.iterdir())


def v1(root: Path, limit: str, used: str) -> None:
    (root / "memory").mkdir()
    (root / "memory" / "memory.limit_in_bytes").write_text(limit)
    (root / "memory" / "memory.usage_in_bytes").write_text(used)


def v2(root: Path, limit: str, used: str) -> None:
    (root / "memory.max").write_text(limit)
    (root / "memory.current").write_text(used)


@pytest.mark.parametrize("version", [v1, v2])
@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("1000\n", "300\n", 700), ("1000", "1000", 0), ("1000", "1200", 0)],
)
def test_the_container_limit_is_read(
    tmp_path: Path, version: Callable[[Path, str, str], None], limit: str, used: str, left: int
) -> None:
    version(tmp_path, limit, used)
    assert container_bytes_left(tmp_path) == left


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert container_bytes_left(tmp_path) is None
    v1(tmp_path, "9223372036854771712", "300")
    assert container_bytes_left(tmp_path) is None
    v2(tmp_path, "max\n", "300\n")
    assert container_bytes_left(tmp_path) is None


@pytest.mark.parametrize("version", [v1, v2])
def test_a_pool_over_the_container_limit_is_refused(
    tmpfs: Path, tmp_path: Path, version: Callable[[Path, str, str], None]
) -> None:
    version(tmp_path, str(10 * BLOCK), str(6 * BLOCK + 1))
    with pytest.raises(MemoryRefused, match="container memory limit") as caught:
        HostPool.create(tmpfs / "pool", BLOCK, 4, tmp_path)
    refused = caught.value
    numbers = (refused.needed_bytes, refused.available_bytes, refused.where)
    assert numbers == (4 * BLOCK, 4 * BLOCK - 1, "container memory limit")
    assert not list(tmpfs.iterdir())
    HostPool.create(tmpfs / "pool", BLOCK, 3, tmp_path).remove()


def test_zero_lets_other_threads_run(tmpfs: Path) -> None:
    """Another thread is seen running in the middle of a wipe, which the GIL would forbid."""
    pool = HostPool.create(tmpfs / "pool", 1 << 20, 256, NO_LIMIT)
    pool.zero(0, 256)  # maps every page, so that the rounds below last about the same
    assert any(_runs_beside(pool) for _ in range(20))
    pool.remove()


def _runs_beside(pool: HostPool) -> bool:
    times: list[float] = []

    def wipe() -> None:
        times.append(time.perf_counter())
        pool.zero(0, pool.blocks)
        times.append(time.perf_counter())

    thread = threading.Thread(target=wipe)
    thread.start()
    ticks = [time.perf_counter()]
    while thread.is_alive():
        if (now := time.perf_counter()) - ticks[-1] > 1e-4:
            ticks.append(now)
    thread.join()
    begin, end = times
    # The middle: a thread switch before the wipe begins or after it ends lies outside.
    quarter = (end - begin) / 4
    return sum(begin + quarter < tick < end - quarter for tick in ticks) >= 3
