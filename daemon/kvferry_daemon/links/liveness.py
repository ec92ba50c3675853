"""Proof of death: each worker holds a flock on a file; the kernel drops it with the process."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

UNSEEN_S = 5.0  # a lock without a hello for so long, that nobody holds, is a dead worker's
KEPT_MAX = 256  # files that are held, of no session: each is a descriptor of ours
SCAN_MAX = 1024  # files that are looked at a beat: workers can make as many as they like


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
        self._scan: Iterator[os.DirEntry[str]] | None = None  # where the sweep has come to

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
        looked = scanned = 0
        while looked < KEPT_MAX and scanned < SCAN_MAX:  # the others at the next beat
            entry = self._next()
            if entry is None:
                return
            scanned += 1
            # Its worker was the quicker one, or it is one of another user that we may not look at.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if entry.name not in ours and entry.is_file(follow_symlinks=False):
                    looked += self._look(entry)

    def _next(self) -> os.DirEntry[str] | None:
        """The next one of the directory; None at its end, and then it begins anew."""
        if self._scan is None:
            self._scan = self._walk()
        entry = next(self._scan, None)
        if entry is None:
            self._scan = None
        return entry

    def _walk(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self._directory) as found:
            yield from found

    def _look(self, entry: os.DirEntry[str]) -> bool:
        """Remove a file that is nobody's; whether a descriptor was needed to find out."""
        facts = entry.stat(follow_symlinks=False)
        if abs(time.time() - facts.st_mtime) <= UNSEEN_S:  # it may have any, the future too
            return False
        has_one_name = facts.st_nlink == 1  # else no worker of ours made it, held or not
        if not (has_one_name and self.is_held(entry.name)):
            os.unlink(entry.path)
        return has_one_name

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
        self._scan = None
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
