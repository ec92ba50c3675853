"""Frames that are nearly right: bytes changed, and messages with a part of them exchanged."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgpack

BYTES_MAX = 1 << 16  # of a mutated frame; larger ones have tests of their own
FILE_BYTES_MAX = 1 << 20
OPENING = (0x80, 0x8F, 0x90, 0x9F, 0xC0, 0xC4, 0xC7, 0xCA, 0xCB, 0xCF, 0xD4, 0xD9, 0xDC, 0xDD, 0xDE, 0xDF)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 1 << 31, (1 << 31) + 1, (1 << 40) + 1, (1 << 63) - 1,
    (1 << 64) - 1, -(1 << 63), 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "x", "t", "sink",
    "source", "0" * 32, "\x00", "\n", "é", "a" * 200, b"", b"\x00" * 16, b"\xff" * 32, [], {}, [[]],
    [[0, 1]], [[0, 0]], [[-1, 1]], [0] * 70, {"": 0}, {"kind": "poll"}, [[[[[[[[[0]]]]]]]]],
)  # fmt: skip


def mutated(frame: bytes, dice: Random, others: Sequence[bytes]) -> bytes:
    """A frame with one change, or a few."""
    for _ in range(dice.choice((1, 1, 1, 1, 2, 3, 6))):
        frame = dice.choice(WAYS)(frame, dice, others)
    return frame[:BYTES_MAX]


def changed_bytes(data: bytes, dice: Random) -> bytes:
    """A file with one change, or a few, which know nothing of what it means."""
    for _ in range(dice.choice((1, 1, 1, 2, 3, 9))):
        data = dice.choice(BLIND_WAYS)(data, dice, (data,))[:FILE_BYTES_MAX]
    return data


def _flip(frame: bytes, dice: Random, _others: Sequence[bytes]) -> bytes:
    if not frame:
        return b"\x80"
    at = dice.randrange(len(frame))
    return frame[:at] + bytes((frame[at] ^ 1 << dice.randrange(8),)) + frame[at + 1 :]


def _set(frame: bytes, dice: Random, _others: Sequence[bytes]) -> bytes:
    at = dice.randrange(len(frame) + 1)
    return frame[:at] + bytes((dice.choice(OPENING),)) + frame[at + dice.randrange(2) :]


def _cut(frame: bytes, dice: Random, _others: Sequence[bytes]) -> bytes:
    first, end = sorted(dice.choices(range(len(frame) + 1), k=2))
    return frame[:first] + frame[end:] if dice.random() < 0.7 else frame[:end]


def _double(frame: bytes, dice: Random, _others: Sequence[bytes]) -> bytes:
    first, end = sorted(dice.choices(range(len(frame) + 1), k=2))
    return frame[:end] + frame[first:end] * dice.choice((1, 1, 2, 9)) + frame[end:]


def _splice(frame: bytes, dice: Random, others: Sequence[bytes]) -> bytes:
    other = dice.choice(others)
    at = dice.randrange(min(len(frame), len(other)) + 1)
    return frame[:at] + other[at:]


def _reshape(frame: bytes, dice: Random, others: Sequence[bytes]) -> bytes:
    """Another message of the same shape but for one value, key or entry."""
    tree = _tree(frame)
    node, key = dice.choice(list(_places(tree))) if _has_places(tree) else (None, None)
    if node is None:
        return frame
    donor = [place for other in dice.choices(others, k=3) for place in _places(_tree(other))]
    donor = [place for place in donor if place[1] == key] or donor  # of the same name, if it can be
    what = dice.choice((0, 1, 1, 1, 2, 3, 4, 4))
    if what == 0 or not donor:
        node[key] = dice.choice(VALUES)
    elif what == 1:
        other, where = dice.choice(donor)
        node[key] = other[where]
    elif what == 2:
        del node[key]
    elif what == 3 and isinstance(node, dict):
        other, where = dice.choice(donor)
        node[str(where)] = other[where]
    elif isinstance(node[key], int):
        node[key] += dice.choice((-1, 1, 4, 64, 8192, 1 << 33))
    else:
        node[key] = [node[key]] * dice.choice((1, 2, 5))
    return bytes(msgpack.packb(tree, default=str)) if _fits(tree) else frame


def _tree(frame: bytes) -> Any:
    try:
        return msgpack.unpackb(frame, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):  # TypeError: a list as a key
        return None


def _fits(tree: Any) -> bool:
    try:
        msgpack.packb(tree, default=str)
    except (ValueError, OverflowError):
        return False
    return True


def _has_places(tree: Any) -> bool:
    return isinstance(tree, dict | list) and bool(tree)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value of a tree, by what it stands in and where."""
    found: list[tuple[Any, Any]] = []
    level = [tree]
    while level:
        node = level.pop()
        if isinstance(node, dict):
            found += [(node, key) for key in node]
            level += node.values()
        elif isinstance(node, list):
            found += [(node, at) for at in range(len(node))]
            level += node
    return found


Way = Callable[[bytes, Random, Sequence[bytes]], bytes]
BLIND_WAYS: tuple[Way, ...] = (_flip, _set, _cut, _double, _splice)
WAYS: tuple[Way, ...] = (*BLIND_WAYS, *(_reshape,) * 15)
