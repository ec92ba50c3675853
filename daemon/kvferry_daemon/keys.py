"""This daemon's key and the keys of the peers it trusts: two small files in a directory of its own.

Keys are written as 64 hex digits: one stands in an address, where Z85's signs could not
(docs/decisions/0015).
"""

import logging
import os
import re
import stat
from pathlib import Path

import zmq
from zmq.utils import z85

SECRET, TRUSTED = "secret", "trusted"
KEY = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
SIZE_MAX = 1 << 20
log = logging.getLogger(__name__)


class KeysRefused(Exception):
    """The keys cannot be used like this; the message names the file and what to do."""


class Keys:
    """The own key pair, read once, and the trusted keys, which may change while we run."""

    def __init__(self, directory: Path) -> None:
        """Read both files; KeysRefused if one is missing, open to others, or not understood."""
        self._trusted_path = directory / TRUSTED
        self.secret = _read_secret(directory)
        self.public = _public_of(self.secret)
        self._names: dict[str, str] = {}
        self._seen: tuple[int, ...] | None = None
        if not self._trusted_path.exists():
            log.warning("%s is not there: no peer is trusted", self._trusted_path)
        else:
            self._read()

    def name_of(self, key: str) -> str | None:
        """Under which name a key is trusted; None if it is not (any more)."""
        return self._names.get(key)

    @property
    def trusted(self) -> dict[str, str]:
        """Names by key. One name may have several keys: a peer's old one and its new one."""
        return dict(self._names)

    def reload(self) -> bool:
        """Look whether the trusted keys have changed; a file that is wrong changes nothing."""
        try:
            if _mark(self._trusted_path) == self._seen:
                return False
            self._read()
        except FileNotFoundError:
            had, self._names, self._seen = bool(self._names), {}, None
            return had
        except (KeysRefused, OSError) as error:
            self._seen = _mark(self._trusted_path)
            log.error("the trusted keys stay as they were: %s", error)
            return False
        log.info("%d keys are trusted now", len(self._names))
        return True

    def _read(self) -> None:
        seen = _mark(self._trusted_path)
        self._names = read_trusted(self._trusted_path.parent)
        self._seen = seen


def new_key(directory: Path) -> str:
    """Make a key pair, readable by us alone, and return the public key; KeysRefused if one is there."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / SECRET
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KeysRefused(
            f"{path} is there already; for a new key name another directory, and let the peers "
            "trust both until this daemon runs with the new one"
        ) from None
    public, secret = zmq.curve_keypair()
    with os.fdopen(descriptor, "w") as file:
        file.write(z85.decode(secret).hex() + "\n")
    return z85.decode(public).hex()


def own_key(directory: Path) -> str:
    """The public key of a directory; KeysRefused if it has none."""
    return _public_of(_read_secret(directory))


def trust(directory: Path, name: str, key: str) -> None:
    """Add a key to the trusted ones; a running daemon sees it within a heartbeat."""
    if not NAME.fullmatch(name) or not KEY.fullmatch(key):
        raise KeysRefused("a name is 1 to 64 letters, digits, . _ or -; a key is 64 hex digits")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / TRUSTED
    known = read_trusted(directory) if path.exists() else {}
    if known.get(key, name) != name:
        raise KeysRefused(f"this key is {known[key]}'s in {path}")
    if key in known:
        return
    new = path.with_name(f".{TRUSTED}.{os.getpid()}")
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        text += "\n"
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{text}{name} {key}\n")
    new.replace(path)


def read_trusted(directory: Path) -> dict[str, str]:
    """Names by key, of a file with a name and a key a line; KeysRefused, FileNotFoundError."""
    path = directory / TRUSTED
    _check(path, stat.S_IWGRP | stat.S_IWOTH)
    names: dict[str, str] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not NAME.fullmatch(words[0]) or not KEY.fullmatch(words[1]):
            raise KeysRefused(f"{path}, line {number}: not a name and a key of 64 hex digits")
        name, key = words
        if names.setdefault(key, name) != name:
            raise KeysRefused(f"{path}, line {number}: this key is {names[key]}'s already")
    return names


def _read_secret(directory: Path) -> bytes:
    path = directory / SECRET
    try:
        _check(path, stat.S_IWGRP | stat.S_IRWXO)
        text = path.read_text(errors="replace").strip()
    except OSError as error:
        raise KeysRefused(
            f"cannot read {path}: {error.strerror}; `kvferry keys new` makes a key"
        ) from error
    if not KEY.fullmatch(text):
        raise KeysRefused(f"{path} does not hold a key of 64 hex digits")
    return bytes.fromhex(text)


def _public_of(secret: bytes) -> str:
    return z85.decode(zmq.curve_public(z85.encode(secret))).hex()


def _check(path: Path, forbidden: int) -> None:
    """KeysRefused if others could read or change what must be ours."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > SIZE_MAX:
        raise KeysRefused(f"{path} is no file of keys")
    if facts.st_uid not in (0, os.getuid()):
        raise KeysRefused(f"{path} belongs to uid {facts.st_uid}, neither to us nor to root")
    if facts.st_mode & forbidden:
        raise KeysRefused(f"{path} is open to others (mode {facts.st_mode & 0o777:o}); chmod 600")


def _mark(path: Path) -> tuple[int, ...]:
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
