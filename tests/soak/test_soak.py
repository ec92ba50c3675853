"""The short form of `make soak`: nothing lost, nothing wrong, nothing left. Says nothing of speed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)
TOP = Path(__file__).parent.parent.parent


def test_nothing_is_lost_and_nothing_is_left() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVFERRY_")}
    running = subprocess.Popen(
        [sys.executable, "-m", "bench.load", "--short"],
        cwd=TOP,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = running.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody of its group is left
            os.killpg(running.pid, signal.SIGKILL)
    assert stdout, stderr
    result = json.loads(stdout)
    assert result["violations"] == []
    assert running.returncode == 0, stderr
    assert result["flood"]["calls"].keys() >= {"ready", "poll", "wait", "beat", "batch", "resume"}
    steady = result["soak"]["steady"]
    assert {"handoff", "network", "consume", "whole", "groups", "workers_killed"} <= steady.keys()
    assert result["soak"]["restarts"]["daemons_killed"] > 0
