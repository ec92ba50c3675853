"""What a run was made on. No host names: results are published."""

import os
import platform
import re
from pathlib import Path
from typing import Any


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
        "python": platform.python_version(),
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes: another's work slows everything down."""
    return [round(one, 2) for one in os.getloadavg()]
