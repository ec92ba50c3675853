"""Looks at a machine as a daemon with some config would find it, and changes nothing there."""

import ctypes
import fcntl
import os
import resource
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from kvferry_daemon.about import is_installed
from kvferry_daemon.config import Config
from kvferry_daemon.core.records import HOST
from kvferry_daemon.http.listen import NEEDED as HTTP_NEEDS
from kvferry_daemon.keys import KeysRefused, own_key, read_trusted
from kvferry_daemon.memory.huge_pages import huge_pages
from kvferry_daemon.operator import ask, page, table
from kvferry_daemon.runtime_dir import LOCK
from kvferry_daemon.traces import NEEDED as OTEL_NEEDS
from kvferry_proto import control
from kvferry_proto.errors import FerryError

Verdict = Literal["well", "note", "fault"]
WELL: Final = "well"
NOTE: Final = "note"
FAULT: Final = "fault"
FILES_WANTED = 4096  # sockets of ZeroMQ, data connections and pools
NOT_SYNCHRONISED = 5  # adjtimex's TIME_ERROR
TIMEX_BYTES = 512  # more than any struct timex has
TRIED_BYTES = 20 << 20  # of a GPU: torch gives them an allocation of their own, as it does a pool
INFINIBAND = Path("/sys/class/infiniband")  # its devices, and those of RoCE


class Finding(NamedTuple):
    """One thing that was looked at; a fault keeps the daemon from running."""

    what: str
    verdict: Verdict
    seen: str
    remedy: str = ""


def examine(config: Config) -> list[Finding]:
    """Everything, in the order in which a daemon would need it."""
    runs = _daemon(config)
    findings = [runs, *_directory(config), _tmpfs(config), _memlock(config), _files()]
    findings += [_gpu(config), _nixl(config), *_extras(config), _keys(config)]
    if runs.verdict == NOTE:  # none runs: the ports are free, or somebody else's
        findings += _ports(config)
    return [*findings, _clock()]


def in_words(findings: list[Finding]) -> str:
    """A table, and below it what to do."""
    rows = ((one.verdict, one.what, one.seen) for one in findings)
    todo = [f"{one.what}: {one.remedy}" for one in findings if one.remedy]
    return page([], table(("", "what", "seen"), rows), "\n".join(todo))


def _daemon(config: Config) -> Finding:
    try:
        status = ask(config.runtime_dir, control.GetStatus())
    except FerryError as error:
        return Finding("daemon", NOTE, f"none answers here: {error.message}")
    drains = ", draining" if status.draining else ""
    seen = f"kvferry {status.version} runs, pid {status.pid}{drains}"
    return Finding("daemon", WELL, seen)


def _directory(config: Config) -> Iterator[Finding]:
    path, what = config.runtime_dir, "runtime directory"
    if not _is_there(path):
        parent = _nearest(path)
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding(what, WELL, f"{path} will be made in {parent}")
        else:
            yield Finding(
                what, FAULT, f"{parent} may not be written", "name a directory that may be made"
            )
        return
    facts = path.stat()
    if not stat.S_ISDIR(facts.st_mode):
        yield Finding(what, FAULT, f"{path} is no directory", "name another one")
    elif facts.st_uid != os.getuid():
        seen = f"{path} belongs to uid {facts.st_uid}, and this is uid {os.getuid()}"
        yield Finding(
            what, FAULT, seen, f"run as that user, or name one such as {path / 'kvferry'}"
        )
    elif not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(what, FAULT, f"{path} may not be written", "let its owner write there")
    elif any(path.iterdir()) and not (path / LOCK).exists():
        seen = f"{path} holds files that are not kvferry's"
        yield Finding(what, FAULT, seen, f"name a directory in it, such as {path / 'kvferry'}")
    else:
        private = not facts.st_mode & 0o077
        holder = _holder(path)
        held = "" if holder is None else f", held by pid {holder}"
        seen = f"{path}, mode {stat.S_IMODE(facts.st_mode):o}{held}"
        remedy = "" if private else "nothing: the daemon makes it private when it starts"
        yield Finding(what, WELL if private else NOTE, seen, remedy)


def _holder(path: Path) -> str | None:
    """The pid of the daemon that has the directory now; None if none has: its file outlives it."""
    try:
        lock = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # nobody was here before
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(lock, 32).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(lock)
    return None


def _tmpfs(config: Config) -> Finding:
    """Pools in host memory need a tmpfs with room for the whole budget."""
    place, what = _nearest(config.runtime_dir), "memory for pools"
    kind, facts = _filesystem(place), os.statvfs(place)
    free, size = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
    seen = f"{kind} at {place}: {_gib(free)} free of {_gib(size)}, huge pages {huge_pages(place)}"
    if config.device != HOST:
        return Finding(what, WELL, f"pools lie in {config.device}; {seen}")
    if kind != "tmpfs":
        remedy = "name a runtime_dir on tmpfs: on a disk every byte of KV cache is written there"
        return Finding(what, NOTE, seen, remedy)
    if free < config.budget_bytes:
        seen += f"; the budget is {_gib(config.budget_bytes)}"
        running = _holder(config.runtime_dir) is not None  # and has its pools there
        remedy = "make the tmpfs larger (`--shm-size`, emptyDir sizeLimit), or lower budget_bytes"
        return Finding(what, NOTE if running else FAULT, seen, remedy)
    return Finding(what, WELL, seen)


def _memlock(config: Config) -> Finding:
    what = "locked memory"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= config.budget_bytes:
        return Finding(what, WELL, "unlimited" if soft == resource.RLIM_INFINITY else _gib(soft))
    seen = f"{_gib(soft)}, less than the budget; only RDMA needs it, and"
    if not any(INFINIBAND.glob("*")):
        return Finding(what, NOTE, f"{seen} there is none")
    if config.transport == "tcp":
        return Finding(what, NOTE, f"{seen} transport is tcp")
    remedy = "raise it (ulimit -l unlimited, LimitMEMLOCK=infinity): RDMA pins the pools"
    verdict: Verdict = FAULT if config.transport == "nixl" else NOTE  # else tcp is left
    return Finding(what, verdict, f"{seen} it is there (transport is {config.transport})", remedy)


def _files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES_WANTED:
        remedy = f"raise it to {FILES_WANTED} (ulimit -n, LimitNOFILE=) for hundreds of peers"
        return Finding("open files", NOTE, str(soft), remedy)
    return Finding("open files", WELL, str(soft))


def _gpu(config: Config) -> Finding:
    if config.device == HOST:
        return Finding("GPU", WELL, "not asked for: device is host")
    from kvferry_daemon.memory.device import Device, NoRoom

    try:
        device = Device(config.device)
        device.shared(device.allocate(TRIED_BYTES))
    except NoRoom as error:  # a daemon that runs may have it all
        return Finding("GPU", NOTE, f"not tried whether workers could open memory: {error}")
    except OSError as error:  # DeviceError among them
        return Finding("GPU", FAULT, str(error), "see docs/decisions/0011, or use device=host")
    return Finding("GPU", WELL, f"{config.device} holds memory, and gives a handle for workers")


def _nixl(config: Config) -> Finding:
    there = is_installed("nixl")
    if config.transport == "nixl" and not there:
        remedy = "pip install 'kvferry[nixl]', or use transport=auto"
        return Finding("NIXL", FAULT, "transport is nixl, and it is not installed", remedy)
    seen = "installed" if there else "not installed: blocks travel over tcp"
    return Finding("NIXL", WELL, f"{seen} (transport is {config.transport})")


def _extras(config: Config) -> Iterator[Finding]:
    """What the config asks for and a plain installation has not."""
    for extra, is_wanted, needs in (
        ("http", config.http_port is not None, HTTP_NEEDS),
        ("otel", config.otlp_endpoint is not None, OTEL_NEEDS),
        ("tls", config.payload_encryption == "tls", ("cryptography",)),
    ):
        absent = ", ".join(name for name in needs if not is_installed(name))
        if is_wanted and absent:
            remedy = f"pip install 'kvferry[{extra}]'"
            yield Finding(f"extra {extra}", FAULT, f"{absent} is not installed", remedy)
        elif is_wanted:
            yield Finding(f"extra {extra}", WELL, "installed")


def _keys(config: Config) -> Finding:
    """Read as a daemon reads them when it starts."""
    directory = config.keys_dir
    if directory is None:
        return Finding("keys", WELL, "not asked for: keys_dir is not set")
    try:
        key = own_key(directory)
        trusted = len(read_trusted(directory))
    except FileNotFoundError as error:
        remedy = "kvferry keys trust NAME KEY, for each daemon that this one talks to"
        return Finding("keys", NOTE, f"{error.filename} is not there: no peer is trusted", remedy)
    except (KeysRefused, OSError) as error:
        remedy = "mend or make the file: see docs/security.md"
        return Finding("keys", FAULT, str(error), remedy)
    return Finding("keys", WELL, f"{key} is ours; {trusted} trusted, in {directory}")


def _ports(config: Config) -> Iterator[Finding]:
    for name in ("peer_port", "data_port"):
        yield _port(name, config.peer_host, getattr(config, name))
    if config.http_port is not None:
        yield _port("http_port", config.http_host, config.http_port)


def _port(name: str, host: str, port: int) -> Finding:
    what = f"{name} {port or ''}".strip()
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except OSError as error:
        remedy = f"end what listens there, set another {name}, or an address of this machine"
        return Finding(what, FAULT, f"cannot listen at {host}: {error.strerror}", remedy)
    return Finding(what, WELL, f"free at {host}")


def _clock() -> Finding:
    """Nothing is timed by it; but logs of several machines are read side by side."""
    adjtimex: Callable[[object], int] = ctypes.CDLL(None).adjtimex
    state = adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))  # all zero: it only asks
    if state == NOT_SYNCHRONISED:
        remedy = "run chrony or timesyncd on the host, so that times of several logs compare"
        return Finding("clock", NOTE, "the kernel's clock is not synchronised", remedy)
    return Finding("clock", WELL, "synchronised" if state >= 0 else "the kernel does not say")


def _nearest(path: Path) -> Path:
    """The path, or the first of those above it that is there."""
    while not _is_there(path) and path != path.parent:
        path = path.parent
    return path


def _is_there(path: Path) -> bool:
    """Whether a path is there for us: below what we may not enter nothing is."""
    try:
        return path.exists()
    except PermissionError:
        return False


def _filesystem(path: Path) -> str:
    """The kind of file system that a path lies on."""
    best, kind = -1, "unknown"
    real = str(path.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split(" ")
        inside = mount == "/" or real == mount or real.startswith(mount + "/")
        if inside and len(mount) >= best:
            best, kind = len(mount), found
    return kind


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.2f} GiB"
