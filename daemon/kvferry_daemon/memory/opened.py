"""Files for workers of other users."""

import os
import stat
from pathlib import Path


def open_as_directory(descriptor: int, directory: Path, mode: int) -> None:
    """Give a new file this mode if its directory gives what is made in it to a group (setgid)."""
    if directory.stat().st_mode & stat.S_ISGID:
        os.fchmod(descriptor, mode)
