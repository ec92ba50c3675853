"""Makes the demo's directory, and removes it once every process of the demo has ended.

All of them hold the writing end of this process's stdin, so its end proves that they are gone,
however they went; nothing can be written into the directory after that.
"""

import sys
import tempfile
from pathlib import Path

TMPFS = Path("/dev/shm")


def main() -> None:
    """Say where the directory is, and wait."""
    where = TMPFS if TMPFS.is_dir() else None
    with tempfile.TemporaryDirectory(
        prefix="kvferry-demo-", dir=where, ignore_cleanup_errors=True
    ) as directory:
        print(directory, flush=True)
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
