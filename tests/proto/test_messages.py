"""Messages: every kind survives the wire exactly; WIRE.md names whatever is in them."""

import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import kvferry_proto
from kvferry_proto import chunk, codec, control, fields, layout, peer, versions, worker
from kvferry_proto.errors import ADVICE, Code
from kvferry_proto.fields import ErrorInfo, Message
from kvferry_proto.states import Mode, Role, StallReason, State
from wire_values import FAMILIES, KINDS, codec_of, messages

WIRE = (Path(kvferry_proto.__file__).parent / "WIRE.md").read_text()
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def wire_models() -> list[type[BaseModel]]:
    """Every model that a socket may carry, parts of messages included."""
    found = {
        one
        for module in (worker, peer, control, layout, versions)
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, BaseModel) and not one.__name__.startswith("_")
    }
    return sorted(found - {BaseModel, Message}, key=lambda model: model.__name__)


def test_every_class_with_a_kind_belongs_to_one_family() -> None:
    with_kind = [model for model in wire_models() if "kind" in model.model_fields]
    in_families = [model for _, classes in FAMILIES.values() for model in classes]
    assert sorted(with_kind, key=id) == sorted(in_families, key=id)
    assert len(KINDS) == len(in_families), "two messages share a kind"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
def test_any_message_survives_the_wire(kind: str, data: st.DataObject) -> None:
    message = data.draw(messages(KINDS[kind]))
    family = codec_of(message)
    back = family.decode(family.encode(message))
    assert back == message
    assert repr(back) == repr(message)  # 3, 3.0 and True are equal and not the same


def test_a_message_of_another_family_is_no_message_of_this_one() -> None:
    frame = worker.CALLS.encode(worker.Heartbeat())
    for name, (family, _) in FAMILIES.items():
        if name != "calls":
            with pytest.raises(Exception, match="bad_message"):
                family.decode(frame)


@pytest.mark.parametrize("model", wire_models(), ids=lambda model: model.__name__)
def test_messages_cannot_be_changed(model: type[BaseModel]) -> None:
    assert model.model_config["frozen"]
    assert model.model_config["strict"]
    assert model.model_config["extra"] == "ignore"


def of(**wrong: Any) -> Any:
    return wrong


WRONG: dict[str, tuple[type[Message], dict[str, Any]]] = {
    "id with a space": (worker.Send, of(transfer_id="a b")),
    "id with a final newline": (worker.Send, of(transfer_id="a\n")),
    "id of 129": (worker.Send, of(transfer_id="x" * 129)),
    "no id": (worker.Send, of(transfer_id="")),
    "tokens above the limit": (worker.Resume, of(transfer_id="t", sent_tokens=(1 << 40) + 1)),
    "attempt below 0": (worker.Resume, of(transfer_id="t", sent_tokens=0, attempt=-1)),
    "after below -1": (worker.Watched, of(transfer_id="t", role=Role.SINK, after=-2)),
    "endless wait": (worker.Poll, of(transfers=[], wait_s=float("inf"))),
    "lock with a slash": (worker.Hello, of(lock="../x")),
    "aux that is no number": (
        worker.Ready,
        of(transfer_id="t", ready_tokens=0, aux={"a": float("nan")}),
    ),
    "aux of 2**63": (worker.Ready, of(transfer_id="t", ready_tokens=0, aux={"a": 1 << 63})),
    "aux True": (worker.Ready, of(transfer_id="t", ready_tokens=0, aux={"a": True})),
    "aux name of 65": (worker.Ready, of(transfer_id="t", ready_tokens=0, aux={"a" * 65: 1})),
    "65 aux values": (
        worker.Ready,
        of(transfer_id="t", ready_tokens=0, aux={str(i): 1 for i in range(65)}),
    ),
    "ticket of 31 bytes": (
        peer.Ticket,
        of(
            source_boot_id="a" * 16,
            sink_boot_id="a" * 16,
            stream=0,
            connection=0,
            port=1,
            ticket=b"x" * 31,
        ),
    ),
    "stream 16": (peer.Want, of(first_token=0, tokens=1, stream=16, connection=0)),
    "an extent of no tokens": (peer.Want, of(first_token=0, tokens=0, stream=0, connection=0)),
    "a limit of 1001": (control.GetTransfers, of(limit=1001)),
    "error words of 1025": (
        ErrorInfo,
        of(code="internal", fault="us", message="x" * 1025, remedy=""),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_message_with_a_wrong_value_cannot_be_made(name: str) -> None:
    cls, fields = WRONG[name]
    with pytest.raises(ValidationError):
        cls(**fields)


# --- WIRE.md ---


def section(title: str) -> str:
    """The part of WIRE.md under this heading, up to the next one that is no smaller."""
    start = re.search(rf"^(##+) {re.escape(title)}$", WIRE, re.MULTILINE)
    assert start, f"WIRE.md has no section {title!r}"
    end = re.compile(rf"^#{{2,{len(start[1])}}} ", re.MULTILINE).search(WIRE, start.end())
    return WIRE[start.end() : end.start() if end else None]


@pytest.mark.parametrize("model", wire_models(), ids=lambda model: model.__name__)
def test_wire_page_names_every_field(model: type[BaseModel]) -> None:
    kind = model.model_fields.get("kind")
    text = section(f"`{kind.default}`" if kind else model.__name__)
    fields = set(model.model_fields) - {"kind", "call", "source_boot_id", "sink_boot_id"}
    if model is peer.PeerWelcome:
        fields.add("sink_boot_id")
    assert fields <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def shown_default(field: Any) -> str:
    """What the page's default column says of a field."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "absent"
    if isinstance(default, versions.Versions):
        return f"{default.low} to {default.high}"
    if isinstance(default, BaseModel):
        return f"`{json.dumps(default.model_dump(exclude_defaults=True))}`"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int | float):
        return str(default)
    return f"`{json.dumps(default)}`"


@pytest.mark.parametrize("model", wire_models(), ids=lambda model: model.__name__)
def test_wire_page_has_every_default_and_what_may_be_nil(model: type[BaseModel]) -> None:
    kind = model.model_fields.get("kind")
    text = section(f"`{kind.default}`" if kind else model.__name__)
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|", text, re.MULTILINE)
    fields = model.model_fields
    for name, wire_type, default in (row for row in rows if row[0] in fields):
        field = fields[name]
        assert default == shown_default(field), name
        optional = type(None) in get_args(field.annotation)
        assert ("?" in wire_type) == optional, name


def test_wire_page_has_no_field_that_is_gone() -> None:
    known = {field for model in wire_models() for field in model.model_fields}
    tables = WIRE[WIRE.index("## Worker socket") : WIRE.index("## Errors")]
    assert set(re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE)) <= known


@pytest.mark.parametrize("code", Code)
def test_wire_page_has_every_error_with_its_fault_and_remedy(code: Code) -> None:
    advice = ADVICE[code]
    assert f"| `{code.value}` | {advice.fault.value} | {advice.remedy} |" in section("Errors")


@pytest.mark.parametrize("word", [*Role, *Mode, *StallReason, *layout.Dtype, *layout.Order])
def test_wire_page_names_every_word(word: Any) -> None:
    assert f"`{word.value}`" in WIRE


@pytest.mark.parametrize("state", State)
def test_wire_page_has_every_state_with_its_number(state: State) -> None:
    assert f"| {state.value} | `{state.name}` |" in WIRE


def test_wire_page_has_the_limits_of_the_code() -> None:
    limits = {
        "FRAME_BYTES_MAX": codec.FRAME_BYTES_MAX,
        "DEPTH_MAX": codec.DEPTH_MAX,
        "ITEMS_MAX": codec.ITEMS_MAX,
        "NODES_MAX": codec.NODES_MAX,
        "POLL_MAX": worker.POLL_MAX,
        "BATCH_MAX": worker.BATCH_MAX,
        "WANTS_MAX": peer.WANTS_MAX,
        "PULLS_MAX": peer.PULLS_MAX,
        "TRANSFERS_MAX": control.TRANSFERS_MAX,
        "PLANES_MAX": layout.PLANES_MAX,
        "STRIPS_MAX": layout.STRIPS_MAX,
        "AUX_BYTES_MAX": fields.AUX_BYTES_MAX,
        "WINDOW_BLOCKS_MAX": worker.WINDOW_BLOCKS_MAX,
        "BLOCK_BYTES_MAX": layout.BLOCK_BYTES_MAX,
        "STREAMS_MAX": peer.STREAMS_MAX,
        "PAYLOAD_BYTES_MAX": chunk.PAYLOAD_BYTES_MAX,
    }
    missing = [name for name, value in limits.items() if f"| {name} | {value} |" not in WIRE]
    assert not missing
