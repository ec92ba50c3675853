"""A daemon process for measurements: `kvferry serve`, its life and death, and what /proc says of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Self

from kvferry_daemon.operator import ask
from kvferry_proto import control

ROOT = Path(__file__).parent.parent
TICKS_A_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Facts(NamedTuple):
    """What the kernel says of a process."""

    rss_bytes: int
    cpu_s: float
    fds: int
    threads: int


class ServedDaemon:
    """A `kvferry serve` in a directory of its own. Leaves no process behind."""

    def __init__(self, directory: Path, **flags: object) -> None:
        self.directory = directory
        self.log_path = directory.with_suffix(".log")
        self._flags = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()

    def _program(self) -> list[str]:
        return ["kvferry_daemon"]

    def start(self) -> None:
        """Begin a life; it goes on with what the one before left."""
        command = [sys.executable, "-m", *self._program(), "serve"]
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
