"""Proof of death: each worker holds a flock on a file; the kernel drops it with the process."""

import fcntl
import os
from pathlib import Path


class Liveness:
    """Watches the lock files of worker sessions."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._watched: dict[str, tuple[int, Path]] = {}

    def is_held(self, name: str) -> bool:
        """Whether somebody holds the flock on this file of the directory."""
        try:
            descriptor = self._open(self._directory / name)
        except OSError:
            return False
        try:
            return not _take(descriptor)
        finally:
            os.close(descriptor)

    def watch(self, session: str, name: str) -> None:
        """Look at this file in every ``dead()`` from now on."""
        path = self._directory / name
        try:
            self._watched[session] = (self._open(path), path)
        except OSError:
            self._watched[session] = (-1, path)  # it vanished: nobody can hold it

    def dead(self) -> list[str]:
        """Sessions whose lock nobody holds any more."""
        return [s for s, (fd, _) in self._watched.items() if fd < 0 or _take(fd)]

    def forget(self, session: str) -> None:
        """The session is over; remove its file."""
        descriptor, path = self._watched.pop(session)
        path.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        """Close every descriptor; the files stay, their holders may live."""
        for descriptor, _ in self._watched.values():
            if descriptor >= 0:
                os.close(descriptor)
        self._watched.clear()

    def _open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def _take(descriptor: int) -> bool:
    """Whether the lock could be had; it is given back at once."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True
