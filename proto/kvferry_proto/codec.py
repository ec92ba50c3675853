"""Frames: one msgpack map each, with every limit checked before a model sees it."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import chain
from math import isfinite
from typing import Any, Generic, TypeVar

import msgpack  # imported here only
from pydantic import BaseModel, TypeAdapter

from kvferry_proto.errors import Code, FerryError

FRAME_BYTES_MAX = 1 << 20
DEPTH_MAX = 8
ITEMS_MAX = 1 << 16  # of one list or map
NODES_MAX = 1 << 18  # of one frame
SMALL_BYTES = 1 << 12  # a frame that may get by with a glance at its bytes

T = TypeVar("T", bound=BaseModel)
Map = dict[str, Any]
Pairs = list[tuple[Any, Any]]

# The bytes that can open a list, map, bin, ext or float, and those that make a float not finite.
# They may stand anywhere, as part of a number or a text: then a frame is looked at more closely.
_MARKS = bytes([*range(0x80, 0xA0), *range(0xC4, 0xCC), *range(0xD4, 0xD9), *range(0xDC, 0xE0)])
_UNMARKED = bytes(set(range(256)) - set(_MARKS) - {0x7F, 0xFF})
_DOUBTFUL = re.compile(rb"[\xc4-\xc9\xd4-\xd8]|[\xca\xcb][\x7f\xff]")  # bin or ext; NaN or inf
_KEY = frozenset({str})
_LEAF = frozenset({str, int, bytes, bool, type(None)})


class Codec(Generic[T]):
    """Encodes and decodes one family of messages: a union told apart by ``kind``."""

    def __init__(self, family: Any) -> None:
        reader: TypeAdapter[T] = TypeAdapter(family)
        self._read: Callable[[Map], T] = reader.validator.validate_python

    def encode(self, message: T, call: int | None = None) -> bytes:
        """Turn a message into its one frame: one that ``decode`` takes.

        ``call`` numbers it anew: a repeated call is the same message, and a copy of it costs more.
        Raises FerryError: resource_exhausted if it is over a limit, internal if it holds a value
        that the wire has no place for.
        """
        fields = message.__pydantic_serializer__.to_python(message, exclude_none=True)
        if call is not None:
            fields["call"] = call
        try:
            frame: bytes = msgpack.packb(fields)
        except (ValueError, OverflowError) as error:
            raise FerryError(Code.INTERNAL, f"{type(message).__name__}: {error}"[:300]) from error
        if len(frame) > ITEMS_MAX:  # below that no limit can be reached
            _check_outgoing(frame)
        return frame

    def decode(self, frame: bytes | memoryview) -> T:
        """Read one frame of an untrusted peer; raise FerryError(bad_message) and only that."""
        try:
            return self._read(_unpacked(bytes(frame)))
        except (ValueError, RecursionError, msgpack.UnpackException) as error:
            said = _brief(error)
        raise FerryError(Code.BAD_MESSAGE, said)  # outside: the cause would keep the frame alive


def _unpacked(frame: bytes) -> Map:
    """Unpack a frame, and refuse what msgpack allows and we do not."""
    if len(frame) > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {len(frame)} bytes is over {FRAME_BYTES_MAX}")
    if len(frame) > SMALL_BYTES:
        _check_whole(frame)
    fields = _canonical(frame) if len(frame) <= NODES_MAX else None
    if fields is None:
        fields = _unpack(frame, _counted_map())
    if type(fields) is not dict:
        raise ValueError(f"a frame holds one map, not {type(fields).__name__}")
    if not _is_simple(frame):
        _check_tree(fields)
    return fields


def _unpack(frame: bytes, hook: Callable[[Pairs], Map] | None) -> Any:
    items_max = min(ITEMS_MAX, len(frame))
    return msgpack.unpackb(
        frame,
        strict_map_key=True,
        object_pairs_hook=hook,
        ext_hook=_no_ext,
        max_array_len=items_max,
        max_map_len=items_max,
    )


def _canonical(frame: bytes) -> Any:
    """What a frame holds if it is what we would have written; else None.

    A key that stood twice would be missing in what we write. To write it again costs a third of
    what a look at each map costs, which would be Python's.
    """
    fields = _unpack(frame, None)
    return fields if msgpack.packb(fields) == frame else None


def _is_simple(frame: bytes) -> bool:
    """Whether its bytes alone show that a frame has nothing in it that `_check_tree` refuses.

    A frame with at most DEPTH_MAX opening bytes cannot be nested deeper, one without a bin has no
    bytes for keys, and a float that is not finite begins with one of four pairs of bytes.
    """
    if len(frame) > SMALL_BYTES:
        return False
    marks = frame.translate(None, _UNMARKED)
    return len(marks) <= DEPTH_MAX and _DOUBTFUL.search(marks) is None


def _check_whole(frame: bytes) -> None:
    """Walk over a frame without building it: lists that are declared and not there cost nothing."""
    walker = msgpack.Unpacker(max_buffer_size=FRAME_BYTES_MAX)
    walker.feed(frame)
    walker.skip()


def _map(pairs: Pairs) -> Map:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        doubled, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {doubled[:64]!r} stands twice in one map")
    return fields


def _counted_map() -> Callable[[Pairs], Map]:
    """Build maps, but no more than a frame may have: a map costs far more than its one byte."""
    maps_left = NODES_MAX + 1

    def build(pairs: Pairs) -> Map:
        nonlocal maps_left
        maps_left -= 1
        if maps_left < 0:
            raise ValueError(f"a frame holds over {NODES_MAX} values")
        return _map(pairs)

    return build


def _no_ext(code: int, _data: bytes) -> Any:
    raise ValueError(f"msgpack extension type {code} is not allowed")


def _check_tree(root: Map) -> None:
    """Bound depth and node count; refuse numbers that are not finite, timestamps, other keys."""
    level: list[Any] = [root]
    nodes = 0
    for _depth in range(DEPTH_MAX):  # a whole level at a time: no turn of Python's for a small map
        nodes += sum(map(len, level))
        if nodes > NODES_MAX:
            raise ValueError(f"a frame holds over {NODES_MAX} values")
        maps = [node for node in level if type(node) is dict]
        if not _KEY.issuperset(map(type, chain.from_iterable(maps))):
            raise ValueError("a map key must be a string")
        values = list(chain.from_iterable(map(dict.values, maps)))
        values += chain.from_iterable([node for node in level if type(node) is list])
        if _LEAF.issuperset(map(type, values)):
            return
        level = [value for value in values if type(value) not in _LEAF and _has_values(value)]
        if not level:
            return
    raise ValueError(f"a frame is nested deeper than {DEPTH_MAX}")


def _has_values(value: object) -> bool:
    if isinstance(value, dict | list):
        return True
    if isinstance(value, float):
        if not isfinite(value):
            raise ValueError("a number is not finite")
        return False
    raise ValueError("msgpack timestamps are not allowed")


def _check_outgoing(frame: bytes) -> None:
    """Raise FerryError(resource_exhausted) if the other side would refuse the frame's size."""
    said = f"{len(frame)} bytes is over {FRAME_BYTES_MAX}"
    if len(frame) <= FRAME_BYTES_MAX:
        try:
            tree = _unpack(frame, None)  # bounds lists and maps
            if len(frame) > NODES_MAX:  # below that there cannot be so many values
                _check_tree(tree)
            return
        except ValueError as error:
            said = str(error)
    raise FerryError(Code.RESOURCE_EXHAUSTED, f"an outgoing frame is too large: {said}")


def _brief(error: BaseException) -> str:
    """Say what is wrong in a bounded number of words; the frame itself may be huge."""
    errors = getattr(error, "errors", None)
    if errors is not None:
        first = errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"])
        return f"{where or 'message'}: {first['msg']}"[:300]
    return (str(error) or type(error).__name__)[:300]
