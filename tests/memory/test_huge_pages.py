"""Huge pages: what a mount says, and that pools on real mounts lie in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvferry_daemon.memory.huge_pages import SHMEM_ENABLED, huge_pages
from memory.huge_pool import FOUND

UNSHARE = ["unshare", "--map-root-user", "--mount"]


def mounts(root: Path, kind: str, options: str) -> Path:
    """A mount table in which the directory's device is mounted so, and another one otherwise."""
    device = root.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    path = root / "mountinfo"
    path.write_text(
        "21 1 9:9999 / /other rw shared:5 - tmpfs other rw,huge=always\n"
        f"36 35 {name} / /here rw,nosuid master:1 shared:2 - {kind} name {options}\n"
    )
    return path


@pytest.mark.parametrize(
    ("kind", "options", "machine", "expected"),
    [
        ("tmpfs", "rw,size=64k,huge=within_size", "always [never] deny force", "within_size"),
        ("tmpfs", "rw,huge=advise,mode=755", "always [never] deny force", "advise"),
        ("tmpfs", "rw", "always [never] deny force", "never"),
        ("tmpfs", "rw,huge=always", "always never [deny] force", "never"),
        ("tmpfs", "rw", "always never deny [force]", "always"),
        ("ext4", "rw", "always never deny [force]", "never"),
    ],
)
def test_the_mount_says_it_and_the_machine_may_overrule(
    tmp_path: Path, kind: str, options: str, machine: str, expected: str
) -> None:
    (tmp_path / "enabled").write_text(machine)
    assert huge_pages(tmp_path, mounts(tmp_path, kind, options), tmp_path / "enabled") == expected


def test_a_system_that_tells_nothing_gives_none(tmp_path: Path) -> None:
    assert huge_pages(tmp_path, tmp_path / "nothing", tmp_path / "nothing") == "never"


@pytest.mark.parametrize(
    ("option", "advised", "mapped_huge"),
    [("never", False, False), ("advise", True, True), ("within_size", True, True)],
)
def test_a_pool_on_a_mount(tmp_path: Path, option: str, advised: bool, mapped_huge: bool) -> None:
    """The daemon's mapping, and the plain one of a worker, as the kernel has them."""
    if not SHMEM_ENABLED.exists() or "[deny]" in SHMEM_ENABLED.read_text():
        pytest.skip("this kernel has no huge pages for tmpfs")
    mount = f"mount -t tmpfs -o size=64m,huge={option} pools {tmp_path}"
    if subprocess.run([*UNSHARE, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("we may not mount a tmpfs")
    script = Path(__file__).parent / "huge_pool.py"
    command = f"{mount} && exec {sys.executable} {script} {tmp_path}"
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = FOUND.fullmatch(done.stdout.strip())
    assert found, done.stdout
    assert found["when"] == option
    assert (found["advised"] == "True", found["allocated"]) == (advised, str(32 << 20))
    wanted = str(32 << 10) if mapped_huge else "0"
    assert (found["daemon"], found["worker"]) == (wanted, wanted)
