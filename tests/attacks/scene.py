"""What the attacks need: daemons with a defence switched off, and another user to attack as."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from live import LiveDaemon

HERE = Path(__file__).parent
NOBODY = 65534
OTHER = 65533
WAIT_S = 30


def without(defence: str | None) -> type[LiveDaemon]:
    """Daemons that lack one defence of attacks/weak.py; None: whole ones."""
    if defence is None:
        return LiveDaemon

    program = ("-m", "attacks.weak", defence)
    return type("Weak", (LiveDaemon,), {"program": program, "environment": finds_tests()})


def finds_tests() -> dict[str, str]:
    """So that a child imports what we import, and what is here."""
    return {"PYTHONPATH": os.pathsep.join((str(HERE.parent), *sys.path))}


def ends(one: socket.socket) -> bool:
    """Whether the other side closes before the timeout that the socket has."""
    try:
        while one.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def open_to_all(daemon: LiveDaemon) -> None:
    """Take the modes of its files away, which would keep other users out before all else."""
    daemon.directory.parent.chmod(0o777)
    daemon.directory.chmod(0o755)  # a client trusts none that others may write to
    (daemon.directory / "workers").chmod(0o777)
    for path in daemon.directory.glob("*.sock"):
        path.chmod(0o777)


def stranger(uid: int, act: str, directory: Path, *more: str, gid: int | None = None) -> str:
    """What a process of that user is told; see attacks/stranger.py. His group has his number."""
    with started(f"{uid}:{uid if gid is None else gid}", act, directory, *more) as one:
        told, errors = one.communicate(timeout=WAIT_S)
    assert one.returncode == 0, errors
    return told.strip()


@contextmanager
def started(user: str, act: str, directory: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Such a process; it is ended with the block."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "stranger.py"), user, act, str(directory), *more],
        env={**os.environ, **finds_tests()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as one:
        try:
            yield one
        finally:
            one.kill()
