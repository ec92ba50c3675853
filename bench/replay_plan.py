"""What a replay does: requests of a trace as transfers, and the model of who computes them.

The model, all rates in tokens of the trace's own seconds:

- A request goes to the next prefill slot of its process that is free, in the order of arrival. The
  slot computes it alone, at ``prefill_tokens_a_s``, and marks every ``piece_tokens`` ready when they
  are computed. How many there will be is known from the start, as it is of a prompt.
- The decode side opens its end at the arrival, if fewer than ``decodes`` requests have a place
  there. It copies what has come into the engine's own memory, ``piece_tokens`` at a time, at
  ``copy_tokens_a_s`` (of 128 KiB each they are 26 GB/s, what a PCIe link bears); the place is free
  again when ``output_tokens_a_s`` have made the whole answer.
- A prefix that an earlier request brought is held by prefill and decode alike, ``prefix_blocks``
  blocks of the trace at most, least recently used first out. It is neither computed nor moved. It
  counts as held from that request's arrival on, so every run moves exactly the same tokens.
- The source daemon has room for everything, and a payload's is taken when its prefill begins. So
  prefill never waits: what is measured is the sink.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HASH_BLOCK_TOKENS = 512  # of one id in a trace
SECOND_MS = 1000


@dataclass(frozen=True)
class Model:
    """The numbers of a scenario."""

    speed: float = 5.0  # seconds of the trace in one second
    prefill_workers: int = 1  # processes
    prefill_slots: int = 8  # of all of them together
    prefill_tokens_a_s: float = 8_000.0  # of one slot
    piece_tokens: int = 2_048
    decode_workers: int = 1  # processes
    decodes: int = 128  # of all of them together
    copy_tokens_a_s: float = 200_000.0  # of one request
    output_tokens_a_s: float = 50.0
    prefix_blocks: int = 16_000
    window_tokens: int = 8_192


class Request(NamedTuple):
    """One line of a trace."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


class Job(NamedTuple):
    """One request as a transfer of the tokens [start_tokens, total_tokens)."""

    number: int
    at_s: float
    start_tokens: int
    total_tokens: int
    output_tokens: int

    @property
    def moved_tokens(self) -> int:
        """What travels."""
        return self.total_tokens - self.start_tokens


def read_trace(path: Path, requests: int | None) -> list[Request]:
    """The first ``requests`` of a trace; all of them if None."""
    with path.open() as lines:
        told = [json.loads(line) for line, _ in zip(lines, _up_to(requests), strict=False)]
    return [
        Request(
            one["timestamp"] / SECOND_MS,
            one["input_length"],
            one["output_length"],
            tuple(one["hash_ids"]),
        )
        for one in told
    ]


def _up_to(count: int | None) -> Iterable[int]:
    return range(1 << 62 if count is None else count)


def plan(requests: list[Request], prefix_blocks: int) -> list[Job]:
    """Every request as a transfer; the last block always moves, or there would be none."""
    held: OrderedDict[int, None] = OrderedDict()
    jobs = []
    for number, request in enumerate(requests):
        assert request.input_tokens > 0, f"request {number} has no token"
        blocks = _held_blocks(held, request.hash_ids)
        blocks = min(blocks, (request.input_tokens - 1) // HASH_BLOCK_TOKENS)
        start_tokens = blocks * HASH_BLOCK_TOKENS
        jobs.append(
            Job(number, request.at_s, start_tokens, request.input_tokens, request.output_tokens)
        )
        for one in request.hash_ids:
            held[one] = None
            held.move_to_end(one)
        while len(held) > prefix_blocks:
            held.popitem(last=False)
    return jobs


def _held_blocks(held: OrderedDict[int, None], hash_ids: tuple[int, ...]) -> int:
    for count, one in enumerate(hash_ids):
        if one not in held:
            return count
    return len(hash_ids)
