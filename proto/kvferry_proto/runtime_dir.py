"""Where a daemon's runtime directory is if nobody says: daemon and worker look at the same place."""

import os
from pathlib import Path


def default_runtime_dir() -> Path:
    """A directory on tmpfs of this user's own."""
    return Path("/dev/shm") / f"kvferry-{os.getuid()}"
