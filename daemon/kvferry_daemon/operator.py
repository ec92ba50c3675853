"""What operators see: a question over the control socket, and its answer as a table."""

import io
import os
import shutil
import socket as plain_socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zmq
from rich import box
from rich.console import Console
from rich.table import Table

from kvferry_daemon.core.report import our_version
from kvferry_daemon.plain import plain
from kvferry_proto import control
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.runtime_dir import check_runtime_dir

ANSWER_S = 3.0
UNBOUNDED = 1 << 16  # columns: what is piped on is read by a program, and must be whole


def ask(runtime_dir: Path, request: control.Request) -> Any:
    """Ask the daemon and return its answer.

    FerryError: daemon_unreachable if there is none or none answers within 3 s, control_denied if
    its socket is another user's, directory_refused if its directory may be, no_common_version if it
    does not know what is asked, or what it refuses with.
    """
    check_runtime_dir(runtime_dir)
    path = runtime_dir / "control.sock"
    _check_socket(path)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.connect(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise FerryError(
                Code.DAEMON_UNREACHABLE, f"cannot connect to {path}: {error}"
            ) from error
        answer = _exchange(socket, path, request)
        if isinstance(answer, FerryError):
            raise FerryError(Code.NO_COMMON_VERSION, _other_version(socket, path, request, answer))
        return answer
    finally:
        context.destroy(linger=0)


def _check_socket(path: Path) -> None:
    """ZeroMQ would wait for a socket to come into being, and say nothing of one that is refused."""
    probe = plain_socket.socket(plain_socket.AF_UNIX, plain_socket.SOCK_STREAM)
    try:
        probe.connect(str(path))
    except FileNotFoundError:
        raise FerryError(Code.DAEMON_UNREACHABLE, f"no daemon has a socket at {path}") from None
    except PermissionError as error:
        raise FerryError(
            Code.CONTROL_DENIED, f"uid {os.getuid()} may not connect to {path}"
        ) from error
    except ConnectionRefusedError as error:
        raise FerryError(Code.DAEMON_UNREACHABLE, f"the daemon that made {path} is gone") from error
    except OSError as error:
        raise FerryError(Code.DAEMON_UNREACHABLE, f"cannot connect to {path}: {error}") from error
    finally:
        probe.close()


def _exchange(
    socket: zmq.Socket[bytes], path: Path, request: control.Request
) -> control.Answer | FerryError:
    """The answer; an error if the two do not understand each other."""
    socket.send(control.REQUESTS.encode(request))
    if not socket.poll(int(ANSWER_S * 1000)):
        raise FerryError(
            Code.DAEMON_UNREACHABLE, f"no daemon answers at {path} within {ANSWER_S:g} s"
        )
    try:
        answer = control.ANSWERS.decode(socket.recv())
    except FerryError as error:
        return error
    if not isinstance(answer, control.ControlFailure):
        return answer
    refusal = answer.error.raised()
    if refusal.code is Code.BAD_MESSAGE:
        return refusal
    raise refusal


def _other_version(
    socket: zmq.Socket[bytes], path: Path, request: control.Request, seen: FerryError
) -> str:
    """What to say of a daemon that does not know the verb; it may still tell its version."""
    ours = our_version()
    status = _exchange(socket, path, control.GetStatus())
    theirs = f"kvferry {status.version}" if isinstance(status, control.Status) else "unknown"
    return (
        f"the daemon is {theirs}, this command kvferry {ours}, and they do not share "
        f"{request.kind}: {seen.message}"
    )


def error_in_words(error: ErrorInfo) -> str:
    """Code, fault, message and remedy."""
    return f"{error.code} (fault: {error.fault}): {error.message}. Remedy: {error.remedy}"


def table(
    names: Iterable[str], rows: Iterable[Iterable[str]], *, always: bool = False
) -> Table | None:
    """A table; None if it would be empty. Piped on, it is plain columns with a "-" for nothing."""
    piped = not sys.stdout.isatty()
    table = Table(box=None if piped else box.HEAVY_HEAD, pad_edge=not piped, show_edge=not piped)
    for name in names:
        table.add_column(name, overflow="fold")  # an id that is cut short helps nobody
    for row in rows:
        table.add_row(*(plain(cell) or ("-" if piped else "") for cell in row))
    return table if always or table.row_count else None


def page(words: Iterable[str], *parts: Table | str | None) -> str:
    """All of it as text. Ids, reasons and addresses are nobody's markup."""
    terminal, page, size = sys.stdout.isatty(), io.StringIO(), shutil.get_terminal_size()
    console = Console(
        file=page,  # not stdout: one place writes there, and minds what may happen
        force_terminal=terminal,
        width=size.columns if terminal else UNBOUNDED,
        height=size.lines,  # else a dumb terminal has 80 columns, whatever its width
        markup=False,
        emoji=False,
        highlight=False,
    )
    for part in (*map(plain, words), *parts):
        if part:
            console.print(part)
    return page.getvalue()


def size_in_words(size_bytes: int) -> str:
    """Bytes in the unit that leaves few digits."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:g} {unit}" if size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
