"""The daemon's own directory: what it takes, what it refuses, and what it never deletes."""

import fcntl
import os
import re
import socket
import stat
from pathlib import Path

import pytest
import zmq

from cli.processes import kvferry
from kvferry_client import connect
from kvferry_daemon.runtime_dir import DirectoryRefused, DirectoryTaken, RuntimeDir
from live import LAYOUT, LiveDaemon

TOP = Path(__file__).parent.parent.parent
POOL = "0123456789abcdef" * 2
EXIT_SERVE = 3


def everything(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of all that is in a directory, itself included."""
    paths = [directory, *sorted(directory.rglob("*"))]
    return {str(p): (p.lstat().st_mode, p.read_bytes() if p.is_file() else b"") for p in paths}


def test_a_new_directory_is_made_with_its_parents_and_is_private(tmp_path: Path) -> None:
    directory = RuntimeDir(tmp_path / "mount" / "kvferry")
    for path in (directory.path, directory.workers, directory.pools):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    directory.close(keep=False)


def test_a_running_daemon_has_a_place_for_its_workers(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as daemon:
        assert (daemon.directory / "workers").is_dir()


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    RuntimeDir(tmp_path).close(keep=False)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@pytest.mark.parametrize("lock", ["none", "link", "folder"])
def test_a_directory_of_something_else_is_refused_unchanged(tmp_path: Path, lock: str) -> None:
    shared = tmp_path / "shared"
    (shared / "pools").mkdir(parents=True)
    (shared / "pools" / POOL).write_text("somebody's work")
    (shared / "worker.sock").write_text("somebody's too")
    (tmp_path / "target").write_text("and this")
    if lock == "link":
        (shared / "daemon.lock").symlink_to(tmp_path / "target")
    elif lock == "folder":
        (shared / "daemon.lock").mkdir()
    shared.chmod(0o755)
    before = everything(tmp_path)
    done = kvferry("serve", "--runtime-dir", shared)
    assert (done.returncode, done.stdout) == (EXIT_SERVE, "")
    assert f"such as {shared / 'kvferry'}" in done.stderr
    assert everything(tmp_path) == before
    RuntimeDir(shared / "kvferry").close(keep=False)  # the remedy


def test_a_directory_of_another_user_is_refused_with_a_remedy(tmp_path: Path) -> None:
    if os.getuid() == 0:
        others = tmp_path / "mount"
        others.mkdir()
        os.chown(others, 10001, 10001)
    else:
        others = Path("/dev/shm")
    with pytest.raises(DirectoryRefused, match=re.escape(f"such as {others / 'kvferry'}")):
        RuntimeDir(others)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_container_user_starts_in_a_mount_of_root() -> None:
    mount = Path("/tmp") / f"kvferry-mount-{os.getpid()}"  # all may go there, as not in tmp_path
    mount.mkdir()
    mount.chmod(0o777)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setuid(10001)
            RuntimeDir(mount / "kvferry").close(keep=False)
            code = 0
        finally:
            os._exit(code)
    try:
        assert os.waitpid(child, 0)[1] == 0
        assert (mount / "kvferry").stat().st_uid == 10001
    finally:
        for path in sorted(mount.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        mount.rmdir()


def test_what_is_deployed_names_a_directory_inside_of_the_mount() -> None:
    (named,) = re.findall(
        r"^ENV KVFERRY_RUNTIME_DIR=(\S+)$", (TOP / "Dockerfile").read_text(), re.MULTILINE
    )
    mount = str(Path(named).parent)
    assert f"-m 0700 {mount}\n" in (TOP / "Dockerfile").read_text()
    guide = (TOP / "deploy" / "README.md").read_text()
    assert f"`{mount}`" in guide
    assert f"`{named}`" in guide


def leave_a_socket(path: Path) -> None:
    """As a daemon that was killed does."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


@pytest.mark.parametrize("name", ["worker.sock", "control.sock"])
def test_what_is_no_socket_is_not_replaced_by_one(tmp_path: Path, name: str) -> None:
    """libzmq's own bind would: see it do so."""
    RuntimeDir(tmp_path).close(keep=False)
    (tmp_path / name).write_text("dear")
    started = kvferry("serve", "--runtime-dir", tmp_path)
    assert started.returncode == EXIT_SERVE
    assert f"{tmp_path / name} is not a socket" in started.stderr
    assert (tmp_path / name).read_text() == "dear"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as plain:
        plain.bind(f"ipc://{tmp_path / name}")
        assert (tmp_path / name).is_socket()


def test_only_what_bears_our_names_is_swept(tmp_path: Path) -> None:
    RuntimeDir(tmp_path).close(keep=False)
    sockets = [tmp_path / "worker.sock", tmp_path / "control.sock"]
    for path in sockets:
        leave_a_socket(path)
    stale = [tmp_path / "pools" / POOL]
    kept = [tmp_path / "notes", tmp_path / "pools" / "notes", tmp_path / "pools" / f"{POOL}.bak"]
    for path in (*stale, *kept):
        path.write_text("x")
    folder, link = tmp_path / "pools" / ("a" * 32), tmp_path / "pools" / ("b" * 32)
    folder.mkdir()
    link.symlink_to(tmp_path / "notes")
    directory = RuntimeDir(tmp_path)
    directory.sweep_pools(keep=set())
    assert [path for path in (*stale, *sockets) if path.exists()] == []
    assert [path for path in (*kept, folder, link) if not path.exists()] == []
    (tmp_path / "pools" / POOL).write_text("x")
    directory.close(keep=False)
    assert not (tmp_path / "pools" / POOL).exists()
    assert [path for path in (*kept, folder, link) if not path.exists()] == []


def test_the_name_of_a_pool_file_is_one_that_is_swept(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as daemon:
        with connect(daemon.directory, LAYOUT) as client:
            pool = Path(client.welcome.pool.path)
            daemon.process.kill()
            daemon.process.wait()
        assert pool.exists()
        RuntimeDir(daemon.directory).close(keep=False)
        assert not pool.exists()


def test_lock_files_of_dead_workers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    RuntimeDir(tmp_path).close(keep=False)
    dead, living = tmp_path / "workers" / "dead", tmp_path / "workers" / "living"
    dead.touch()
    with living.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        directory = RuntimeDir(tmp_path)
        assert (dead.exists(), living.exists()) == (False, True)
        assert os.fstat(held.fileno()).st_nlink == 1
        directory.close(keep=False)
        assert living.exists(), "its worker may find the next daemon"


def test_a_taken_directory_names_the_holder_and_is_left_alone(tmp_path: Path) -> None:
    first = RuntimeDir(tmp_path)
    leave_a_socket(tmp_path / "worker.sock")
    with pytest.raises(DirectoryTaken, match=f"pid {os.getpid()}"):
        RuntimeDir(tmp_path)
    assert (tmp_path / "worker.sock").exists()
    first.close(keep=False)
    RuntimeDir(tmp_path).close(keep=False)
