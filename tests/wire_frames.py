"""Frames made by hand, and how one of them has to be refused."""

from typing import Any

import msgpack
import pytest

from kvferry_proto import worker
from kvferry_proto.codec import Codec
from kvferry_proto.errors import Code, FerryError


def packed(**fields: Any) -> bytes:
    frame: bytes = msgpack.packb(fields, datetime=True)
    return frame


def unknown(raw: bytes) -> bytes:
    """A heartbeat with an unknown field, whose value is spelt out."""
    return b"\x82\xa4kind\xa9heartbeat\xa1x" + raw


def refusal(frame: bytes | memoryview, family: Codec[Any] = worker.CALLS) -> FerryError:
    with pytest.raises(FerryError) as refused:
        family.decode(frame)
    assert refused.value.code is Code.BAD_MESSAGE
    assert 0 < len(refused.value.message) <= 300
    return refused.value


def snapshot(**wrong: Any) -> dict[str, Any]:
    return {"role": "sink", "transfer_id": "t", "attempt": 0, "snapshot": 1, "state": 3, **wrong}
