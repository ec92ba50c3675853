"""Run on a mount of a test's own: make a pool there, and say what the kernel did."""

import ctypes
import mmap
import re
import sys
from pathlib import Path

from kvferry_daemon.memory.host import HostPool
from kvferry_daemon.memory.huge_pages import huge_pages

SIZE = 32 << 20
FOUND = re.compile(
    r"when=(?P<when>\S+) advised=(?P<advised>\S+) allocated=(?P<allocated>\d+) "
    r"daemon=(?P<daemon>\d+) worker=(?P<worker>\d+)"
)


def mapped(buffer: memoryview | mmap.mmap) -> tuple[bool, int]:
    """Whether huge pages were asked for a mapping, and how many KiB are mapped by them."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    text = Path("/proc/self/smaps").read_text()
    (area,) = re.findall(rf"^{address:x}-(?:.*\n)+?VmFlags:.*$", text, re.MULTILINE)
    (huge,) = re.findall(r"ShmemPmdMapped:\s+(\d+) kB", area)
    return " hg" in area.splitlines()[-1], int(huge)


def main(directory: Path) -> None:
    """Touch every page on both sides first."""
    pool = HostPool.create(directory / "pool", 4096, SIZE // 4096, Path("/nonexistent"))
    pool.zero(0, pool.blocks)
    with pool.path.open("r+b") as file:
        worker = mmap.mmap(file.fileno(), SIZE)
    worker.write(bytes(SIZE))
    advised, daemon_kib = mapped(pool.view(0, 1))
    print(
        f"when={huge_pages(directory)} advised={advised} "
        f"allocated={pool.path.stat().st_blocks * 512} "
        f"daemon={daemon_kib} worker={mapped(worker)[1]}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
