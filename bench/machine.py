"""What a run was made on. No host names: results are published."""

import ctypes
import os
import platform
import re
from pathlib import Path
from typing import Any

from bench.served import TICKS_A_S

STAT = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
IDLE = ("idle", "iowait")
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
CPU_FIELDS = slice(11, 15)  # of /proc/PID/stat behind the name: own and of children waited for
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


def cpu_model() -> str:
    """As /proc/cpuinfo has it."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def default_name() -> str:
    """From the cores and the CPU's model."""
    words = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    return f"{os.cpu_count()}-cores-{words}"


def about(name: str) -> dict[str, Any]:
    """The machine's part of a result."""
    return {
        "name": name,
        "cores": os.cpu_count(),
        "cpu": cpu_model(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "tcp_congestion_control": CONGESTION.read_text().strip(),
        "python": platform.python_version(),
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes: another's work slows everything down."""
    return [round(one, 2) for one in os.getloadavg()]


def adopt() -> None:
    """Become the parent of every process below us whose own has ended: it stays one of ours."""
    if ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def ours_s() -> float:
    """CPU that we have taken with all processes below us, ended or not."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile, and been waited for
            continue
        parents[int(path.parent.name)] = int(fields[1])
        ticks[int(path.parent.name)] = sum(map(int, fields[CPU_FIELDS]))
    return sum(taken for pid, taken in ticks.items() if _is_ours(pid, parents)) / TICKS_A_S


def _is_ours(pid: int, parents: dict[int, int]) -> bool:
    while pid and pid != os.getpid():
        pid = parents.get(pid, 0)
    return pid != 0


class Others:
    """How much CPU everybody else has taken since this was made."""

    def __init__(self) -> None:
        adopt()
        self._begun = self._taken()

    def cores(self) -> float:
        """On average; below nothing, where a tick was counted twice, is nothing."""
        seconds, busy_s = (now - then for now, then in zip(self._taken(), self._begun, strict=True))
        return round(max(0.0, busy_s / seconds), 2)

    @staticmethod
    def _taken() -> tuple[float, float]:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ticks = dict(zip(STAT, map(int, fields), strict=True))
        busy_s = sum(ticks[name] for name in STAT if name not in IDLE) / TICKS_A_S
        return os.times().elapsed, busy_s - ours_s()
