"""Cost of taking and giving back 64 blocks out of 100,000."""

import json
import statistics
import timeit
from typing import Any

from kvferry_daemon.core.allocator import RunAllocator
from kvferry_daemon.core.pool import BlockPool
from kvferry_proto.states import Role

BLOCKS = 100_000
CALLS = 100_000
ROUNDS = 9


def measure() -> dict[str, Any]:
    """Nanoseconds of one take(64) + give(64), bare and with a lease; medians of several rounds."""
    allocator = RunAllocator(BLOCKS)
    pool = BlockPool(BLOCKS, BLOCKS, BLOCKS)

    def bare() -> None:
        for run, tag in allocator.take(64):
            allocator.give(run, tag)

    def leased() -> None:
        for lease in pool.grant(1, Role.SINK, 64).leases:
            pool.free(lease)

    return {
        "take_give_64_ns": _median_ns(bare),
        "grant_free_64_ns": _median_ns(leased),
    }


def _median_ns(call: Any) -> float:
    rounds = timeit.repeat(call, number=CALLS, repeat=ROUNDS)
    return round(statistics.median(rounds) / CALLS * 1e9, 1)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
