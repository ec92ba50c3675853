"""The four processes: how they are started, killed, stopped, asked and counted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults.points import VARIABLE
from live import WINDOW, LiveDaemon

WAIT_S = 30.0
LOOK_S = 0.01
SETTLED = 8  # equal censuses in a row


def until(condition: Callable[[], Any], what: object = "", wait_s: float = WAIT_S) -> Any:
    """Look until a condition holds; return what it says."""
    deadline_s = time.monotonic() + wait_s
    while not (said := condition()):
        assert time.monotonic() < deadline_s, what() if callable(what) else what
        time.sleep(LOOK_S)
    return said


def environment(**more: str) -> dict[str, str]:
    """What a child needs to import what we import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


class Process:
    """What daemons and workers have in common."""

    process: subprocess.Popen[bytes]
    log_path: Path

    def spawn(
        self, args: list[str], trap: str | None, prefix: Sequence[str] = (), **more: str
    ) -> None:
        """Start it, with a trap in it if there is to be one; ``prefix`` execs what follows it."""
        if trap is not None:
            more[VARIABLE] = trap
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", *args],
                env=environment(**more),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    @property
    def alive(self) -> bool:
        """Whether it runs, or stands still."""
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; what SIGSTOP and SIGKILL do is done when this returns."""
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.end()
        elif number is signal.SIGSTOP:
            stat = Path(f"/proc/{self.process.pid}/stat")
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def end(self, wait_s: float | None = None) -> int:
        """Wait for its end, and close its pipes."""
        code = self.process.wait(wait_s)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return code

    def make_sure_that_it_is_gone(self) -> None:
        """Whatever happened."""
        if self.alive:
            self.process.kill()
        self.end()


class FaultDaemon(Process, LiveDaemon):
    """A daemon under `faults.daemon`; ready only when ``wait_ready`` says so."""

    def __init__(
        self,
        directory: Path,
        trap: str | None = None,
        prefix: Sequence[str] = (),
        papers: Path | None = None,
        **flags: object,
    ) -> None:
        """``papers``: where log and census go, if not beside the runtime directory."""
        self.directory = directory
        self.flags = {
            "window_tokens": WINDOW,
            "pool_tokens": 4 * WINDOW,
            "chunk_bytes": 1280,  # two blocks
            "heartbeat_s": 0.2,
            "resend_max_s": 0.5,
            "drain_s": 0.5,
            "stall_s": 25.0,
            **flags,
        }
        self.log_path = (papers or directory.parent) / f"{directory.name}.log"
        self.census_path = self.log_path.with_suffix(".census")
        given = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in self.flags.items()
        ]
        args = ["faults.daemon", "serve", f"--runtime-dir={directory}", *given]
        self.spawn(args, trap, prefix, FAULTS_CENSUS=str(self.census_path))

    def log(self) -> str:
        """What it wrote to stderr."""
        return self.log_path.read_text()

    def wait_ready(self) -> None:
        """Wait for its address."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        self.address = json.loads(line)["peer_address"]

    def census(self) -> dict[str, Any]:
        """What it has, by its own account."""
        self.census_path.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        until(self.census_path.exists, "no census")
        found: dict[str, Any] = json.loads(self.census_path.read_text())
        for name, most in (("kvferry-memory", 2), ("kvferry-connect", 4), ("asyncio", 4)):
            assert found["pooled"].get(name, 0) <= most, found
        del found["pooled"]
        return found

    def settled_census(self) -> dict[str, Any]:
        """The same, once it stays as it is: our own questions' connections linger a little."""
        last: list[dict[str, Any]] = []

        def is_settled() -> bool:
            last.append(self.census())
            return last[-SETTLED:] == [last[-1]] * SETTLED

        until(is_settled, lambda: last[-SETTLED:])
        return last[-1]

    def files(self) -> dict[str, int]:
        """How many files of each kind its runtime directory holds."""
        counts: dict[str, int] = {}
        for path in self.directory.rglob("*"):
            if not path.is_dir():
                inside = path.parent != self.directory
                name = path.parent.name if inside else path.name
                counts[name] = counts.get(name, 0) + 1
        return counts


class FaultWorker(Process):
    """A worker under `faults.worker`."""

    def __init__(
        self, role: str, runtime_dir: Path, results: Path, trap: str | None = None
    ) -> None:
        self.role = role
        self.results = results
        self.log_path = results / f"{role}.log"
        (results / f"{role}.joined").unlink(missing_ok=True)
        self.spawn(["faults.worker", role, str(runtime_dir), str(results)], trap)

    def wait_ready(self) -> None:
        """Wait until it has joined its daemon."""
        joined = self.results / f"{self.role}.joined"
        until(lambda: joined.exists() or not self.alive, f"{self.role} never joined")
        assert self.alive, self.log_path.read_text()

    def order(self, name: str, attempt: int, **more: Any) -> None:
        """Let it make an attempt."""
        assert self.process.stdin is not None
        line = json.dumps({"name": name, "attempt": attempt, **more})
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def outcome(self, name: str, attempt: int) -> str | None:
        """How an attempt ended: "" is well, None not yet."""
        path = self.results / f"{name}.{attempt}.{self.role}"
        return path.read_text() if path.exists() else None

    def leave(self) -> None:
        """Let it go in peace."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(WAIT_S) == 0, self.log_path.read_text()
        self.end()
