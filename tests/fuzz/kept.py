"""Frames that once showed something new: `corpus/KIND.txt`, a frame in hex and what it showed a line.

`python -m fuzz.collect` writes them anew.
"""

from functools import cache
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
KINDS = ("worker", "peer", "head", "row")


@cache
def kept(kind: str) -> tuple[bytes, ...]:
    """The frames of a kind: what workers say, what daemons say, chunk headers, rows of a ledger."""
    lines = (CORPUS / f"{kind}.txt").read_text().splitlines()
    return tuple(bytes.fromhex(line.partition(" ")[0]) for line in lines)
