"""The status board: a table in which a daemon shows its transfers to workers that map it.

A header, then slots of one size. Here is how both are packed; WIRE.md has the same as a table.
A slot is written under a sequence lock and sealed with a checksum: neither writer nor reader has
memory barriers, so the sequence alone would not show every torn read.
"""

import hashlib
import struct
from typing import NamedTuple
from zlib import crc32

from kvferry_proto.states import Role, StallReason, State
from kvferry_proto.worker import Snapshot

MAGIC = b"KVFBOARD"
VERSION = 1
HEADER_BYTES = 256
SLOT_BYTES = 256
RUNS_MAX = 18  # of a window; one with more is asked for by message
WORD_BYTES = 8
BEAT_WORD = 7  # of the header: when the daemon was alive last
ASK = 1  # a flag: not all of it is here
HAS_AUX = 2  # a flag: its aux values are known, and not here
UNKNOWN = -1  # of the total

_HEADER = struct.Struct("<8sII32sQQ")
_SLOT = struct.Struct("<QQQBBHI9q36I")
_SEALED_BYTES = _SLOT.size
_STALLS: tuple[StallReason | None, ...] = (None, *StallReason)
_NUMBER_OF = {stall: number for number, stall in enumerate(_STALLS)}
STATE_MAX = max(State)
_NO_RUNS = (0,) * 2 * RUNS_MAX
assert _SLOT.size + WORD_BYTES == SLOT_BYTES


class Header(NamedTuple):
    """What a board says of itself."""

    magic: bytes
    version: int
    slots: int
    boot_id: str
    stale_ns: int  # a heartbeat older than this shows that nobody writes here any more
    beat_ns: int  # CLOCK_MONOTONIC; 0: the board is given up


class Slot(NamedTuple):
    """What one rank of a transfer is shown; ``key`` 0 for nobody."""

    sequence: int
    key: int
    snapshot: int
    state: State
    stall: StallReason | None
    flags: int
    start_tokens: int
    sent_tokens: int
    partial_sent_tokens: int
    last_resume_at: int
    total_tokens: int | None
    available_tokens: int
    base_tokens: int
    allocated_tokens: int
    target_tokens: int
    runs: list[tuple[int, int]]


def board_bytes(slots: int) -> int:
    """The size of the file."""
    return HEADER_BYTES + slots * SLOT_BYTES


def word_of(slot: int) -> int:
    """Where a slot's sequence is, counted in words."""
    return (HEADER_BYTES + slot * SLOT_BYTES) // WORD_BYTES


def slot_key(role: Role, transfer_id: str, attempt: int, rank: int) -> int:
    """The name that a slot bears while it is this rank's."""
    name = f"{role.value}:{attempt}:{rank}:{transfer_id}".encode()
    return 1 + int.from_bytes(hashlib.sha256(name).digest()[:7], "little")  # never nobody's


def pack_header(slots: int, boot_id: str, stale_ns: int, beat_ns: int) -> bytes:
    """The first bytes of the file."""
    packed = _HEADER.pack(MAGIC, VERSION, slots, boot_id.encode(), stale_ns, beat_ns)
    return packed.ljust(HEADER_BYTES, b"\0")


def unpack_header(data: bytes) -> Header:
    """Read the first HEADER_BYTES of a file, whatever they are; magic and version are to check."""
    magic, version, slots, boot_id, stale_ns, beat_ns = _HEADER.unpack_from(data)
    boot = boot_id.rstrip(b"\0").decode("ascii", "replace")
    return Header(magic, version, slots, boot, stale_ns, beat_ns)


def pack_slot(sequence: int, key: int, seen: Snapshot) -> bytes:
    """A slot as it is once it is written: ``sequence`` is even."""
    flags = 0 if seen.aux is None else HAS_AUX
    runs = seen.runs
    if seen.error is not None or len(runs) > RUNS_MAX:
        flags |= ASK
        runs = []
    blocks = [number for run in runs for number in run]
    total = seen.total_tokens
    return _sealed(
        sequence,
        key,
        seen.snapshot,
        seen.state,
        _NUMBER_OF[seen.stall],
        flags,
        len(runs),
        seen.start_tokens,
        seen.sent_tokens,
        seen.partial_sent_tokens,
        seen.last_resume_at,
        UNKNOWN if total is None else total,
        seen.available_tokens,
        seen.base_tokens,
        seen.allocated_tokens,
        seen.target_tokens,
        *blocks,
        *_NO_RUNS[len(blocks) :],
    )


def pack_empty(sequence: int) -> bytes:
    """A slot that is nobody's."""
    return _sealed(sequence, *(0,) * (15 + 2 * RUNS_MAX))


def _sealed(*values: int) -> bytes:
    body = _SLOT.pack(*values)
    return body + crc32(body).to_bytes(WORD_BYTES, "little")


def unpack_slot(data: bytes) -> Slot | None:
    """Read SLOT_BYTES; None if they are torn, which another read may find whole, or unknown to us."""
    if data[0] & 1 or crc32(data[:_SEALED_BYTES]) != int.from_bytes(data[_SEALED_BYTES:], "little"):
        return None
    values = _SLOT.unpack_from(data)
    sequence, key, number, state, stall, flags, count = values[:7]
    start, sent, partial, last, total, available, base, allocated, target = values[7:16]
    if state > STATE_MAX or stall >= len(_STALLS) or count > RUNS_MAX:
        return None  # a later daemon's word: by message it is refused in so many words
    return Slot(
        sequence,
        key,
        number,
        State(state),
        _STALLS[stall],
        flags,
        start,
        sent,
        partial,
        last,
        None if total == UNKNOWN else total,
        available,
        base,
        allocated,
        target,
        list(zip(values[16 : 16 + 2 * count : 2], values[17 : 16 + 2 * count : 2], strict=True)),
    )


def snapshot_of(slot: Slot, before: Snapshot) -> Snapshot:
    """The snapshot that a slot shows: of the same rank of the same transfer as ``before``."""
    return Snapshot.model_construct(
        role=before.role,
        transfer_id=before.transfer_id,
        attempt=before.attempt,
        rank=before.rank,
        world_size=before.world_size,
        snapshot=slot.snapshot,
        state=slot.state,
        stall=slot.stall,
        error=None,
        start_tokens=slot.start_tokens,
        sent_tokens=slot.sent_tokens,
        partial_sent_tokens=slot.partial_sent_tokens,
        last_resume_at=slot.last_resume_at,
        total_tokens=slot.total_tokens,
        available_tokens=slot.available_tokens,
        base_tokens=slot.base_tokens,
        allocated_tokens=slot.allocated_tokens,
        target_tokens=slot.target_tokens,
        runs=slot.runs,
        aux=before.aux,
        slot=before.slot,
    )
