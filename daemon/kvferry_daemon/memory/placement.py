"""Where a pool's memory lies and who copies it: a NUMA node, and the CPUs of the copying threads."""

import ctypes
import logging
import mmap
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

NODES = Path("/sys/devices/system/node")
CPU_MAX = (1 << 13) - 1  # the most that a kernel can be built for
NODE_MAX = 1023
MBIND = {"x86_64": 237, "aarch64": 235}  # glibc has no function for it
MPOL_PREFERRED = 1
CPUS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
log = logging.getLogger(__name__)


class PlacementRefused(ValueError):
    """This machine or container cannot place us so; the message names the setting."""


def parse_cpus(text: str) -> frozenset[int]:
    """CPUs of a list as Linux writes it, "0-3,8"; "" is none. ValueError says what is wrong."""
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        found = CPUS.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last <= CPU_MAX:
            raise ValueError(
                f"copy_cpus: {part!r} is no CPU and no range of CPUs up to {CPU_MAX}; "
                'a list of them looks like "0-3,8"'
            )
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def cpu_list(cpus: frozenset[int]) -> str:
    """The shortest list that says it: "0-3,8"."""
    words, left = [], sorted(cpus)
    while left:
        run = 1
        while run < len(left) and left[run] == left[0] + run:
            run += 1
        words.append(str(left[0]) if run == 1 else f"{left[0]}-{left[run - 1]}")
        left = left[run:]
    return ",".join(words)


@dataclass(frozen=True, slots=True)
class Placement:
    """What is in force. ``node`` None: wherever the kernel likes; no ``cpus``: on any of ours."""

    node: int | None = None
    cpus: frozenset[int] = frozenset()

    @classmethod
    def settle(cls, node: int | None, copy_cpus: str, nodes: Path = NODES) -> Self:
        """Check the settings against the machine; PlacementRefused.

        Without ``copy_cpus``, those CPUs of the node that this process may use. A node that has
        none (memory alone) pins nothing.
        """
        allowed = os.sched_getaffinity(0)
        cpus = parse_cpus(copy_cpus)
        if not cpus <= allowed:
            raise PlacementRefused(
                f"copy_cpus: this process may not run on CPU {cpu_list(cpus - allowed)}; "
                f"it may on {cpu_list(frozenset(allowed))}"
            )
        if node is None:
            return cls(None, cpus)
        there = parse_cpus((nodes / "has_memory").read_text()) if nodes.exists() else frozenset()
        if node not in there:
            has = f"with memory there are {cpu_list(there)}" if there else f"{nodes} shows none"
            raise PlacementRefused(f"numa_node: there is no NUMA node {node}; {has}")
        _try_node(node)
        own = parse_cpus((nodes / f"node{node}" / "cpulist").read_text())
        return cls(node, cpus or own & allowed)

    def enter(self) -> None:
        """Keep the calling thread on the CPUs. A cpuset that has shrunk since is logged."""
        if self.cpus:
            try:
                os.sched_setaffinity(0, self.cpus)
            except OSError as error:
                log.warning("cannot copy on CPUs %s: %s", cpu_list(self.cpus), error.strerror)


ANYWHERE = Placement()


def prefer_node(address: int, length_bytes: int, node: int) -> None:
    """Have pages that are not there yet allocated on a node; OSError.

    On another one if it is full: a strict policy would have the kernel kill somebody instead.
    """
    number = MBIND.get(platform.machine())
    if number is None:
        raise OSError(0, f"the number of mbind on {platform.machine()} is not known here")
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told.
    arguments = (address, length_bytes, MPOL_PREFERRED, ctypes.addressof(mask), 64 * words + 1, 0)
    if libc.syscall(*(ctypes.c_long(one) for one in (number, *arguments))):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def node_bytes_left(node: int, nodes: Path = NODES) -> int | None:
    """What a node has free or can drop (pages of files on disk); None: it does not say."""
    try:
        text = (nodes / f"node{node}" / "meminfo").read_text()
    except OSError:
        return None
    rows = dict(re.findall(r"Node \d+ (\S+):\s+(\d+) kB", text))
    names = ("MemFree", "Active(file)", "Inactive(file)")
    return 1024 * sum(int(rows.get(name, 0)) for name in names)


def _try_node(node: int) -> None:
    """The kernel, a cpuset or a seccomp filter may refuse; better now than at the first pool."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    anchor = ctypes.c_char.from_buffer(page)
    try:
        prefer_node(ctypes.addressof(anchor), mmap.PAGESIZE, node)
    except OSError as error:
        raise PlacementRefused(
            f"numa_node: memory cannot be placed on node {node}: {error.strerror}; a container "
            "needs the node in its cpuset, and CAP_SYS_NICE where a seccomp filter forbids mbind"
        ) from error
