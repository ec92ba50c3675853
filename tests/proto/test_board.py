"""Slots of the status board: what is packed comes back, and nothing else does."""

import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_proto import board
from kvferry_proto.board import (
    ASK,
    HAS_AUX,
    RUNS_MAX,
    SLOT_BYTES,
    pack_empty,
    pack_header,
    pack_slot,
    slot_key,
    snapshot_of,
    unpack_header,
    unpack_slot,
)
from kvferry_proto.errors import Code
from kvferry_proto.fields import TOKENS_MAX, ErrorInfo
from kvferry_proto.states import Role, StallReason, State
from kvferry_proto.worker import BLOCKS_MAX, BoardSlot, Snapshot

tokens = st.integers(0, TOKENS_MAX)
runs = st.tuples(st.integers(0, BLOCKS_MAX), st.integers(0, BLOCKS_MAX))
snapshots = st.builds(
    Snapshot,
    role=st.sampled_from(Role),
    transfer_id=st.just("t"),
    attempt=st.integers(0, 9),
    snapshot=st.integers(0, (1 << 63) - 1),
    state=st.sampled_from(State),
    stall=st.none() | st.sampled_from(StallReason),
    start_tokens=tokens,
    sent_tokens=tokens,
    partial_sent_tokens=tokens,
    last_resume_at=st.integers(-1, TOKENS_MAX),
    total_tokens=st.none() | tokens,
    available_tokens=tokens,
    base_tokens=tokens,
    allocated_tokens=tokens,
    target_tokens=tokens,
    runs=st.lists(runs, max_size=RUNS_MAX),
    slot=st.just(BoardSlot(index=3, key=5)),
)


def a_snapshot(**fields: Any) -> Snapshot:
    given_ = {"role": Role.SINK, "transfer_id": "t", "attempt": 0, "snapshot": 7, "state": State(3)}
    return Snapshot(**{**given_, **fields})


@given(snapshots, st.integers(1, 1 << 62))
def test_a_snapshot_that_fits_comes_back_whole(seen: Snapshot, half: int) -> None:
    packed = pack_slot(2 * half, 5, seen)
    assert len(packed) == SLOT_BYTES
    slot = unpack_slot(packed)
    assert slot is not None
    assert (slot.sequence, slot.key, slot.flags) == (2 * half, 5, 0)
    before = Snapshot(**{**a_snapshot().model_dump(), "role": seen.role, "attempt": seen.attempt})
    assert snapshot_of(slot, before.model_copy(update={"slot": seen.slot})) == seen


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"error": ErrorInfo.of(Code.ABORTED, "x")}, ASK),
        ({"runs": [(2 * i, 1) for i in range(RUNS_MAX + 1)]}, ASK),
        ({"aux": {"a": 1}}, HAS_AUX),
        ({"aux": {}, "error": ErrorInfo.of(Code.ABORTED, "x")}, HAS_AUX | ASK),
    ],
)
def test_what_has_no_room_is_flagged(fields: dict[str, Any], flags: int) -> None:
    slot = unpack_slot(pack_slot(2, 1, a_snapshot(**fields)))
    assert slot is not None
    assert (slot.flags, slot.runs) == (flags, [])


@pytest.mark.parametrize("at", range(SLOT_BYTES))
def test_one_wrong_byte_anywhere_is_seen(at: int) -> None:
    packed = bytearray(pack_slot(2, 99, a_snapshot(sent_tokens=300, runs=[(1, 2)])))
    packed[at] ^= 2
    assert unpack_slot(bytes(packed)) is None


@given(snapshots, snapshots, st.integers(0, SLOT_BYTES))
def test_the_head_of_one_and_the_tail_of_another_are_no_slot(
    one: Snapshot, two: Snapshot, cut: int
) -> None:
    first, second = pack_slot(2, 1, one), pack_slot(4, 1, two)
    mixed = first[:cut] + second[cut:]
    assert unpack_slot(mixed) is None or mixed in (first, second)


def test_an_odd_sequence_is_one_that_is_being_written() -> None:
    packed = pack_slot(3, 1, a_snapshot())
    assert unpack_slot(packed) is None


@pytest.mark.parametrize(("at", "value"), [(24, 5), (25, 7), (28, RUNS_MAX + 1)])
def test_a_whole_slot_that_says_what_we_do_not_know_is_one_to_ask_about(
    at: int, value: int
) -> None:
    """A later daemon may have another reason to stall: a poll raised ValueError or IndexError."""
    packed = bytearray(pack_slot(2, 1, a_snapshot(runs=[(1, 2)])))
    packed[at] = value
    body = bytes(packed[:-8])
    assert unpack_slot(body + zlib.crc32(body).to_bytes(8, "little")) is None


def test_an_empty_slot_is_nobodys() -> None:
    slot = unpack_slot(pack_empty(8))
    assert slot is not None
    assert (slot.sequence, slot.key) == (8, 0)


def test_bytes_that_were_never_written_are_no_slot() -> None:
    assert unpack_slot(bytes(SLOT_BYTES)) is None


def test_the_header_comes_back_and_the_heartbeat_is_a_word_of_it() -> None:
    packed = pack_header(4096, "ab" * 16, 3_000_000_000, 17)
    assert unpack_header(packed) == (board.MAGIC, board.VERSION, 4096, "ab" * 16, 3_000_000_000, 17)
    assert struct.unpack_from("<Q", packed, board.BEAT_WORD * 8) == (17,)
    assert len(packed) == board.HEADER_BYTES


def test_every_rank_of_every_attempt_and_side_has_its_own_key() -> None:
    names = [(role, id_, a, r) for role in Role for id_ in "tu" for a in (0, 1) for r in (0, 1)]
    keys = {slot_key(*name) for name in names}
    assert len(keys) == len(names)
    assert all(0 < key < 1 << 63 for key in keys)


def test_everything_lies_where_the_page_says() -> None:
    seen = a_snapshot(
        stall=StallReason.WAITING_FOR_RESUME, start_tokens=11, sent_tokens=12, partial_sent_tokens=13,
        last_resume_at=14, available_tokens=16, base_tokens=17, allocated_tokens=18,
        target_tokens=19, runs=[(21, 22), (23, 24)],
    )  # fmt: skip
    packed = pack_slot(6, 99, seen)
    assert struct.unpack_from("<QQQ", packed) == (6, 99, 7)
    assert struct.unpack_from("<BBHI", packed, 24) == (3, 4, 0, 2)
    assert struct.unpack_from("<9q", packed, 32) == (11, 12, 13, 14, -1, 16, 17, 18, 19)
    assert struct.unpack_from("<5I", packed, 104) == (21, 22, 23, 24, 0)
    assert struct.unpack_from("<Q", packed, 248) == (zlib.crc32(packed[:248]),)
    head = pack_header(4096, "ab" * 16, 30, 17)
    assert head[:8] == b"KVFBOARD"
    assert struct.unpack_from("<II", head, 8) == (1, 4096)
    assert head[16:48] == b"ab" * 16
    assert struct.unpack_from("<QQ", head, 48) == (30, 17)
