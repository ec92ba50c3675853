"""Proof of death: each worker holds a flock on a file; the kernel drops it with the process."""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

UNSEEN_S = 5.0  # a lock without a hello for so long, that nobody holds, is a dead worker's

KEPT_MAX = 256  # files that are held, of no session: each is a descriptor of ours


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
            self._keep_few()
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
        looked = 0
        with os.scandir(self._directory) as found:
            entries = list(found)
        for entry in entries:
            # Its worker was the quicker one, or it is one of another user that we may not look at.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if entry.name in ours or not entry.is_file(follow_symlinks=False):
                    continue
                facts = entry.stat(follow_symlinks=False)
                if time.time() - facts.st_mtime <= UNSEEN_S:
                    continue
                if facts.st_nlink == 1:  # else no worker of ours made it, held or not
                    looked += 1
                    if looked > KEPT_MAX:
                        break  # the others at the next beat
                    if self.is_held(entry.name):
                        continue
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

    def _keep_few(self) -> None:
        """Of those that no session has; who comes later with one that was closed has it opened."""
        if len(self._open) > len(self._watched) + KEPT_MAX:
            of_sessions = set(self._watched.values())
            self._close(next(name for name in self._open if name not in of_sessions))

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
