"""Files for workers of other users: of a group, or one user's alone."""

import os
import stat
import struct
from pathlib import Path

ACL = "system.posix_acl_access"
ACL_VERSION = 2
OWNER, USER, GROUP, MASK, OTHERS = 0x01, 0x02, 0x04, 0x10, 0x20  # of an entry; in this order
NO_ID = 0xFFFFFFFF
READ, WRITE = 4, 2


def open_as_directory(descriptor: int, directory: Path, mode: int) -> None:
    """Give a new file this mode if its directory gives what is made in it to a group (setgid)."""
    if directory.stat().st_mode & stat.S_ISGID:
        os.fchmod(descriptor, mode)


def open_to_user(descriptor: int, uid: int, *, writable: bool) -> None:
    """Let one other user open a new file (mode 0600), and nobody of its group; OSError.

    Its mode then shows the most that anybody may, where it showed the group's.
    """
    if uid == os.getuid():
        return  # its owner
    may = READ | WRITE if writable else READ
    entries = (
        (OWNER, READ | WRITE, NO_ID), (USER, may, uid), (GROUP, 0, NO_ID), (MASK, may, NO_ID),
        (OTHERS, 0, NO_ID),
    )  # fmt: skip
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(descriptor, ACL, struct.pack("<I", ACL_VERSION) + packed)


def check_lists(directory: Path) -> None:
    """Raise OSError unless files here can be one user's; it is tried, since only that tells."""
    path = directory / ".may-be-one-users"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        open_to_user(descriptor, os.getuid() + 1, writable=True)
    except OSError as error:
        raise OSError(
            f"{directory} keeps no access lists, which tenants need: put runtime_dir on a tmpfs "
            f"({error.strerror})",
        ) from error
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
