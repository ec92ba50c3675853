"""Look for frames that show something new, and write them into corpus/: `python -m fuzz.collect`.

New is what no earlier frame has shown: another reason to be refused, or another answer to a kind of
message. Words that name a value count once.
"""

import argparse
import re
from random import Random
from typing import Any

from fuzz.kept import CORPUS, KINDS
from fuzz.mutate import mutated
from fuzz.targets import Bytes, Ledgers, Lives, restored
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.past import LedgerWrong
from kvferry_proto import peer, worker
from kvferry_proto.chunk import BadChunk, read_greeting, read_header
from kvferry_proto.codec import Codec
from kvferry_proto.errors import FerryError

FRAME_BYTES_MAX = 1_000  # of a kept one
VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|[0-9a-f]{16,}|-?\d[\d.,e+]*")


UNKNOWN = re.compile(r"Input tag .*")  # of a message, whatever it is called


class Found:
    """The shortest frame of each kind that shows something."""

    def __init__(self) -> None:
        self._shown: dict[str, dict[str, bytes]] = {kind: {} for kind in KINDS}

    def note(self, kind: str, frame: bytes, shows: str) -> None:
        shows = VALUE.sub("N", UNKNOWN.sub("unknown", " ".join(shows.split())))[:60]
        known = self._shown[kind].get(shows)
        if len(frame) <= FRAME_BYTES_MAX and (known is None or len(frame) < len(known)):
            self._shown[kind][shows] = frame

    def write(self) -> None:
        for kind, shown in self._shown.items():
            lines = [f"{frame.hex()} {shows}\n" for shows, frame in sorted(shown.items())]
            (CORPUS / f"{kind}.txt").write_text("".join(lines))
            print(f"{kind}: {len(lines)} frames")


class Watched(Lives):
    """Two daemons whose answers are looked at."""

    def __init__(self, dice: Random, found: Found) -> None:
        super().__init__(dice)
        self._found = found

    def __call__(self) -> bytes:
        self._shows = ""
        frame = super().__call__()
        kind, shows = self._shows.split(" ", 1) if self._shows else ("", "")
        if kind:
            self._found.note(kind, frame, shows)
        for codec, name in ((worker.CALLS, "worker"), (peer.MESSAGES, "peer")):
            self._note_refusal(codec, name, frame)
        return frame

    def _note_refusal(self, codec: Codec[Any], name: str, frame: bytes) -> None:
        try:
            codec.decode(frame)
        except FerryError as refused:
            self._found.note(name, frame, refused.message)

    def handle(self, node: Node, event: out.NodeEvent, now_s: float) -> list[out.NodeEffect]:
        effects = super().handle(node, event, now_s)
        words = sorted({_word(effect) for effect in effects})
        if isinstance(event, out.WorkerCalled):
            self._shows = f"worker {event.call.kind}: {', '.join(words)}"
        elif isinstance(event, out.SinkSaid):
            self._shows = f"peer {event.message.kind}: {', '.join(words)}"
        return effects


def _word(effect: out.NodeEffect) -> str:
    """What an effect is, and for an answer which one."""
    said = getattr(effect, "reply", None) or getattr(effect, "message", None)
    error = getattr(said, "error", None)
    return str(getattr(error, "code", None) or getattr(said, "kind", type(effect).__name__))


def main() -> None:
    """Play, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000)
    given = parser.parse_args()
    dice, found = Random(6), Found()
    lives, heads, ledgers = Watched(dice, found), Bytes(dice), Ledgers(dice)
    for number in range(given.frames):
        lives()
        if number % 10 == 0:
            _note_head(found, mutated(dice.choice(heads.heads), dice, heads.heads)[:64])
            _note_row(found, ledgers)
    found.write()


def _note_head(found: Found, data: bytes) -> None:
    for read in (read_header, read_greeting):
        try:
            read(data)
            shows = "is good"
        except BadChunk as refused:
            shows = str(refused)
        found.note("head", data, f"{read.__name__}: {shows}")


def _note_row(found: Found, ledgers: Ledgers) -> None:
    rows, name = ledgers.changed()
    try:
        restored(rows)
    except LedgerWrong as refused:
        found.note("row", rows[name], str(refused))


if __name__ == "__main__":
    main()
