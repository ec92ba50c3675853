"""Proof of death is a lock that was had, and nothing else."""

import contextlib
import fcntl
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry_daemon.links import liveness as module
from kvferry_daemon.links.liveness import KEPT_MAX, UNSEEN_S, Liveness


@pytest.fixture
def liveness(tmp_path: Path) -> Iterator[Liveness]:
    one = Liveness(tmp_path)
    yield one
    one.close()


def held(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_worker_is_dead_once_its_lock_is_free(liveness: Liveness, tmp_path: Path) -> None:
    descriptor = held(tmp_path / "w")
    assert liveness.is_held("w")
    liveness.watch("session", "w")
    assert liveness.dead() == []
    os.close(descriptor)
    assert liveness.dead() == ["session"]
    liveness.forget("session")
    assert not (tmp_path / "w").exists()
    assert liveness.dead() == []


@pytest.mark.parametrize("what", ["no file", "a file that nobody holds", "a link"])
def test_what_is_not_held(liveness: Liveness, tmp_path: Path, what: str) -> None:
    before = descriptors()
    if what == "a file that nobody holds":
        (tmp_path / "w").touch()
    if what == "a link":
        (tmp_path / "w").symlink_to(tmp_path / "other")
    assert not liveness.is_held("w")
    assert descriptors() == before


def test_no_descriptor_left_is_no_proof_of_death(liveness: Liveness, tmp_path: Path) -> None:
    """A living worker's blocks were given to others while it wrote to them."""
    descriptor = held(tmp_path / "w")
    held_too = held(tmp_path / "v")
    assert liveness.is_held("w")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 10, limits[1]))
    spare = []
    try:
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.dup(descriptor))
        liveness.watch("session", "w")
        assert liveness.dead() == []
        with pytest.raises(OSError, match="Too many open files"):
            liveness.is_held("v")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for one in spare:
            os.close(one)
        os.close(descriptor)
        os.close(held_too)


def test_a_file_that_vanished_is_no_proof_of_death(liveness: Liveness, tmp_path: Path) -> None:
    descriptor = held(tmp_path / "w")
    assert liveness.is_held("w")
    liveness.watch("session", "w")
    (tmp_path / "w").unlink()
    assert liveness.dead() == []
    os.close(descriptor)
    assert liveness.dead() == ["session"]
    liveness.forget("session")


def test_a_worker_that_left_before_it_was_welcome_costs_nothing(
    liveness: Liveness, tmp_path: Path
) -> None:
    before = descriptors()
    descriptor = held(tmp_path / "w")
    assert liveness.is_held("w")
    os.close(descriptor)
    assert liveness.dead() == []
    assert descriptors() == before


def age(path: Path) -> None:
    """Let a file look old enough to be swept."""
    made_s = path.lstat().st_mtime - 2 * UNSEEN_S
    os.utime(path, (made_s, made_s), follow_symlinks=False)


def test_a_lock_that_nobody_holds_is_swept_once_it_is_old(
    liveness: Liveness, tmp_path: Path
) -> None:
    """A living worker may stand between the file's making and its lock."""
    before = descriptors()
    for name in ("new", "old"):
        (tmp_path / name).touch()
    age(tmp_path / "old")
    liveness.sweep()
    assert os.listdir(tmp_path) == ["new"]
    assert descriptors() == before


def test_a_lock_from_the_future_is_swept_as_well(liveness: Liveness, tmp_path: Path) -> None:
    """A worker gives its files what time it likes, and would fill the directory for good."""
    (tmp_path / "future").touch()
    os.utime(tmp_path / "future", (1 << 33, 1 << 33))
    (tmp_path / "new").touch()
    liveness.sweep()
    assert os.listdir(tmp_path) == ["new"]


def test_a_beat_looks_at_so_many_files_and_comes_to_all(
    liveness: Liveness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing a million of them held the loop up for seconds, each beat."""
    monkeypatch.setattr(module, "SCAN_MAX", 10)
    for number in range(35):
        (tmp_path / f"old{number}").touch()
        age(tmp_path / f"old{number}")
    left = []
    for _ in range(5):
        liveness.sweep()
        left.append(len(os.listdir(tmp_path)))
    assert left == [25, 15, 5, 0, 0]
    (tmp_path / "later").touch()
    age(tmp_path / "later")
    liveness.sweep()
    assert os.listdir(tmp_path) == []


def test_what_is_held_watched_or_no_file_is_not_swept(liveness: Liveness, tmp_path: Path) -> None:
    descriptors_held = {name: held(tmp_path / name) for name in ("unseen", "watched")}
    assert liveness.is_held("watched")
    liveness.watch("session", "watched")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for path in tmp_path.iterdir():
        age(path)
    for _ in range(2):
        liveness.sweep()
        assert sorted(os.listdir(tmp_path)) == ["folder", "link", "unseen", "watched"]
    os.close(descriptors_held.pop("watched"))
    liveness.sweep()
    assert (tmp_path / "watched").exists(), "its session is not over before that was noted"
    assert liveness.dead() == ["session"]
    os.close(descriptors_held.pop("unseen"))
    liveness.dead()
    liveness.sweep()
    assert not (tmp_path / "unseen").exists()


def test_many_names_of_one_lock_cost_no_descriptors(liveness: Liveness, tmp_path: Path) -> None:
    before = descriptors()
    descriptor = held(tmp_path / "w")
    for number in range(50):
        os.link(tmp_path / "w", tmp_path / f"w{number}")
    age(tmp_path / "w")
    liveness.sweep()
    assert descriptors() <= before + 2
    assert len(os.listdir(tmp_path)) <= 1
    os.close(descriptor)


def test_locks_of_no_session_are_kept_open_up_to_a_bound(
    liveness: Liveness, tmp_path: Path
) -> None:
    locks = [held(tmp_path / f"w{number}") for number in range(KEPT_MAX + 20)]
    before = descriptors()
    for path in tmp_path.iterdir():
        age(path)
    assert liveness.is_held("w0")
    liveness.watch("session", "w0")
    for number in range(1, KEPT_MAX + 20):
        assert liveness.is_held(f"w{number}")  # as of a hello
    liveness.sweep()
    assert descriptors() - before == KEPT_MAX + 1
    assert liveness.dead() == []
    for lock in locks:
        os.close(lock)
    assert liveness.dead() == ["session"]
    for _ in range(2):  # it looks at so many a beat
        liveness.sweep()
    assert os.listdir(tmp_path) == ["w0"]
