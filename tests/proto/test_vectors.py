"""Golden frames: what is written in tests/vectors is what we write and read, byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout
from kvferry_proto.versions import OURS
from vectors import make
from wire_values import KINDS, codec_of

HERE = Path(make.__file__).parent


def load(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((HERE / f"{name}.json").read_text())
    return entries


VECTORS = [
    pytest.param(one, id=f"{family}: {one['name']}") for family in make.FAMILIES for one in load(family)
]  # fmt: skip


@pytest.mark.parametrize("vector", VECTORS)
def test_a_golden_frame_is_its_message_and_the_message_is_the_frame(vector: dict[str, Any]) -> None:
    cls = KINDS[vector["message"]["kind"]]
    message = cls.model_validate(make.from_json(vector["message"]))
    frame = bytes.fromhex(vector["frame_hex"])
    codec = codec_of(message)
    assert repr(codec.decode(frame)) == repr(message)
    assert codec.encode(message) == frame
    assert make.to_json(message) == vector["message"]


@pytest.mark.parametrize("vector", load("refused"), ids=lambda one: one["name"])
def test_a_golden_refused_frame_is_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(FerryError) as refused:
        worker.CALLS.decode(bytes.fromhex(vector["frame_hex"]))
    assert refused.value.code is Code.BAD_MESSAGE
    assert 0 < len(refused.value.message) <= 300


@pytest.mark.parametrize("vector", load("layouts"), ids=lambda one: one["name"])
def test_a_golden_layout_is_laid_out_so(vector: dict[str, Any]) -> None:
    layout = Layout.model_validate(vector["layout"])
    assert make.layout_entry(vector["name"], layout) == vector


EARLIER = [
    pytest.param(one, id=f"{path.parent.name} {path.stem}: {one['name']}")
    for path in sorted(HERE.glob("wire-*/*.json"))
    for one in json.loads(path.read_text())
]


@pytest.mark.parametrize("vector", EARLIER)
def test_a_frame_of_an_earlier_release_is_still_the_message_that_it_was(
    vector: dict[str, Any],
) -> None:
    """What came since has a default, and nothing has another meaning."""
    cls = KINDS[vector["message"]["kind"]]
    codec = codec_of(cls.model_validate(make.from_json(vector["message"])))
    message = codec.decode(bytes.fromhex(vector["frame_hex"]))
    assert holds(make.to_json(message), vector["message"])


def holds(now: Any, then: Any) -> bool:
    """Whether all that was there is there, as it was."""
    if isinstance(then, dict):
        return isinstance(now, dict) and all(
            key in now and holds(now[key], one) for key, one in then.items()
        )
    if isinstance(then, list):
        return len(now) == len(then) and all(map(holds, now, then))
    return bool(now == then)


def test_every_wire_version_that_is_spoken_has_its_frames() -> None:
    spoken = range(OURS.low, OURS.high + 1)
    assert {path.name for path in HERE.glob("wire-*")} == {f"wire-{one}" for one in spoken}


def test_every_kind_has_a_golden_frame() -> None:
    kinds = {one["message"]["kind"] for family in make.FAMILIES for one in load(family)}
    assert kinds == set(KINDS)


def test_the_committed_files_are_what_the_generator_writes() -> None:
    for name, entries in make.files().items():
        assert (HERE / f"{name}.json").read_text() == make.text_of(entries), name
