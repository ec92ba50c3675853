"""Who may open what lies in the runtime directory, and keys."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from attacks.switched_off.replacing import replace
from kvferry_daemon import keys, runtime_dir
from kvferry_daemon.memory import board, host


def pools_are_the_groups() -> None:
    """The files of a tenant's pool are open to all workers, as those of a shared one are."""

    def open_to_group(descriptor: int, _uid: int, *, writable: bool) -> None:
        os.fchmod(descriptor, 0o660 if writable else 0o640)

    replace(host, "open_to_user", open_to_group)
    replace(board, "open_to_user", open_to_group)


def no_flock() -> None:
    """A daemon takes any directory that it is told to, another one's too."""
    weak = SimpleNamespace(flock=lambda _descriptor, _how: None, LOCK_EX=0, LOCK_NB=0)
    replace(runtime_dir, "fcntl", weak)


def files_are_replaced() -> None:
    """libzmq binds over whatever lies where a socket is to be."""
    replace(runtime_dir, "_refuse_others", lambda _path: None)


def files_are_open() -> None:
    """What the daemon makes has the modes that a careless program gives it."""
    os.umask(0)
    replace(os, "umask", lambda _mask: 0)
    opened, made = os.open, Path.mkdir

    def open_file(path: str, flags: int, _mode: int = 0, **more: Any) -> int:
        return opened(path, flags, 0o666, **more)

    def mkdir(path: Path, mode: int = 0, parents: bool = False, exist_ok: bool = False) -> None:
        del mode
        made(path, 0o777, parents, exist_ok)

    replace(os, "open", open_file)
    replace(os, "fchmod", lambda _descriptor, _mode: None)
    replace(Path, "mkdir", mkdir)
    replace(Path, "chmod", lambda _path, _mode: None)


def open_keys_will_do() -> None:
    """Files of keys are read whoever else may read or write them."""
    replace(keys, "_check", lambda _path, _forbidden: None)


SWITCHES = (
    pools_are_the_groups,
    no_flock,
    files_are_replaced,
    files_are_open,
    open_keys_will_do,
)
