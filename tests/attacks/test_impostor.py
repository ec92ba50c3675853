"""Somebody makes the directory that a worker takes for its daemon's if nobody names one. Needs root."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks.scene import OTHER, stranger
from live import LiveDaemon

WORKERS, VICTIM = 47001, 65531
PLACE = Path("/dev/shm") / f"kvferry-{VICTIM}"
SECRET = os.urandom(32).hex()

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as other users")


@pytest.fixture
def impostor() -> Iterator[LiveDaemon]:
    """A daemon in the victim's default directory, which somebody else has made."""
    with LiveDaemon(PLACE, worker_group=WORKERS) as daemon:
        os.chown(PLACE, OTHER, -1)
        yield daemon
    shutil.rmtree(PLACE)
    PLACE.with_suffix(".log").unlink()


@pytest.mark.parametrize(("defence", "told"), [("off", "written"), ("on", "directory_refused")])
def test_a_worker_writes_nothing_into_an_impostors_pool(
    impostor: LiveDaemon, defence: str, told: str
) -> None:
    assert stranger(VICTIM, "write", PLACE, SECRET, defence, gid=WORKERS) == told
    pools = [path.read_bytes() for path in impostor.directory.glob("pools/*")]
    assert any(bytes.fromhex(SECRET) in pool for pool in pools) is (defence == "off")
    locks = list(impostor.directory.glob("workers/*"))
    assert locks == [] or defence == "off"


def test_an_operator_asks_no_impostor(impostor: LiveDaemon) -> None:
    assert stranger(VICTIM, "asks", PLACE, gid=WORKERS) == "directory_refused"
    assert stranger(OTHER, "asks", PLACE, gid=WORKERS) == "status"  # he names it


def test_a_directory_of_roots_or_of_ones_own_is_as_good_as_ever(impostor: LiveDaemon) -> None:
    for uid in (0, VICTIM):
        os.chown(PLACE, uid, -1)
        assert stranger(VICTIM, "asks", PLACE, gid=WORKERS) == "status"
    assert stranger(VICTIM, "write", PLACE, SECRET, "on", gid=WORKERS) == "written"
    impostor.wait_for_workers(0)
