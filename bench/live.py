"""What a poll and a chunk cost while so many transfers are live."""

from typing import Any

from bench import chunks, messages

LIVE = (10, 100, 1000, 10_000)


def measure(
    live: tuple[int, ...] = LIVE,
    rounds: int = messages.ROUNDS,
    calls: int = messages.CALLS,
    chunk_rounds: int = chunks.ROUNDS,
    chunks_a_round: int = chunks.CHUNKS,
) -> dict[str, Any]:
    """Both, one after the other."""
    polls = messages.measure_live(live, rounds, calls)
    return polls | chunks.measure(live, chunk_rounds, chunks_a_round)
