"""What huge pages bring for a pool: `python -m bench.huge_pages DIRECTORY...`, one JSON line each.

Name directories on file systems to compare: a tmpfs mounted with and without `huge=within_size`, a
hugetlbfs mounted with a `size=` (which statvfs tells). The pool is made there as a daemon makes it, touched by this process and then by a fresh
one, copied from and into in scattered pieces, and dropped.
"""

import ctypes
import json
import mmap
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kvferry_daemon.memory.host import HostPool
from kvferry_daemon.memory.huge_pages import huge_pages

POOL_BYTES = 1 << 30
BUFFER_BYTES = 64 << 20
PIECES_BYTES = {"64k": 64 << 10, "1m": 1 << 20}
ROUNDS = 3


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def touch(buffer: memoryview) -> None:
    """Write one byte of every small page."""
    buffer[:: mmap.PAGESIZE] = bytes(len(buffer) // mmap.PAGESIZE)


def copies(address: int) -> dict[str, float]:
    """GB/s out of the pool and into it, the best of a few rounds over all of its pieces."""
    anchor = (ctypes.c_char * BUFFER_BYTES).from_buffer(mmap.mmap(-1, BUFFER_BYTES))
    buffer = ctypes.addressof(anchor)
    ctypes.memset(buffer, 1, BUFFER_BYTES)
    found = {}
    for name, size in PIECES_BYTES.items():
        offsets = list(range(0, POOL_BYTES, size))
        random.Random(1).shuffle(offsets)

        def out(offsets: list[int] = offsets, size: int = size) -> None:
            for offset in offsets:
                ctypes.memmove(buffer + offset % BUFFER_BYTES, address + offset, size)

        def into(offsets: list[int] = offsets, size: int = size) -> None:
            for offset in offsets:
                ctypes.memmove(address + offset, buffer + offset % BUFFER_BYTES, size)

        for way, work in (("out", out), ("in", into)):
            best = min(seconds(work) for _ in range(ROUNDS))
            found[f"{way}_{name}_gb_per_s"] = round(POOL_BYTES / best / 1e9, 1)
    return found


def figures_of(pool: HostPool) -> dict[str, float]:
    """Of a pool just made."""
    view = pool.view(0, 1)
    touch_s = seconds(lambda: touch(view))
    other = [sys.executable, "-m", "bench.huge_pages", "--touch", str(pool.path)]
    worker_s = float(subprocess.check_output(other))
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    return {"touch_s": touch_s, "touch_worker_s": worker_s} | copies(address)


def measure(directory: Path) -> dict[str, object]:
    """Everything for a pool in this directory; seconds are for POOL_BYTES."""
    start = time.perf_counter()
    pools = [HostPool.create(directory / "bench-pool", POOL_BYTES, 1)]
    figures = {"make_s": time.perf_counter() - start}
    try:
        figures |= figures_of(pools[0])
    finally:
        figures["drop_s"] = seconds(lambda: pools.pop().remove())  # with it goes the mapping
    rounded = {name: round(value, 3) for name, value in figures.items()}
    return {"directory": str(directory), "huge_pages": huge_pages(directory), **rounded}


def main() -> None:
    """Measure every directory that is named."""
    if sys.argv[1:2] == ["--touch"]:
        with open(sys.argv[2], "r+b") as file:
            mapping = mmap.mmap(file.fileno(), POOL_BYTES)
        view = memoryview(mapping)
        print(seconds(lambda: touch(view)))
        return
    for directory in sys.argv[1:]:
        print(json.dumps(measure(Path(directory))), flush=True)


if __name__ == "__main__":
    main()
