"""What the live view shows, as text. Ids, reasons and addresses are nobody's markup."""

from collections.abc import Iterable, Iterator

from rich.text import Text

from kvferry_daemon.operator import size_in_words
from kvferry_daemon.plain import plain
from kvferry_daemon.status_words import secured_in_words
from kvferry_daemon.top.rates import Rates, side_of
from kvferry_proto.control import PeerStatus, PoolStatus, SinkStatus, Status, TransferStatus

COLUMNS = (
    *("transfer", "role", "try", "state", "waits for", "sent", "total", "tokens/s", "idle"),
    *("blocks", "worker"),
)
BAR_CELLS = 30
LINES_MAX = 5  # of pools, and of peers: the rest of the screen is for transfers
STATES = ("Failed", "Bootstrapping", "WaitingForInput", "Transferring", "Success")


def head(status: Status, rates: Rates) -> Text:
    """The daemon as a whole, and how fast it moves."""
    drain = ", DRAINING" if status.draining else ""
    states = ", ".join(f"{count} {name}" for name, count in status.transfers.items()) or "none"
    stalls = ", ".join(f"{count} {name}" for name, count in status.stalls.items()) or "none"
    sent, received, copied = (
        size_in_words(round(rates.of(f"bytes_{way}"))) for way in ("sent", "received", "copied")
    )
    ends = rates.of("source_success", "sink_success"), rates.of("source_failed", "sink_failed")
    about = f"kvferry {status.version}  pid {status.pid}  up {status.uptime_s:.0f} s{drain}"
    moved = f"sent {sent}/s  received {received}/s  copied {copied}/s"
    lines = [
        f"{about}  {status.peer_address}  {status.workers} workers",
        f"transfers: {states}; waiting: {stalls}",
        f"{moved}  ended {ends[0]:.1f}/s well, {ends[1]:.1f}/s failed",
    ]
    text = Text("\n".join(map(plain, lines)))
    if status.security is not None and status.security.insecure:
        text.append("\n" + secured_in_words(status.security), "bold red")
    return text


def pools(status: Status) -> Text:
    """A bar for each pool."""
    return _some("no pool yet: no worker has said hello", map(_pool, status.pools))


def _pool(pool: PoolStatus) -> Text:
    total = max(1, pool.blocks_total)
    leased = round(BAR_CELLS * pool.blocks_leased / total)
    kept = round(BAR_CELLS * pool.blocks_quarantined / total)
    text = Text(f"pool {plain(pool.device):7} ")
    text.append("█" * leased, "green").append("▓" * kept, "yellow")
    text.append("░" * max(0, BAR_CELLS - leased - kept))
    return text.append(
        f" {pool.blocks_free} free, {pool.blocks_leased} leased, {pool.blocks_quarantined} "
        f"quarantined of {pool.blocks_total} blocks; largest free run {pool.largest_run_blocks}"
    )


def peers(status: Status) -> Text:
    """A line for each daemon that is pulled from, or pulls; sources that are not up come first."""
    ordered = sorted(status.peers, key=lambda peer: peer.state == "up")
    lines = [*map(_peer, ordered), *map(_sink, reversed(status.sinks or []))]
    return _some("no peer: nothing is pulled from another daemon, and none pulls", lines)


def _peer(peer: PeerStatus) -> Text:
    text = Text(f"peer {plain(peer.address)} ")
    text.append(peer.state, "green" if peer.state == "up" else "bold yellow")
    said = peer.detail or peer.why
    way = f" by {plain(peer.transport)}" if peer.transport else ""
    return text.append(f"{way}, {peer.streams_open} streams{': ' + plain(said) if said else ''}")


def _sink(sink: SinkStatus) -> Text:
    text = Text(f"sink {plain(sink.address or sink.name)} ")
    text.append(sink.state, "green" if sink.state == "up" else "dim")
    way = f" by {plain(sink.transport)}" if sink.transport else ""
    return text.append(f"{way}, {sink.streams_open} streams")


def _some(nothing: str, lines: Iterable[Text]) -> Text:
    every = list(lines)
    shown = every[:LINES_MAX] or [Text(nothing, "dim")]
    if len(every) > LINES_MAX:
        shown.append(Text(f"and {len(every) - LINES_MAX} more: kvferry status", "dim"))
    return Text("\n").join(shown)


def cells(row: TransferStatus, rates: Rates) -> Iterator[Text]:
    """One transfer, column by column."""
    seen = row.snapshot
    failed = seen.error is not None
    why = seen.stall.value if seen.stall else seen.error.code if seen.error else ""
    yield Text(plain(seen.transfer_id))
    yield Text(seen.role.value)
    yield Text(str(seen.attempt), justify="right")
    yield Text(STATES[seen.state], "red" if failed else "")
    yield Text(why.replace("_", " "), "red" if failed else "yellow")
    yield Text(str(seen.sent_tokens), justify="right")
    yield Text("?" if seen.total_tokens is None else str(seen.total_tokens), justify="right")
    yield Text(f"{rates.tokens_of(side_of(row)):.0f}", justify="right")
    yield Text("" if row.ended else f"{row.idle_s:.1f} s", justify="right")
    yield Text(str(row.blocks), justify="right")
    yield Text(plain(row.worker))


def fits(row: TransferStatus, words: str) -> bool:
    """Whether every one of these words is somewhere in what names or places the transfer."""
    seen = row.snapshot
    why = seen.stall.value if seen.stall else seen.error.code if seen.error else ""
    about = (seen.transfer_id, seen.role.value, STATES[seen.state], why, row.worker, row.source)
    text = " ".join(one or "" for one in about).casefold()
    return all(word in text for word in words.casefold().split())
