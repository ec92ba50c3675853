"""The command line as a process of its own: what a shell sees of it."""

import os
import subprocess
import sys
from pathlib import Path

WAIT_S = 30


def kvferry(
    *args: object, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with only those KVFERRY_ variables that are given."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("KVFERRY_")}
    return subprocess.run(
        [sys.executable, "-m", "kvferry_daemon", *map(str, args)],
        env={**others, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
