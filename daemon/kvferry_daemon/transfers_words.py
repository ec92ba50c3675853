"""Transfers in words: a table of them, and the error of each that failed."""

import shutil
import sys

from kvferry_daemon.operator import error_in_words, page, table
from kvferry_daemon.plain import plain
from kvferry_daemon.probe import endpoint_of
from kvferry_proto import control
from kvferry_proto.worker import Snapshot

COLUMNS = (
    *("transfer", "role", "try", "state", "waits for", "sent", "total", "window", "blocks"),
    *("ranks", "behind", "age", "idle", "peer", "worker"),
)
SPARED = ("window", "ranks", "behind", "try", "total")  # in this order, where there is no room
FOLDED = 24  # characters: what is longer goes on in the next line of its cell
BORDER = 3  # of a cell, and one more at the end
Row = dict[str, str]


def transfers_for_people(answer: control.Transfers) -> str:
    """A table of transfers, and below it the error of each that failed.

    ``behind``: the ranks that a group waits for. A terminal may have no room for all columns.
    """
    rows, names = [_row(one) for one in answer.transfers], list(COLUMNS)
    if sys.stdout.isatty():
        rows = [_shortened(row) for row in rows]
        names = _that_fit(rows)
    shown = table(names, ([row[name] for name in names] for row in rows), always=True)
    below = [
        f"{seen.transfer_id}: {error_in_words(seen.error)}"
        for seen in (row.snapshot for row in answer.transfers)
        if seen.error is not None
    ]
    if answer.more:
        below.append(f"{answer.more} more not shown")
    if left_out := [name for name in COLUMNS if name not in names]:
        words = "a wider terminal, a pipe or --json has all"
        below.append(f"no room for {', '.join(left_out)}: {words}")
    return page([], shown, "\n".join(map(plain, below)))


def _row(one: control.TransferStatus) -> Row:
    seen = one.snapshot
    cells = (
        seen.transfer_id,
        seen.role.value,
        str(seen.attempt),
        seen.state.name.title().replace("_", ""),
        _why(seen),
        str(seen.sent_tokens),
        "?" if seen.total_tokens is None else str(seen.total_tokens),
        f"{seen.base_tokens}+{seen.allocated_tokens}",
        str(one.blocks),
        str(seen.world_size),
        ",".join(map(str, one.behind)),
        "" if one.ended else f"{one.age_s:.1f}s",
        "" if one.ended else f"{one.idle_s:.1f}s",
        endpoint_of(one.source or one.sink or ""),
        one.worker,
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _shortened(row: Row) -> Row:
    """Without what is the same in every row."""
    waits, peer = row["waits for"].removeprefix("waiting_for_"), row["peer"].removeprefix("tcp://")
    return {**row, "waits for": waits, "peer": peer}


def _why(seen: Snapshot) -> str:
    if seen.stall is not None:
        return seen.stall.value
    return "" if seen.error is None else seen.error.code


def _that_fit(rows: list[Row]) -> list[str]:
    """The columns for which the terminal has room; below 120 characters cells take more lines."""
    room = shutil.get_terminal_size().columns
    names = list(COLUMNS)
    for spared in SPARED:
        if sum(_width(name, rows) for name in names) + 1 <= room:
            break
        names.remove(spared)
    return names


def _width(name: str, rows: list[Row]) -> int:
    longest = max([len(name), *(len(row[name]) for row in rows)])
    return min(longest, FOLDED) + BORDER
