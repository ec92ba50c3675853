"""Two daemons for the tests of this folder: each layout has a pool of its own there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf.moving import Daemons
from live import LiveDaemon


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """A source's and a sink's daemon, for all tests of a file."""
    directory: Path = tmp_path_factory.mktemp("hf")
    with LiveDaemon(directory / "a") as a, LiveDaemon(directory / "b") as b:
        yield a, b
        for daemon in (a, b):
            daemon.wait_until_free()
            assert "Traceback" not in daemon.log()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More would only wait for each other beside two daemons."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
