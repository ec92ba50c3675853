"""What a run was made on. No host names: results are published."""

import os
import platform
import re
from pathlib import Path
from typing import Any

from bench.served import TICKS_A_S

STAT = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
IDLE = ("idle", "iowait")
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


class Others:
    """How much CPU everybody else has taken since this was made."""

    def __init__(self) -> None:
        self._begun = self._taken()

    def cores(self) -> float:
        """On average; our own processes count for us once they have been waited for."""
        seconds, busy_s = (now - then for now, then in zip(self._taken(), self._begun, strict=True))
        return round(max(0.0, busy_s / seconds), 2)

    @staticmethod
    def _taken() -> tuple[float, float]:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ticks = dict(zip(STAT, map(int, fields), strict=True))
        busy_s = sum(ticks[name] for name in STAT if name not in IDLE) / TICKS_A_S
        ours = os.times()
        return ours.elapsed, busy_s - sum(ours[:4])
