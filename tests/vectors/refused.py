"""Frames that every reader must refuse with bad_message, and why. All are worker calls."""

import datetime
import struct
from typing import Any

import msgpack

from kvferry_proto.codec import DEPTH_MAX


def packed(**fields: Any) -> bytes:
    frame: bytes = msgpack.packb(fields, datetime=True)
    return frame


def resume(sent_tokens: Any, **more: Any) -> bytes:
    return packed(kind="resume", transfer_id="t", sent_tokens=sent_tokens, **more)


def hello(**plane: Any) -> bytes:
    planes = [{"name": "k", "dtype": "uint8", **plane}]
    return packed(kind="hello", lock="x", layout={"planes": planes})


def unknown(raw: bytes) -> bytes:
    """A heartbeat with an unknown field `x`, whose value is spelt out."""
    return b"\x82\xa4kind\xa9heartbeat\xa1x" + raw


def ready(aux: Any) -> bytes:
    return packed(kind="ready", transfer_id="t", ready_tokens=1, aux=aux)


FRAMES: dict[str, tuple[str, bytes]] = {
    "empty": ("no bytes", b""),
    "not msgpack": ("0xc1 is never used", b"\xc1"),
    "not a map": ("a list", b"\x91\xa4kind"),
    "nil": ("nil", b"\xc0"),
    "cut short": ("the frame ends inside a string", packed(kind="heartbeat")[:-1]),
    "trailing byte": ("a byte after the map", packed(kind="heartbeat") + b"\xc0"),
    "two maps": ("two messages in one frame", packed(kind="heartbeat") * 2),
    "no kind": ("kind is missing", packed(call=1)),
    "unknown kind": ("no such kind", packed(kind="explode")),
    "kind in bytes": ("kind is a bin", packed(kind=b"heartbeat")),
    "kind nil": ("kind is nil", packed(kind=None)),
    "kind of another family": ("a reply is no call", packed(kind="snapshots")),
    "missing field": ("sent_tokens is missing", packed(kind="resume", transfer_id="t")),
    "text for a number": ('"3" is not 3', resume("3")),
    "true for a number": ("true is not 1", resume(True)),
    "float for a number": ("3.0 is not 3", resume(3.0)),
    "nil for a number": ("a field without default may not be nil", resume(None)),
    "list for a number": ("a list", resume([3])),
    "negative": ("below 0", resume(-1)),
    "over the limit": ("above 2**40", resume((1 << 40) + 1)),
    "over 63 bits": ("above 2**63 - 1", packed(kind="heartbeat", call=1 << 63)),
    "empty id": ("no characters", packed(kind="release", transfer_id="", role="sink")),
    "long id": ("129 characters", packed(kind="release", transfer_id="x" * 129, role="sink")),
    "id with newline": ("a control character", packed(kind="release", transfer_id="t\n", role="sink")),
    "id in bytes": ("a bin", packed(kind="release", transfer_id=b"t", role="sink")),
    "id not UTF-8": ("not UTF-8", b"\x83\xa4kind\xa7release\xabtransfer_id\xa1\xff\xa4role\xa4sink"),
    "unknown role": ("no such role", packed(kind="release", transfer_id="t", role="middle")),
    "role in bytes": ("a bin", packed(kind="release", transfer_id="t", role=b"sink")),
    "role of another case": ("SINK", packed(kind="release", transfer_id="t", role="SINK")),
    "unknown dtype": ("no such dtype", hello(dtype="float4")),
    "true in a shape": ("true is not 1", hello(shape=[True])),
    "shape 0": ("an axis of 0", hello(shape=[0])),
    "shape is text": ("not a list", hello(shape="12")),
    "unknown order": ("no such order", hello(shape=[2], order="DNH")),
    "order of another case": ("hnd", hello(shape=[2], order="hnd")),
    "order in bytes": ("a bin", hello(shape=[2], order=b"HND")),
    "order nil": ("a field with another default may not be nil", hello(shape=[2], order=None)),
    "order of a scalar": ("HND needs an axis", hello(order="HND")),
    "heads of a scalar": ("heads need an axis", hello(heads_total=1)),
    "0 heads": ("below 1", hello(shape=[1], heads_total=0)),
    "too many heads": ("above 2**24", hello(shape=[1], heads_total=(1 << 24) + 1)),
    "heads in no even share": ("3 does not divide 8", hello(shape=[3], heads_total=8)),
    "more heads than there are": ("8 of 4 heads", hello(shape=[8], heads_total=4)),
    "true heads": ("true is not 1", hello(shape=[1], heads_total=True)),
    "no planes": ("an empty list", packed(kind="hello", lock="x", layout={"planes": []})),
    "session too short": (
        "31 characters",
        packed(kind="hello", lock="x", session="0" * 31, layout={"planes": [{"name": "k", "dtype": "uint8"}]}),
    ),
    "no transfers in a poll": ("an empty list", packed(kind="poll", transfers=[])),
    "map for a list": ("a map", packed(kind="poll", transfers={"a": 1})),
    "wait over a minute": (
        "above 60",
        packed(kind="poll", transfers=[{"role": "sink", "transfer_id": "t"}], wait_s=60.5),
    ),
    "wait NaN": (
        "not finite",
        packed(kind="poll", transfers=[{"role": "sink", "transfer_id": "t"}], wait_s=float("nan")),
    ),
    "hello in a batch": ("no verb", packed(kind="batch", calls=[{"kind": "hello"}])),
    "batch in a batch": ("no verb", packed(kind="batch", calls=[{"kind": "batch", "calls": []}])),
    "aux true": ("aux takes int, float, str, bin", ready({"a": True})),
    "aux nil": ("aux takes int, float, str, bin", ready({"a": None})),
    "aux list": ("aux takes int, float, str, bin", ready({"a": [1]})),
    "aux over 63 bits": ("above 2**63 - 1; no float either", ready({"a": 1 << 63})),
    "aux name too long": ("65 characters", ready({"a" * 65: 1})),
    "65 aux values": ("at most 64", ready({f"a{i}": 1 for i in range(65)})),
    "unknown field NaN": ("not finite", unknown(b"\xcb" + struct.pack(">d", float("nan")))),
    "unknown field infinite": ("not finite", unknown(b"\xcb" + struct.pack(">d", float("-inf")))),
    "unknown field NaN of 32 bits": ("not finite", unknown(b"\xca" + struct.pack(">f", float("nan")))),
    "unknown field ext": ("an extension type", unknown(b"\xd4\x05x")),
    "unknown field timestamp": (
        "a timestamp",
        packed(kind="heartbeat", x=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)),
    ),
    "key twice": ("a key stands twice", b"\x82\xa4kind\xa9heartbeat\xa4kind\xa9heartbeat"),
    "key twice, deep": ("a key stands twice", unknown(b"\x91\x82\xa1a\x01\xa1a\x02")),
    "number for a key": ("a key is a number", unknown(b"\x81\x01\x02")),
    "bytes for a key": ("a key is a bin", unknown(b"\x81\xc4\x01a\x02")),
    "nil for a key": ("a key is nil", unknown(b"\x81\xc0\x02")),
    "too deep": (f"nested {DEPTH_MAX + 1} deep", unknown(b"\x91" * DEPTH_MAX + b"\x00")),
    "very deep": ("nested 5000 deep", unknown(b"\x91" * 5000 + b"\x00")),
    "list that is not there": ("4294967295 items declared", unknown(b"\xdd\xff\xff\xff\xff")),
    "map that is not there": ("4294967295 pairs declared", unknown(b"\xdf\xff\xff\xff\xff")),
    "text that is not there": ("4294967295 bytes declared", unknown(b"\xdb\xff\xff\xff\xff")),
    "bin that is not there": ("4294967295 bytes declared", unknown(b"\xc6\xff\xff\xff\xff")),
}  # fmt: skip
