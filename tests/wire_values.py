"""Any message of any family, for Hypothesis: built from the fields themselves, so none is missed."""

import re
import types
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kvferry_proto import control, peer, worker
from kvferry_proto.codec import Codec
from kvferry_proto.layout import Layout, Order, Plane
from kvferry_proto.versions import Versions

Any_ = st.SearchStrategy[Any]
MORE = 3  # items of a list, or letters of a name, above the fewest allowed


def _members(union: Any) -> tuple[type[BaseModel], ...]:
    return get_args(get_args(union)[0] if get_origin(union) is Annotated else union)


FAMILIES: dict[str, tuple[Codec[Any], tuple[type[BaseModel], ...]]] = {
    "calls": (worker.CALLS, _members(worker.WorkerCall)),
    "replies": (worker.REPLIES, _members(worker.WorkerReply)),
    "peer": (peer.MESSAGES, _members(peer.PeerMessage)),
    "requests": (control.REQUESTS, _members(control.Request)),
    "answers": (control.ANSWERS, _members(control.Answer)),
}
KINDS: dict[str, type[BaseModel]] = {
    str(cls.model_fields["kind"].default): cls for _, all_ in FAMILIES.values() for cls in all_
}


def codec_of(message: BaseModel) -> Codec[Any]:
    """The codec of the family that a message belongs to."""
    return next(codec for codec, classes in FAMILIES.values() if type(message) in classes)


def messages(cls: type[BaseModel]) -> Any_:
    """Any message of a class; fields that have a default are left out now and then."""
    if cls is Layout:
        return _layouts()
    if cls is Plane:
        return _planes()
    if cls is Versions:
        pairs = st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(sorted)
        return pairs.map(lambda pair: Versions(low=pair[0], high=pair[1]))
    return _fields(cls).map(lambda fields: cls(**fields))


def _fields(cls: type[BaseModel], without: tuple[str, ...] = ()) -> Any_:
    required: dict[str, Any_] = {}
    optional: dict[str, Any_] = {}
    for name, field in cls.model_fields.items():
        if name not in without:
            into = required if field.is_required() else optional
            into[name] = _values(field.annotation, field.metadata)
    return st.fixed_dictionaries(required, optional=optional)


def _planes() -> Any_:
    """Any plane whose fields go together: heads and their order need an axis."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> Plane:
        fields = draw(_fields(Plane, without=("heads_total", "order")))
        if axes := fields.get("shape"):
            ranks = draw(st.none() | st.integers(1, (1 << 24) // axes[0]))
            fields["heads_total"] = ranks and axes[0] * ranks
            fields["order"] = draw(st.sampled_from(Order))
        return Plane(**fields)

    return draw_one()


def _layouts() -> Any_:
    names = _values(*_split(get_args(Layout.model_fields["aux"].annotation)[0]))
    planes = st.lists(messages(Plane), min_size=1, max_size=4, unique_by=lambda p: p.name)
    aux = st.lists(names, max_size=3, unique=True)
    fitting = planes.filter(lambda all_: sum(p.token_bytes for p in all_) < 1 << 16)
    return st.builds(
        Layout, planes=fitting, aux=aux, block_size_tokens=st.sampled_from([1, 3, 128, 1 << 15])
    )


def _split(annotation: Any) -> tuple[Any, list[Any]]:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return inner, metadata
    return annotation, []


def _limits(metadata: list[Any]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            limits |= _limits(item.metadata)
        else:
            names = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
            limits |= {n: getattr(item, n) for n in names if getattr(item, n, None) is not None}
    return limits


def _values(annotation: Any, metadata: list[Any]) -> Any_:
    """Values of one annotation within the limits beside it."""
    inner, more = _split(annotation)
    if more:
        return _values(inner, [*metadata, *more])
    limits = _limits(metadata)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return st.one_of([_values(arg, metadata) for arg in args])
    if annotation is type(None):
        return st.none()
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(_values(args[0], []), **_sizes(limits))
    if origin is dict:
        return st.dictionaries(_values(args[0], []), _values(args[1], []), max_size=MORE)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return st.lists(_values(args[0], []), max_size=MORE).map(tuple)
        return st.tuples(*(_values(arg, []) for arg in args))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return messages(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return st.sampled_from(list(annotation))
    return _scalars(annotation, limits)


def _sizes(limits: dict[str, Any]) -> dict[str, Any]:
    least = limits.get("min_length", 0)
    return {"min_size": least, "max_size": min(least + MORE, limits.get("max_length", 1 << 16))}


def _scalars(kind: type, limits: dict[str, Any]) -> Any_:
    if kind is bool:
        return st.booleans()
    if kind is int:
        most = limits["lt"] - 1 if "lt" in limits else limits.get("le", (1 << 64) - 1)
        return st.integers(limits.get("ge", -(1 << 63)), most)
    if kind is float:
        above = "gt" in limits
        return st.floats(
            limits.get("gt", limits.get("ge")), limits.get("le"), exclude_min=above,
            allow_nan=False, allow_infinity=False,
        )  # fmt: skip
    sizes = _sizes(limits)
    if kind is bytes:
        return st.binary(**sizes)
    assert kind is str, f"no strategy for {kind}"
    if "pattern" not in limits:
        return st.text(**sizes)
    letters = limits["pattern"].removeprefix("^").removesuffix("+$")
    pattern = f"{letters}{{{sizes['min_size']},{sizes['max_size']}}}"
    return st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True)
