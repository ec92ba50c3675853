"""A daemon process for measurements: its life and death, and what /proc and it itself say of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kvferry_daemon.operator import ask
from kvferry_proto import control

ROOT = Path(__file__).parent.parent
WAIT_S = 60.0
LOOK_S = 0.05
TICKS_A_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Facts(NamedTuple):
    """What the kernel says of a process."""

    rss_bytes: int
    cpu_s: float
    fds: int
    threads: int


class WatchedDaemon:
    """A `kvferry serve` that can be asked what it holds."""

    def __init__(self, directory: Path, **flags: object) -> None:
        self.directory = directory
        self.report_path = directory.with_suffix(".report")
        self.log_path = directory.with_suffix(".log")
        self._flags = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        self.start()

    def start(self) -> None:
        """Begin a life; it goes on with what the one before left."""
        command = [sys.executable, "-m", "bench.inside", str(self.report_path), "serve"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, f"--runtime-dir={self.directory}", *self._flags],
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log_path.read_text()
        self.address: str = json.loads(line)["peer_address"]

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def status(self) -> control.Status:
        """What `kvferry status` shows."""
        answer = ask(self.directory, control.GetStatus())
        assert isinstance(answer, control.Status)
        return answer

    def facts(self) -> Facts:
        """What the kernel knows; the daemon notices nothing."""
        process = Path(f"/proc/{self.process.pid}")
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        return Facts(
            rss_bytes=int((process / "statm").read_text().split()[1]) * PAGE_BYTES,
            cpu_s=(int(fields[11]) + int(fields[12])) / TICKS_A_S,
            fds=len(list((process / "fd").iterdir())),
            threads=int(fields[17]),
        )

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
