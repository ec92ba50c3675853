"""Where a daemon's runtime directory is if nobody says: daemon and worker look at the same place."""

import os
import stat
from pathlib import Path

from kvferry_proto.errors import Code, FerryError

ROOT = 0


def default_runtime_dir() -> Path:
    """A directory on tmpfs of this user's own."""
    return Path("/dev/shm") / f"kvferry-{os.getuid()}"


def check_runtime_dir(path: Path) -> None:
    """Raise FerryError(directory_refused) if what answers there may be anybody's.

    Any user may make the default directory before a daemon does; who names another one knows whose
    it is. One that is not there, or not to be seen, is found out by whoever uses it.
    """
    is_default = path == default_runtime_dir()
    try:
        facts = path.lstat() if is_default else path.stat()
    except OSError:
        return
    if is_default and not stat.S_ISDIR(facts.st_mode):
        raise _refused(path, "is no directory")
    if is_default and facts.st_uid not in (os.getuid(), ROOT):
        raise _refused(path, f"belongs to uid {facts.st_uid}, and this is uid {os.getuid()}")
    if facts.st_mode & stat.S_IWOTH:
        raise _refused(path, "is open to all: others may write to it")


def _refused(path: Path, why: str) -> FerryError:
    return FerryError(Code.DIRECTORY_REFUSED, f"{path} {why}; it is taken for no daemon's")
