"""Frames: one msgpack map each, with every limit checked before a model sees it."""

from collections.abc import Iterable
from math import isfinite
from typing import Any, Generic, TypeVar, cast

import msgpack  # imported here only
from pydantic import BaseModel, TypeAdapter

from kvferry_proto.errors import Code, FerryError

FRAME_BYTES_MAX = 1 << 20
DEPTH_MAX = 8
ITEMS_MAX = 1 << 16  # of one list or map
NODES_MAX = 1 << 18  # of one frame

T = TypeVar("T", bound=BaseModel)


class Codec(Generic[T]):
    """Encodes and decodes one family of messages: a union told apart by ``kind``."""

    def __init__(self, family: Any) -> None:
        self._reader: TypeAdapter[T] = TypeAdapter(family)

    def encode(self, message: T) -> bytes:
        """Turn a message into its one frame; FerryError(resource_exhausted) if it is too long."""
        frame = cast(bytes, msgpack.packb(message.model_dump(exclude_none=True)))
        if len(frame) > FRAME_BYTES_MAX:
            raise FerryError(
                Code.RESOURCE_EXHAUSTED,
                f"an outgoing frame of {len(frame)} bytes is over {FRAME_BYTES_MAX}",
            )
        return frame

    def decode(self, frame: bytes | memoryview) -> T:
        """Read one frame of an untrusted peer; raise FerryError(bad_message) and only that."""
        if len(frame) > FRAME_BYTES_MAX:
            raise FerryError(
                Code.BAD_MESSAGE, f"a frame of {len(frame)} bytes is over {FRAME_BYTES_MAX}"
            )
        try:
            fields = msgpack.unpackb(
                frame,
                strict_map_key=True,
                object_pairs_hook=_map,
                ext_hook=_no_ext,
                max_array_len=ITEMS_MAX,
                max_map_len=ITEMS_MAX,
            )
            _check_tree(fields)
            return self._reader.validate_python(fields)
        except (ValueError, RecursionError, msgpack.UnpackException) as error:
            raise FerryError(Code.BAD_MESSAGE, _brief(error)) from error


def _map(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"a map key must be a string, not {type(key).__name__}")
        if key in fields:
            raise ValueError(f"key {key[:64]!r} stands twice in one map")
        fields[key] = value
    return fields


def _no_ext(code: int, _data: bytes) -> Any:
    raise ValueError(f"msgpack extension type {code} is not allowed")


def _check_tree(root: object) -> None:
    """Bound depth and node count, and refuse what msgpack allows and we do not."""
    if not isinstance(root, dict):
        raise ValueError(f"a frame holds one map, not {type(root).__name__}")
    level: list[object] = [root]
    nodes = 0
    for _depth in range(DEPTH_MAX + 1):
        below: list[object] = []
        for node in level:
            if isinstance(node, dict):
                below.extend(node.values())
            elif isinstance(node, list):
                below.extend(node)
            elif isinstance(node, float):
                if not isfinite(node):
                    raise ValueError("a number is not finite")
            elif isinstance(node, msgpack.Timestamp):
                raise ValueError("msgpack timestamps are not allowed")
        nodes += len(below)
        if nodes > NODES_MAX:
            raise ValueError(f"a frame holds over {NODES_MAX} values")
        if not below:
            return
        level = below
    raise ValueError(f"a frame is nested deeper than {DEPTH_MAX}")


def _brief(error: BaseException) -> str:
    """Say what is wrong in a bounded number of words; the frame itself may be huge."""
    errors = getattr(error, "errors", None)
    if errors is not None:
        first = errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where or 'message'}: {first['msg']}"[:300]
    return (str(error) or type(error).__name__)[:300]
