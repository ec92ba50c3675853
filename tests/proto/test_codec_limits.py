"""Codec: its limits are where they are said to be, and a hostile frame costs little."""

import struct
import traceback
import tracemalloc
from typing import Any

import pytest

from kvferry_proto import control, peer, worker
from kvferry_proto.codec import DEPTH_MAX, FRAME_BYTES_MAX, ITEMS_MAX, NODES_MAX, Codec
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import Role, State
from wire_frames import packed, refusal, snapshot, unknown

BEAT = worker.Heartbeat()
MIB = 1 << 20


@pytest.mark.parametrize("nested", range(DEPTH_MAX + 3))
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a"])
def test_a_frame_is_nested_only_so_deep(nested: int, opening: bytes) -> None:
    frame = unknown(opening * nested + b"\x00")
    if nested < DEPTH_MAX:  # the frame's own map is one
        assert worker.CALLS.decode(frame) == BEAT
    else:
        assert "deep" in str(refusal(frame))


def items(count: int, item: bytes = b"\x00") -> bytes:
    return struct.pack(">BI", 0xDD, count) + item * count


def test_limits_are_where_they_are_said_to_be() -> None:
    assert worker.CALLS.decode(unknown(items(ITEMS_MAX))) == BEAT
    assert "exceeds" in str(refusal(unknown(items(ITEMS_MAX + 1))))
    head = unknown(b"")
    full = head + struct.pack(">BI", 0xC6, FRAME_BYTES_MAX - len(head) - 5)
    full += bytes(FRAME_BYTES_MAX - len(full))
    assert worker.CALLS.decode(full) == BEAT
    assert "over" in str(refusal(full + b"\x00"))
    lists = [items(n) for n in (ITEMS_MAX, ITEMS_MAX, ITEMS_MAX, ITEMS_MAX - 6)]
    assert worker.CALLS.decode(unknown(b"\x94" + b"".join(lists))) == BEAT  # NODES_MAX exactly
    more = [items(ITEMS_MAX)] * 3 + [items(ITEMS_MAX - 5)]
    assert str(NODES_MAX) in str(refusal(unknown(b"\x94" + b"".join(more))))


def filled(head: bytes) -> bytes:
    return head + b"\xc0" * (FRAME_BYTES_MAX - len(head))


LIST, WIDE = b"\xdc\xff\xff", (FRAME_BYTES_MAX - 100) // 65540
HOSTILE: dict[str, tuple[Codec[Any], bytes]] = {
    "deep lists, declared only": (worker.CALLS, unknown(LIST * 500)),
    "deep lists in a long frame": (worker.CALLS, filled(unknown(LIST * 500))),
    "deep maps in a long frame": (worker.CALLS, filled(unknown(b"\xde\xff\xff\xa1a" * 500))),
    "a million lists": (worker.CALLS, unknown(items(WIDE, LIST + b"\x90" * 65535))),
    "a million maps": (worker.CALLS, unknown(items(WIDE, LIST + b"\x80" * 65535))),
    "maps of one pair": (worker.CALLS, unknown(items(WIDE // 3, LIST + b"\x81\xa0\x80" * 65535))),
    "a huge kind": (worker.CALLS, packed(kind="x" * (MIB - 100))),
    "a huge key": (worker.CALLS, packed(kind="heartbeat", **{"k" * (MIB - 100): float("nan")})),
    "polls full of mistakes": (
        worker.CALLS,
        packed(kind="batch", calls=[{"kind": "poll", "transfers": [{}] * 1000}] * 250),
    ),
    "pulls full of mistakes": (
        peer.MESSAGES,
        packed(kind="pulls", pulls=[{"want": [{}] * 1000}] * 250),
    ),
    "snapshots full of mistakes": (worker.REPLIES, packed(kind="snapshots", transfers=[{}] * 65535)),
    "runs full of mistakes": (
        worker.REPLIES,
        packed(kind="snapshots", transfers=[snapshot(runs=[[0, 0, 0]] * 65535)]),
    ),
    "planes full of mistakes": (
        control.ANSWERS,
        packed(kind="status", pools=[{"planes": [0] * 65535}] * 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_frame_costs_bounded_memory_and_few_words(name: str) -> None:
    family, frame = HOSTILE[name]
    assert len(frame) <= FRAME_BYTES_MAX, "the length alone would refuse it"
    tracemalloc.start()
    try:
        error = refusal(frame, family)
        left, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < (4 if name.startswith("deep") else 80) * MIB  # what is not there costs nothing
    assert left < MIB, "the error keeps the frame alive"
    assert len("".join(traceback.format_exception(error))) < 20_000


# --- what cannot be sent ---


def test_what_is_encoded_can_be_decoded_or_is_refused_at_once() -> None:
    one = worker.Snapshot(
        role=Role.SINK, transfer_id="t", attempt=0, snapshot=1, state=State.TRANSFERRING,
        runs=[(worker.BLOCKS_MAX, 1)] * worker.WINDOW_BLOCKS_MAX,
    )  # fmt: skip
    most = worker.Snapshots(transfers=[one] * 2)
    assert worker.REPLIES.decode(worker.REPLIES.encode(most)) == most
    wide = worker.Snapshots(transfers=[one] * 4)
    small = one.model_copy(update={"runs": []})
    many = worker.Snapshots(transfers=[small] * (ITEMS_MAX + 1))
    for too_much in (wide, many):
        with pytest.raises(FerryError) as refused:
            worker.REPLIES.encode(too_much)
        assert refused.value.code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("wrong", [{"address": "\udcff"}, {"streams_open": 1 << 64}])
def test_a_value_without_a_form_on_the_wire_is_our_own_error(wrong: dict[str, Any]) -> None:
    peer = control.PeerStatus(address="", state="up").model_copy(update=wrong)  # unchecked
    counts = dict.fromkeys(("pid", "workers", "blocks_total", "blocks_free"), 1)
    texts = dict.fromkeys(("version", "peer_address", "runtime_dir"), "")
    maps: dict[str, Any] = {name: {} for name in ("transfers", "stalls", "counters")}
    message = control.Status.model_validate(
        {
            "wire_versions": [1, 1], "boot_id": "a" * 16, "uptime_s": 0, "draining": False,
            "pools": [], "peers": [peer], **counts, **texts, **maps,
        }
    )  # fmt: skip
    with pytest.raises(FerryError) as refused:
        control.ANSWERS.encode(message)
    assert refused.value.code is Code.INTERNAL
