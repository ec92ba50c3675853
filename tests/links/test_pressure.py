"""The watch of memory looks at sockets of its own process, and must leave all else as it is."""

import fcntl
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvferry_daemon.links.pressure import connections_to

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
