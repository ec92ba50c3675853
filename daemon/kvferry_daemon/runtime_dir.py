"""The daemon's private directory: one daemon at a time, and what one life leaves to the next."""

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from kvferry_daemon.access import PRIVATE, Access
from kvferry_daemon.core.tenants import tenant_in

LOCK = "daemon.lock"
WORKERS = "workers"
POOLS = "pools"
WORKER_SOCKET, CONTROL_SOCKET = "worker.sock", "control.sock"
LEDGER, ASIDE = "ledger.db", "ledger.bad.db"
# The name of a pool's file, of core/tenants.py; the board beside it has an ending.
POOL_NAME = re.compile(r"[0-9a-f]{32}(-uid\d+)?(\.board)?")


class DirectoryTaken(Exception):
    """Another daemon holds the runtime directory."""


class DirectoryRefused(PermissionError):
    """The directory is somebody else's; nothing in it was touched."""


class RuntimeDir:
    """Holds a flock for as long as the daemon lives. Binding a ZeroMQ ipc path would silently

    steal a live daemon's socket, so the lock comes first.
    """

    def __init__(self, path: Path, access: Access = PRIVATE) -> None:
        """Create or take the directory, and open it to the groups that are to have access.

        DirectoryTaken names the holder's pid, DirectoryRefused a directory of our own to use
        instead, or a group that we cannot give it to, OSError the rest.
        """
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_others(path)
        self.path = path
        self._access = access
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(path / LOCK, flags, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise DirectoryTaken(f"{path} is held by the daemon with pid {holder}") from None
        path.chmod(0o700)  # not before we have it: it may be open to another daemon's workers
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())
        for name in (WORKERS, POOLS):
            (path / name).mkdir(mode=0o700, exist_ok=True)
        self._sweep()
        self._sweep_workers()
        self._share()

    def share_socket(self, path: Path) -> None:
        """Let those connect to a socket of ours, bound by now, who are to reach it."""
        access = self._access
        gid = access.worker_gid if path == self.worker_socket else access.directory_gid
        _give(path, gid, 0o660)

    def _share(self) -> None:
        """Workers map pools, and make lock files that they cannot list. The rest is our own.

        Files in the two folders are the group's too (setgid), whoever makes them.
        """
        _give(self.pools, self._access.worker_gid, 0o2750)
        _give(self.workers, self._access.worker_gid, 0o3730)
        for path in _files(self.pools):  # of an earlier life; one user's alone stay so
            if not tenant_in(path.stem):
                _give(path, self._access.worker_gid, 0o640 if path.suffix else 0o660)
        _give(self.path, self._access.directory_gid, 0o750)

    @property
    def number(self) -> int:
        """Tells this directory from a copy of it, and from others of this machine."""
        return os.fstat(self._lock).st_ino

    @property
    def workers(self) -> Path:
        """Where workers put their lock files."""
        return self.path / WORKERS

    @property
    def pools(self) -> Path:
        """Where pool files live."""
        return self.path / POOLS

    @property
    def worker_socket(self) -> Path:
        """The workers' socket."""
        return self.path / WORKER_SOCKET

    @property
    def control_socket(self) -> Path:
        """The operators' socket."""
        return self.path / CONTROL_SOCKET

    @property
    def ledger(self) -> Path:
        """What a later life has to know."""
        return self.path / LEDGER

    def close(self, *, keep: bool) -> None:
        """Let the next daemon in; ``keep`` its pools and ledger for it."""
        self._sweep()
        if not keep:
            self.sweep_pools(keep=set())
            for path in self._ledger_files():
                path.unlink(missing_ok=True)
        os.close(self._lock)

    def set_ledger_aside(self) -> Path:
        """Rename a ledger that cannot be used, for people to look at; only the last one is kept."""
        for path in self._ledger_files():
            if path.exists():
                path.rename(path.with_name(path.name.replace(LEDGER, ASIDE)))
        return self.path / ASIDE

    def sweep_pools(self, keep: set[str]) -> None:
        """Remove the pools that no ledger speaks of, and their boards."""
        for path in _files(self.pools):
            if POOL_NAME.fullmatch(path.name) and path.stem not in keep:
                path.unlink(missing_ok=True)

    def _ledger_files(self) -> list[Path]:
        return [self.path / f"{LEDGER}{end}" for end in ("", "-wal", "-shm", "-journal")]

    def _sweep(self) -> None:
        """Remove sockets of a daemon that is gone."""
        for socket in (self.worker_socket, self.control_socket):
            if socket.is_socket():
                socket.unlink()

    def _sweep_workers(self) -> None:
        """Remove the lock files of workers that died while no daemon was there to see it.

        A file that is held is a living worker's, who will say hello to us.
        """
        for path in _files(self.workers, of_all=True):
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                descriptor = os.open(path, flags)
            except (PermissionError, FileNotFoundError):
                continue  # another user's that we cannot look at, or gone with its worker
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                continue
            finally:
                os.close(descriptor)


def _give(path: Path, gid: int | None, mode: int) -> None:
    """Open a file to a group; without one it is its owner's alone. DirectoryRefused, OSError."""
    if gid is None:
        path.chmod(mode & 0o700)
        return
    try:
        os.chown(path, -1, gid, follow_symlinks=False)
    except PermissionError as error:
        raise DirectoryRefused(
            f"cannot give {path} to group {gid}: run the daemon as a member of it"
        ) from error
    path.chmod(mode)


def _refuse_others(path: Path) -> None:
    """DirectoryRefused unless the directory is ours: empty, or a daemon's before us."""
    owner, us = path.stat().st_uid, os.getuid()
    instead = f"name a directory inside it that the daemon makes itself, such as {path / 'kvferry'}"
    if owner != us:
        raise DirectoryRefused(f"{path} belongs to uid {owner}, and we are uid {us}; {instead}")
    # First the listing, then the lock: a daemon that starts beside us makes its lock first.
    if any(path.iterdir()) and not _is_our_file(path / LOCK):
        raise DirectoryRefused(f"{path} holds files that are not kvferry's; {instead}")
    for socket in (path / WORKER_SOCKET, path / CONTROL_SOCKET):  # libzmq would replace it
        if socket.is_symlink() or (socket.exists() and not socket.is_socket()):
            raise DirectoryRefused(f"{socket} is not a socket; move it away")


def _is_our_file(path: Path) -> bool:
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(facts.st_mode) and facts.st_uid == os.getuid()


def _files(directory: Path, *, of_all: bool = False) -> Iterator[Path]:
    """The regular files of a directory; a link or a folder there is none of our making."""
    is_one = _is_file if of_all else _is_our_file
    return (path for path in directory.iterdir() if is_one(path))


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
