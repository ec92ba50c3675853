"""Daemons for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.payloads import Daemons
from live import LiveDaemon


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    """A source's and a sink's daemon."""
    with LiveDaemon(tmp_path / "a") as a, LiveDaemon(tmp_path / "b") as b:
        yield a, b
        for daemon in (a, b):
            daemon.wait_until_free()
            assert "Traceback" not in daemon.log()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LiveDaemon]:
    """One that is not taken for stale while it stands still for a moment."""
    with LiveDaemon(tmp_path / "a", lost_s=30) as daemon:
        yield daemon
        assert "Traceback" not in daemon.log()
