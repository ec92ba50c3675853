"""Codec: whatever is no message gives FerryError(bad_message) and only that."""

import datetime
import struct
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry_proto import worker
from kvferry_proto.codec import SMALL_BYTES, Codec
from kvferry_proto.errors import FerryError
from kvferry_proto.states import Role, State
from wire_frames import packed, refusal, snapshot, unknown
from wire_values import FAMILIES, KINDS, codec_of, messages

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
BEAT = worker.Heartbeat()
ALL = [codec for codec, _ in FAMILIES.values()]


def read(frame: bytes, family: Codec[Any] = worker.CALLS) -> Any:
    """The message, or None if it was refused as it must be."""
    try:
        return family.decode(frame)
    except FerryError:
        refusal(frame, family)
        return None


# --- anything may come ---


@given(noise=st.binary(max_size=200), family=st.sampled_from(ALL))
def test_noise_is_no_message(noise: bytes, family: Codec[Any]) -> None:
    refusal(noise, family)


any_message = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: messages(KINDS[kind]))


@given(message=any_message, data=st.data())
@settings(deadline=None, suppress_health_check=SLOW)
def test_a_cut_or_longer_frame_is_no_message(message: Any, data: st.DataObject) -> None:
    family = codec_of(message)
    frame = family.encode(message)
    refusal(frame[: data.draw(st.integers(0, len(frame) - 1))], family)
    refusal(frame + data.draw(st.binary(min_size=1, max_size=9)), family)
    refusal(frame + frame, family)


@given(message=any_message, data=st.data())
@settings(deadline=None, suppress_health_check=SLOW)
def test_a_damaged_frame_is_another_message_or_none(message: Any, data: st.DataObject) -> None:
    family = codec_of(message)
    frame = bytearray(family.encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    after = read(bytes(frame), family)
    if after is not None:
        assert repr(family.decode(family.encode(after))) == repr(after)


scalars = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text()
    | st.binary(max_size=20) | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=9))
    | st.datetimes(timezones=st.just(datetime.UTC))
)  # fmt: skip
keys = st.text(max_size=5) | st.integers(-5, 500) | st.binary(max_size=3)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=5)
)


@given(tree=trees, depth=st.integers(0, 10), data=st.data())
@settings(deadline=None, suppress_health_check=SLOW)
def test_a_large_frame_is_judged_like_a_small_one(
    tree: Any, depth: int, data: st.DataObject
) -> None:
    """Small frames may get by with a glance, large ones may not: the verdict is the same."""
    for _ in range(depth):
        tree = [tree]
    message = data.draw(any_message)
    family = codec_of(message)
    fields = {**message.model_dump(exclude_none=True), "unheard_of": tree}
    small = read(packed(**fields), family)
    assert small in (None, message)
    assert read(packed(**fields, padding="x" * SMALL_BYTES), family) == small


@given(kind=st.sampled_from(sorted(KINDS)), tree=trees, data=st.data())
@settings(deadline=None, suppress_health_check=SLOW)
def test_anything_in_any_field_is_a_message_or_refused(
    kind: str, tree: Any, data: st.DataObject
) -> None:
    message = data.draw(messages(KINDS[kind]))
    family = codec_of(message)
    field = data.draw(st.sampled_from(sorted(type(message).model_fields)))
    after = read(packed(**{**message.model_dump(), field: tree}), family)
    if after is not None:
        assert repr(family.decode(family.encode(after))) == repr(after)


# --- one mistake at a time (more in tests/vectors/refused.json) ---


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=SLOW)
def test_a_missing_field_is_named(kind: str, data: st.DataObject) -> None:
    message = data.draw(messages(KINDS[kind]))
    fields = message.model_dump(exclude_none=True)
    needed = [name for name, field in type(message).model_fields.items() if field.is_required()]
    for name in ["kind", *needed]:
        without = {key: value for key, value in fields.items() if key != name}
        assert name in str(refusal(packed(**without), codec_of(message)))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=SLOW)
def test_unknown_fields_are_skipped(kind: str, data: st.DataObject) -> None:
    message = data.draw(messages(KINDS[kind]))
    newer = packed(**message.model_dump(), since_version_2={"deep": [1, 2.5, None, b"\xff"]})
    assert codec_of(message).decode(newer) == message


@pytest.mark.parametrize("state", [True, False, 3.0, "3", b"3", 5, -1, None, [3]])
def test_a_state_is_its_number_and_nothing_like_it(state: Any) -> None:
    frame = packed(kind="snapshots", transfers=[snapshot(state=state)])
    assert "state" in str(refusal(frame, worker.REPLIES))


@pytest.mark.parametrize("word", [b"draining", "DRAINING", "", 5, True, ["draining"]])
def test_a_stall_is_one_of_its_words(word: Any) -> None:
    frame = packed(kind="snapshots", transfers=[snapshot(stall=word)])
    assert "stall" in str(refusal(frame, worker.REPLIES))


@pytest.mark.parametrize("word", [b"whole", "WHOLE", "", 1, True, None])
def test_a_mode_is_one_of_its_words(word: Any) -> None:
    assert "mode" in str(refusal(packed(kind="receive", transfer_id="t", mode=word)))


def test_the_right_state_is_read() -> None:
    reply = worker.REPLIES.decode(packed(kind="snapshots", transfers=[snapshot()]))
    assert isinstance(reply, worker.Snapshots)
    assert reply.transfers[0].state is State.TRANSFERRING
    assert reply.transfers[0].role is Role.SINK


@pytest.mark.parametrize("count", [-1, 1 << 41, (1 << 64) - 1, 1.0, True, "1", None, [1], {}])
@pytest.mark.parametrize("field", ["sent_tokens", "attempt", "call"])
def test_a_count_is_a_whole_number_within_its_limits(field: str, count: Any) -> None:
    fields = {"kind": "resume", "transfer_id": "t", "sent_tokens": 0, field: count}
    if field == "call" and count == 1 << 41:
        assert worker.CALLS.decode(packed(**fields)).call == count
    else:
        assert field in str(refusal(packed(**fields)))


@pytest.mark.parametrize("aux", [(1 << 63) - 1, -(1 << 63), 1.0, -0.0, 1e300, "1", "", b"1"])
def test_an_aux_value_keeps_value_and_type(aux: Any) -> None:
    call = worker.CALLS.decode(
        packed(kind="ready", transfer_id="t", ready_tokens=1, aux={"a": aux})
    )
    assert isinstance(call, worker.Ready)
    assert repr(call.aux) == repr({"a": aux})


NOT_FINITE = [float("nan"), float("inf"), float("-inf"), -float("nan")]


@pytest.mark.parametrize("number", NOT_FINITE)
@pytest.mark.parametrize("form", [">cf", ">cd"])
def test_numbers_that_are_not_finite_are_refused_anywhere(number: float, form: str) -> None:
    raw = struct.pack(form, b"\xca" if form == ">cf" else b"\xcb", number)
    for frame in (unknown(raw), unknown(b"\x91\x81\xa1a" + raw)):
        assert "finite" in str(refusal(frame))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_is_skipped_in_an_unknown_field(number: float) -> None:
    assert worker.CALLS.decode(packed(kind="heartbeat", x=number)) == BEAT


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 8, 12, 16, 300])
@pytest.mark.parametrize("code", [-128, -1, 0, 5, 127])
def test_extension_types_are_refused(length: int, code: int) -> None:
    head = struct.pack(">BHb", 0xC8, length, code)
    refusal(unknown(head + bytes(length)))


def test_a_memoryview_is_read_like_bytes() -> None:
    frame = worker.CALLS.encode(BEAT)
    assert worker.CALLS.decode(memoryview(frame)) == BEAT
    refusal(memoryview(frame + b"\x00"))


def test_a_call_is_numbered_as_it_is_encoded() -> None:
    call = worker.Heartbeat(call=3)
    assert worker.CALLS.decode(worker.CALLS.encode(call, 9)) == worker.Heartbeat(call=9)
    assert call.call == 3
