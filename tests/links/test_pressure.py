"""The watch of memory looks at sockets of its own process, and must leave all else as it is."""

import asyncio
import fcntl
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any

import pytest

from kvferry_daemon.links.pressure import Pressure, connections_to

WAIT_S = 5.0

TAKE = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_a_lock_on_a_file_lasts(tmp_path: Path) -> None:
    """A process loses its locks on a file with any descriptor of it that it closes: the ledger's."""
    path = tmp_path / "ledger"
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        source: Any = SimpleNamespace(endpoint="tcp://127.0.0.1:1")
        assert connections_to([source]) == []
        took = subprocess.run(
            [sys.executable, "-c", TAKE, str(path)], capture_output=True, check=False
        )
    assert b"BlockingIOError" in took.stderr


def test_the_watch_outlives_a_time_without_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    def until_told() -> None:
        until_s = monotonic() + WAIT_S
        while not caplog.records and monotonic() < until_s:
            sleep(0.01)

    async def watched() -> bool:
        pressure = Pressure([], list)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = []
        try:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), limits[1])
            )
            with suppress(OSError):
                while True:
                    spare.append(os.dup(0))
            until_told()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for one in spare:
                os.close(one)
        is_alive = pressure._thread.is_alive()
        pressure.close()
        return is_alive

    assert asyncio.run(watched())
    assert [one.getMessage() for one in caplog.records] == ["could not watch memory"]
