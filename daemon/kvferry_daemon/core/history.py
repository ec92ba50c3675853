"""What became of one transfer, in few bytes: a record of every change that is worth a line.

A record is what the transfer's numbers were after the change; what happened is what differs from
the record before. So nothing has to say what it did, and a waiting transfer costs 0.3 KiB.
"""

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from kvferry_proto.states import StallReason, State

if TYPE_CHECKING:
    from kvferry_daemon.core.transfer import Transfer

RECORDS_MAX = 48  # of a live transfer
RECORDS_KEPT = 12  # of an ended one: there are up to 16,384
AT_MS_MAX = (1 << 32) - 1
_GROWTH = struct.Struct("<IBQQ")  # when, whether nothing but this grew, sent, available
_MARK = struct.Struct("<BBQIq")  # state, stall and total, base, blocks, last resume
_SIZE = _GROWTH.size + _MARK.size
_GREW_AT = _SIZE - 4  # from the end
_STALLS = (None, *StallReason)
_NUMBERS = {stall: number for number, stall in enumerate(_STALLS)}
_STALL, _KNOWS_TOTAL = 0x0F, 0x10


class Moment(NamedTuple):
    """One record, read."""

    after_s: float  # since the transfer was opened
    state: State
    stall: StallReason | None
    knows_total: bool
    sent_tokens: int
    available_tokens: int
    base_tokens: int
    blocks: int
    last_resume_at: int


class History:
    """One a transfer: the last changes, and since when it waits for what it waits for."""

    __slots__ = ("_records", "counted_tokens", "lost", "stall", "stall_since_s")

    def __init__(self, now_s: float) -> None:
        self._records = bytearray()
        self.lost = 0  # records that were pushed out
        self.stall: StallReason | None = None
        self.stall_since_s = now_s
        self.counted_tokens = -1  # of sent ones, in the sum of all; -1: none yet

    def note(self, transfer: "Transfer") -> None:
        """Something of this transfer is different. Growth alone is one record, however often."""
        records, window = self._records, transfer.window
        about = _NUMBERS[transfer.stall]
        if transfer.total_tokens is not None:
            about |= _KNOWS_TOTAL
        mark = _MARK.pack(
            transfer.state, about, window.base_tokens, window.blocks, transfer.last_resume_at
        )
        only_grew = records.endswith(mark)
        if only_grew and records[-_GREW_AT]:
            del records[-_SIZE:]
        after_ms = min(AT_MS_MAX, int((transfer.now_s - transfer.opened_s) * 1000))
        sent, available = transfer.sent_tokens, transfer.available_tokens
        records += _GROWTH.pack(after_ms, only_grew, sent, available) + mark
        if len(records) > RECORDS_MAX * _SIZE:
            del records[:_SIZE]
            self.lost += 1

    def kept(self) -> tuple[bytes, int]:
        """What is kept of it once the transfer is over, and how many records were pushed out."""
        over = max(0, len(self._records) // _SIZE - RECORDS_KEPT)
        return bytes(self._records[over * _SIZE :]), self.lost + over

    def moments(self) -> Iterator[Moment]:
        """Oldest first."""
        return read(self._records)


def read(records: bytes | bytearray) -> Iterator[Moment]:
    """The moments of a history, oldest first."""
    for at in range(0, len(records), _SIZE):
        after_ms, _, sent, available = _GROWTH.unpack_from(records, at)
        state, about, base, blocks, resume = _MARK.unpack_from(records, at + _GROWTH.size)
        stall, knows_total = _STALLS[about & _STALL], bool(about & _KNOWS_TOTAL)
        numbers = (sent, available, base, blocks, resume)
        yield Moment(after_ms / 1000, State(state), stall, knows_total, *numbers)
