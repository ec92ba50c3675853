"""Proof of death: each worker holds a flock on a file; the kernel drops it with the process."""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

UNSEEN_S = 5.0  # a lock without a hello for so long, that nobody holds, is a dead worker's


class Liveness:
    """Watches the lock files of worker sessions.

    A file is opened once, when its worker says hello, and looked at through that descriptor from
    then on: a path can vanish, and opening can fail for reasons that are no proof of anything.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, int] = {}  # name -> descriptor
        self._watched: dict[str, str] = {}  # session -> name
        self._gone: set[str] = set()  # watched sessions whose file is gone

    def is_held(self, name: str) -> bool:
        """Whether somebody holds the flock on this file of the directory; OSError if unknown."""
        descriptor = self._open.get(name)
        if descriptor is None:
            try:
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
                descriptor = os.open(self._directory / name, flags)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):
                    return False
                raise
            self._open[name] = descriptor
        if not _take(descriptor):
            return True
        if name not in self._watched.values():
            self._close(name)
        return False

    def watch(self, session: str, name: str) -> None:
        """Look at this file in every ``dead()`` from now on.

        ``is_held`` has seen it; or it is of an earlier life, and gone by now: only we remove such
        files, and only when nobody holds them.
        """
        if name not in self._open and not self.is_held(name):
            self._gone.add(session)
        self._watched[session] = name

    def dead(self) -> list[str]:
        """Sessions whose lock nobody holds any more; nothing but a lock that was had is proof."""
        for name in self._open.keys() - set(self._watched.values()):
            if _take(self._open[name]):
                self._close(name)  # its worker left before it was welcome
        return [
            session
            for session, name in self._watched.items()
            if session in self._gone or _take(self._open[name])
        ]

    def sweep(self) -> None:
        """Remove the files of workers that died before they were welcome.

        Not new ones: between a file's making and its lock a living worker holds it no more than a
        dead one does. One that is that slow is told ``worker_not_locked`` and takes a new file.
        """
        ours = self._open.keys() | self._watched.values()
        with os.scandir(self._directory) as found:
            entries = list(found)
        for entry in entries:
            # Its worker was the quicker one, or it is one of another user that we may not look at.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if entry.name not in ours and entry.is_file(follow_symlinks=False):
                    made_s = entry.stat(follow_symlinks=False).st_mtime
                    if time.time() - made_s > UNSEEN_S and not self.is_held(entry.name):
                        os.unlink(entry.path)

    def forget(self, session: str) -> None:
        """The session is over; remove its file."""
        name = self._watched.pop(session)
        (self._directory / name).unlink(missing_ok=True)
        if session in self._gone:
            self._gone.discard(session)
        else:
            self._close(name)

    def close(self) -> None:
        """Close every descriptor; the files stay, their holders may live."""
        self._watched.clear()
        for name in list(self._open):
            self._close(name)

    def _close(self, name: str) -> None:
        os.close(self._open.pop(name))


def _take(descriptor: int) -> bool:
    """Whether the lock could be had; it is given back at once."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True
