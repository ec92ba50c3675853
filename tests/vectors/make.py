"""Writes the golden frames. Run by hand after a change of the wire: python tests/vectors/make.py"""

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # by hand, from anywhere
    ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

from kvferry_proto import control, peer, worker
from kvferry_proto.board import pack_empty, pack_header, pack_slot, slot_key
from kvferry_proto.codec import Codec
from kvferry_proto.layout import Layout
from kvferry_proto.worker import Snapshot

HERE = Path(__file__).parent
FAMILIES: dict[str, tuple[Codec[Any], ...]] = {
    "worker_calls": (worker.CALLS,),
    "worker_replies": (worker.REPLIES,),
    "peer": (peer.MESSAGES,),
    "control": (control.REQUESTS, control.ANSWERS),
}


def to_json(value: Any) -> Any:
    """A message as JSON, without fields that are not on the wire; bytes as {"$hex": ...}."""
    if hasattr(value, "model_dump"):
        return to_json(value.model_dump(exclude_none=True))
    if isinstance(value, bytes):
        return {"$hex": value.hex()}
    if isinstance(value, dict):
        return {key: to_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    return value


def from_json(value: Any) -> Any:
    """The fields of a message, as they come out of msgpack."""
    if isinstance(value, dict):
        if set(value) == {"$hex"}:
            return bytes.fromhex(value["$hex"])
        return {key: from_json(one) for key, one in value.items()}
    return [from_json(one) for one in value] if isinstance(value, list) else value


def entry(name: str, message: Any, codec: Codec[Any]) -> dict[str, Any]:
    """One vector."""
    return {"name": name, "message": to_json(message), "frame_hex": codec.encode(message).hex()}


def layout_entry(name: str, layout: Layout) -> dict[str, Any]:
    """What a client has to work out of a layout by itself."""
    return {
        "name": name,
        "layout": to_json(layout),
        "digest_hex": layout.digest.hex(),
        "block_bytes": layout.block_bytes,
        "offsets_bytes": [place.offset_bytes for place in layout.places],
    }


def board_entries(shown: dict[str, Snapshot]) -> list[dict[str, Any]]:
    """A header, and slots as they are once written."""
    entries: list[dict[str, Any]] = [
        {"name": "header", "hex": pack_header(4096, "5" * 32, 3 * 10**9, 1234567890123).hex()},
        {"name": "a slot that is nobody's", "sequence": 8, "hex": pack_empty(8).hex()},
    ]
    for name, one in shown.items():
        key = slot_key(one.role, one.transfer_id, one.attempt, one.rank)
        slot = pack_slot(6, key, one).hex()
        entries.append(
            {"name": name, "sequence": 6, "key": key, "message": to_json(one), "hex": slot}
        )
    return entries


def files() -> dict[str, list[dict[str, Any]]]:
    """Every file's content."""
    from vectors import messages, refused

    made = {
        family: [
            entry(name, message, next(c for c in codecs if _speaks(c, message)))
            for name, message in messages.MESSAGES[family].items()
        ]
        for family, codecs in FAMILIES.items()
    }
    made["board"] = board_entries(messages.SHOWN)
    made["layouts"] = [layout_entry(name, one) for name, one in messages.LAYOUTS.items()]
    made["refused"] = [
        {"name": name, "why": why, "frame_hex": frame.hex()}
        for name, (why, frame) in refused.FRAMES.items()
    ]
    return made


def _speaks(codec: Codec[Any], message: Any) -> bool:
    if codec is control.REQUESTS:
        return isinstance(message, control.Request)
    return True


def text_of(entries: list[dict[str, Any]]) -> str:
    """One entry a line, so that a change shows as that line."""
    return "[\n" + ",\n".join(json.dumps(one, sort_keys=False) for one in entries) + "\n]\n"


if __name__ == "__main__":
    for family, entries in files().items():
        (HERE / f"{family}.json").write_text(text_of(entries))
        print(f"{family}.json: {len(entries)} entries")
