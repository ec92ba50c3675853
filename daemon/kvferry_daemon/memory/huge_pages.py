"""Whether a pool's file lies in huge pages: the mount that it is on says so.

They make a worker's first touch of a pool, and dropping one, many times cheaper, and copying a
little (docs/decisions/0013). A tmpfs that is mounted so gives them; any other keeps to small pages.
"""

import ctypes
import logging
import os
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
NEVER, ADVISE = "never", "advise"
GIVEN = ("always", "within_size", ADVISE)
MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23  # Linux; the latter since 5.14
log = logging.getLogger(__name__)


def huge_pages(directory: Path, mounts: Path = MOUNTS, enabled: Path = SHMEM_ENABLED) -> str:
    """When files there get huge pages: never, always, within_size or advise (we do).

    It is the option ``huge=`` of the tmpfs, unless the machine overrules all mounts.
    """
    device = directory.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
        machine = enabled.read_text()
    except OSError:
        return NEVER
    if "[deny]" in machine:
        return NEVER
    for words in lines:
        kind, _source, options = words[words.index("-") + 1 :][:3]
        if words[2] == name and kind == "tmpfs":
            if "[force]" in machine:
                return "always"
            huge = [one for one in options.split(",") if one.startswith("huge=")]
            return huge[0].removeprefix("huge=") if huge else NEVER
    return NEVER


def advise(address: int, length_bytes: int, when: str) -> None:
    """Ask for huge pages under a mapping with no page yet, and allocate them if nobody else will.

    ``when``: what ``huge_pages`` says. posix_fallocate knows of no mapping, and would take small
    pages where they are only given on advice. What cannot be had is logged; no space, too: the
    posix_fallocate that follows has the better error for it.
    """
    if when not in GIVEN:
        return
    for what in (MADV_HUGEPAGE, MADV_POPULATE_WRITE) if when == ADVISE else (MADV_HUGEPAGE,):
        libc = ctypes.CDLL(None, use_errno=True)  # mmap.madvise keeps the GIL
        if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length_bytes), what):
            log.warning("no huge pages: %s", os.strerror(ctypes.get_errno()))
            return
