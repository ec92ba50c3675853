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
from kvferry_proto.worker import Snapshot

ANSWER_S = 3.0
UNBOUNDED = 1 << 16  # columns: what is piped on is read by a program, and must be whole
POOL_COLUMNS = (
    *("pool", "block", "total", "free", "leased", "quarantined"),
    *("sources", "sinks", "largest run"),
)


def ask(runtime_dir: Path, request: control.Request) -> Any:
    """Ask the daemon and return its answer.

    FerryError: daemon_unreachable if there is none or none answers within 3 s, control_denied if
    its socket is another user's, directory_refused if its directory may be, no_common_version if it does not know what is asked, or what it
    refuses with.
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


def status_for_people(answer: control.Status) -> str:
    """A status in words and tables."""
    drain = ", draining" if answer.draining else ""
    states = ", ".join(f"{count} {name}" for name, count in answer.transfers.items()) or "none"
    stalls = ", ".join(f"{count} {name}" for name, count in answer.stalls.items()) or "none"
    words = [
        f"kvferry {answer.version}  pid {answer.pid}  up {answer.uptime_s:.0f} s{drain}",
        f"peers connect to {answer.peer_address}; {answer.workers} workers",
        f"transfers: {states}; waiting: {stalls}",
    ]
    if answer.security is not None:
        words.append(secured_in_words(answer.security))
    if answer.placement is not None:
        words.insert(2, _placed(answer.placement))
    if answer.loop is not None:
        words += _late(answer.loop)
    pools = (
        (
            f"{pool.device} {len(pool.planes)} planes",
            f"{pool.block_size_tokens} tokens, {size_in_words(pool.block_bytes)}",
            str(pool.blocks_total),
            str(pool.blocks_free),
            str(pool.blocks_leased),
            str(pool.blocks_quarantined),
            _of_quota(pool.source_held_blocks, pool.source_blocks),
            _of_quota(pool.sink_held_blocks, pool.sink_blocks),
            str(pool.largest_run_blocks),
        )
        for pool in answer.pools
    )
    peers = (
        (p.address, p.state, str(p.streams_open), p.transport, p.detail or p.why)
        for p in answer.peers
    )
    workers = (
        (s.name, s.user, str(s.transfers), "lost" if s.lost else "") for s in answer.sessions or ()
    )
    return page(
        words,
        table(POOL_COLUMNS, pools),
        table(("peer", "state", "streams", "transport", "detail"), peers),
        table(("worker", "uid:gid:pid", "transfers", "state"), workers),
    )


def _of_quota(held: int | None, quota: int) -> str:
    """A role waits when it has all of its quota, however much is free."""
    return f"{'?' if held is None else held} of {quota}"


def _placed(placement: control.PlacementStatus) -> str:
    node = "" if placement.numa_node is None else f" on NUMA node {placement.numa_node}"
    cpus = placement.copy_cpus or "any"
    return f"pools{node}; huge pages: {placement.huge_pages}; copied on CPUs: {cpus}"


def secured_in_words(security: control.SecurityStatus) -> str:
    """How daemons talk to this one."""
    if security.insecure:
        return "INSECURE: whoever reaches the peer socket may pull, and nothing is encrypted"
    if security.messages == "clear":
        words = "peers: messages in clear, on this machine only"
    else:
        words = f"peers: messages by CURVE, {security.trusted_keys} keys trusted"
    return f"{words}; payload {'by TLS' if security.payload == 'tls' else 'in clear'}"


def _late(loop: control.LoopStatus) -> list[str]:
    often = f"{loop.late_over_10_ms} of {loop.looks} looks over 10 ms late"
    words = f"event loop: {often}, at most {loop.late_max_ms:.1f} ms"
    if (turns := loop.turns) is None:
        return [words]
    long = f"{turns.over_1_ms} of {turns.turns} over 1 ms, at most {turns.max_ms:.1f} ms"
    work = f"{turns.work_over_1_ms} over 1 ms, at most {turns.work_max_ms:.1f} ms"
    return [words, f"loop turns: {long}; own work: {work}"]


def transfers_for_people(answer: control.Transfers) -> str:
    """A table of transfers, and below it the error of each that failed.

    ``behind``: the ranks that a group waits for.
    """
    rows = (
        (
            row.snapshot.transfer_id,
            row.snapshot.role.value,
            str(row.snapshot.attempt),
            row.snapshot.state.name.title().replace("_", ""),
            _why(row.snapshot),
            str(row.snapshot.sent_tokens),
            "?" if row.snapshot.total_tokens is None else str(row.snapshot.total_tokens),
            f"{row.snapshot.base_tokens}+{row.snapshot.allocated_tokens}",
            str(row.snapshot.world_size),
            ",".join(map(str, row.behind)),
            "" if row.ended else f"{row.idle_s:.1f} s",
        )
        for row in answer.transfers
    )
    names = (
        *("transfer", "role", "try", "state", "waits for", "sent", "total", "window"),
        *("ranks", "behind", "idle"),
    )
    errors = [
        f"{seen.transfer_id}: {error_in_words(seen.error)}"
        for seen in (row.snapshot for row in answer.transfers)
        if seen.error is not None
    ]
    more = [f"{answer.more} more not shown"] if answer.more else []
    return page([], table(names, rows, always=True), "\n".join(map(plain, errors + more)))


def error_in_words(error: ErrorInfo) -> str:
    """Code, fault, message and remedy."""
    return f"{error.code} (fault: {error.fault}): {error.message}. Remedy: {error.remedy}"


def _why(seen: Snapshot) -> str:
    if seen.stall is not None:
        return seen.stall.value
    return "" if seen.error is None else seen.error.code


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
    terminal, page = sys.stdout.isatty(), io.StringIO()
    console = Console(
        file=page,  # not stdout: one place writes there, and minds what may happen
        force_terminal=terminal,
        width=shutil.get_terminal_size().columns if terminal else UNBOUNDED,
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
