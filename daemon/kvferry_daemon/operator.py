"""What operators see: a question over the control socket, and its answer as a table."""

from pathlib import Path

import zmq
from rich.console import Console
from rich.table import Table

from kvferry_proto import control
from kvferry_proto.errors import Code, FerryError

ANSWER_S = 3.0


def ask(
    runtime_dir: Path, request: control.GetStatus | control.GetTransfers
) -> control.Status | control.Transfers:
    """Ask the daemon; FerryError(daemon_unreachable) if none answers within 3 s."""
    path = runtime_dir / "control.sock"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        if not path.exists():
            raise FerryError(Code.DAEMON_UNREACHABLE, f"no daemon has a socket at {path}")
        socket.connect(f"ipc://{path}")
        socket.send(control.REQUESTS.encode(request))
        if not socket.poll(int(ANSWER_S * 1000)):
            raise FerryError(
                Code.DAEMON_UNREACHABLE, f"no daemon answers at {path} within {ANSWER_S:g} s"
            )
        answer = control.ANSWERS.decode(socket.recv())
    finally:
        context.destroy(linger=0)
    if isinstance(answer, control.ControlFailure):
        raise answer.error.raised()
    return answer


def show_status(answer: control.Status) -> None:
    """Print a status for people."""
    console = Console()
    drain = ", draining" if answer.draining else ""
    console.print(
        f"kvferry {answer.version}  pid {answer.pid}  up {answer.uptime_s:.0f} s{drain}\n"
        f"peers connect to {answer.peer_address}; {answer.workers} workers",
        highlight=False,
    )
    states = ", ".join(f"{count} {name}" for name, count in answer.transfers.items()) or "none"
    stalls = ", ".join(f"{count} {name}" for name, count in answer.stalls.items()) or "none"
    console.print(f"transfers: {states}; waiting: {stalls}", highlight=False)
    pools = Table("pool", "block", "total", "free", "leased", "quarantined", "largest run")
    for pool in answer.pools:
        pools.add_row(
            f"{pool.device} {len(pool.planes)} planes",
            f"{pool.block_size_tokens} tokens, {_size(pool.block_bytes)}",
            str(pool.blocks_total),
            str(pool.blocks_free),
            str(pool.blocks_leased),
            str(pool.blocks_quarantined),
            str(pool.largest_run_blocks),
        )
    if answer.pools:
        console.print(pools)
    peers = Table("peer", "state", "streams", "detail")
    for peer in answer.peers:
        peers.add_row(peer.address, peer.state, str(peer.streams_open), peer.detail)
    if answer.peers:
        console.print(peers)


def show_transfers(answer: control.Transfers) -> None:
    """Print transfers for people."""
    console = Console()
    table = Table(
        "transfer", "role", "try", "state", "waits for", "sent", "total", "window", "idle"
    )
    for row in answer.transfers:
        seen = row.snapshot
        table.add_row(
            seen.transfer_id,
            seen.role.value,
            str(seen.attempt),
            seen.state.name.title().replace("_", ""),
            seen.stall.value if seen.stall else seen.error.code if seen.error else "",
            str(seen.sent_tokens),
            "?" if seen.total_tokens is None else str(seen.total_tokens),
            f"{seen.base_tokens}+{seen.allocated_tokens}",
            "" if row.ended else f"{row.idle_s:.1f} s",
        )
    console.print(table)
    for row in answer.transfers:
        if row.snapshot.error is not None:
            error = row.snapshot.error
            console.print(
                f"{row.snapshot.transfer_id}: {error.code} (fault: {error.fault}): "
                f"{error.message}. Remedy: {error.remedy}",
                highlight=False,
            )
    if answer.more:
        console.print(f"{answer.more} more not shown")


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:g} {unit}" if size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
