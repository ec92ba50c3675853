"""A daemon process that also tells what it holds, see `bench.inside`."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.served import ServedDaemon

WAIT_S = 60.0
LOOK_S = 0.05


class WatchedDaemon(ServedDaemon):
    """A `kvferry serve` that can be asked what it holds."""

    def __init__(self, directory: Path, **flags: object) -> None:
        self.report_path = directory.with_suffix(".report")
        super().__init__(directory, **flags)

    def _program(self) -> list[str]:
        return ["bench.inside", str(self.report_path)]

    def report(self) -> dict[str, Any]:
        """What it says it holds, see `bench.inside`."""
        self.report_path.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        wait_until(self.report_path.exists, "the daemon reports")
        told: dict[str, Any] = json.loads(self.report_path.read_text())
        return told

    def files(self) -> list[str]:
        """Every file of the runtime directory."""
        found = (path for path in self.directory.rglob("*") if not path.is_dir())
        return sorted(str(path.relative_to(self.directory)) for path in found)

    def troubles(self) -> list[str]:
        """Lines of its log that no traffic excuses."""
        words = ("Traceback", "could not", "beginning anew", "ERROR")
        lines = self.log_path.read_text().splitlines()
        return [line[:300] for line in lines if any(word in line for word in words)]


def wait_until(condition: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
    """Wait for something that must come; TimeoutError if it does not."""
    until_s = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() >= until_s:
            raise TimeoutError(f"not within {wait_s:g} s: {what}")
        time.sleep(LOOK_S)
