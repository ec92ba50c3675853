"""The processes of the demo: daemons and workers, each with its lines of JSON on stdout."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

END_S = 5.0
PREFIX = "kvferry_daemon.demo"


class ProcessFailed(Exception):
    """A process of the demo ended badly; the message has the end of what it said."""


class Child:
    """One process that says JSON objects, a line each. It dies with its context."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    @classmethod
    async def start(
        cls, name: str, module: str, args: list[str], logs: Path, alive: int = -1
    ) -> "Child":
        """Run ``python -m module args``; stderr goes to a file in ``logs``.

        It holds the descriptor ``alive`` for as long as it lives, and dies with this process.
        """
        log = logs / f"{name}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", f"{PREFIX}.child", str(os.getpid()), module, *args,
                stdout=asyncio.subprocess.PIPE, stderr=stderr, env=_environment(),
                pass_fds=() if alive < 0 else (alive,), limit=1 << 24,
            )  # fmt: skip
        return cls(name, process, log)

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        """Yield what it says until it closes its stdout; ProcessFailed if it then exits badly."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            yield json.loads(line)
        code = await self._process.wait()
        if code != 0:
            raise ProcessFailed(f"{self.name} ended with code {code}:\n{self._tail()}")

    async def first_line(self) -> dict[str, Any]:
        """What it says first; ProcessFailed if it says nothing."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise ProcessFailed(f"{self.name} said nothing:\n{self._tail()}")
        said: dict[str, Any] = json.loads(line)
        return said

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:].strip() or "nothing on stderr"

    async def stop(self) -> None:
        """Ask it to end, then end it."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(END_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


class Home:
    """The demo's directory. It goes when the last process that holds ``alive`` has ended."""

    def __init__(self) -> None:
        """Start the keeper, in a session of its own: Ctrl-C at a terminal is not for it.

        Not by way of asyncio, which kills what it started when it is told to end.
        """
        reader, self.alive = os.pipe()
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", f"{PREFIX}.keeper"],
            stdin=reader,
            stdout=subprocess.PIPE,
            env=_environment(),
            text=True,
            start_new_session=True,
        )
        os.close(reader)
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline().rstrip("\n")
        if not line:
            raise ProcessFailed("no directory could be made")
        self.path = Path(line)

    def leave(self) -> None:
        """Let go of it, and see it gone."""
        os.close(self.alive)
        self._keeper.communicate()


def _environment() -> dict[str, str]:
    """Ours, but for settings of kvferry: they are meant for another daemon than the demo's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVFERRY_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
