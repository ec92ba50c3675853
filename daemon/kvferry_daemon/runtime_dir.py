"""The daemon's private directory: one daemon at a time, nothing left over from the last one."""

import fcntl
import os
from pathlib import Path

WORKERS = "workers"
POOLS = "pools"


class DirectoryTaken(Exception):
    """Another daemon holds the runtime directory."""


class RuntimeDir:
    """Holds a flock for as long as the daemon lives. Binding a ZeroMQ ipc path would silently

    steal a live daemon's socket, so the lock comes first.
    """

    def __init__(self, path: Path) -> None:
        """Create or take the directory; DirectoryTaken names the holder's pid, OSError the rest."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = path.stat()
        if facts.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to uid {facts.st_uid}, not to us")
        path.chmod(0o700)
        self.path = path
        self._lock = os.open(path / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise DirectoryTaken(f"{path} is held by the daemon with pid {holder}") from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())
        for name in (WORKERS, POOLS):
            (path / name).mkdir(mode=0o700, exist_ok=True)
        self._sweep()

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
        return self.path / "worker.sock"

    @property
    def control_socket(self) -> Path:
        """The operators' socket."""
        return self.path / "control.sock"

    def close(self) -> None:
        """Remove what a next daemon would have to sweep, and let it in."""
        self._sweep()
        os.close(self._lock)

    def _sweep(self) -> None:
        """Remove sockets and pools of a daemon that is gone; workers' lock files are theirs."""
        for stale in (self.worker_socket, self.control_socket, *self.pools.iterdir()):
            stale.unlink(missing_ok=True)
