"""Two daemons for two engines."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from live import LiveDaemon


@pytest.fixture
def a(tmp_path: Path) -> Iterator[LiveDaemon]:
    """The source's daemon."""
    with LiveDaemon(tmp_path / "a") as daemon:
        yield daemon
        daemon.wait_until_free()
        assert "Traceback" not in daemon.log()


@pytest.fixture
def b(tmp_path: Path) -> Iterator[LiveDaemon]:
    """The sink's daemon."""
    with LiveDaemon(tmp_path / "b") as daemon:
        yield daemon
        daemon.wait_until_free()
        assert "Traceback" not in daemon.log()
