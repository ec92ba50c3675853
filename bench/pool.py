"""Cost of taking and giving back 64 blocks out of 100,000."""

import timeit
from collections import deque
from collections.abc import Callable
from typing import Any

from bench.figures import spread
from kvferry_daemon.core.allocator import RunAllocator
from kvferry_daemon.core.pool import BlockPool
from kvferry_proto.states import Role

BLOCKS = 100_000
CALLS = 50_000
ROUNDS = 9


def measure(calls: int = CALLS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Nanoseconds of one take(64) + give(64), bare and with a lease; each a median.

    The first two find the blocks just freed at hand, which is the best case. ``in_turn`` never
    does: two windows, of 64 and of 32 blocks, and whoever frees the one takes one like the other.
    """
    allocator = RunAllocator(BLOCKS)
    pool = BlockPool(BLOCKS, BLOCKS, BLOCKS)
    busy = BlockPool(BLOCKS, BLOCKS, BLOCKS)
    windows = deque([busy.grant(1, Role.SINK, 64).leases, busy.grant(2, Role.SINK, 32).leases])

    def bare() -> None:
        for run, tag in allocator.take(64):
            allocator.give(run, tag)

    def leased() -> None:
        for lease in pool.grant(1, Role.SINK, 64).leases:
            pool.free(lease)

    def in_turn() -> None:
        oldest = windows.popleft()
        for lease in oldest:
            busy.free(lease)
        blocks = 96 - oldest[0].run.blocks  # 64 and 32 in turn: never what lies at hand
        windows.append(busy.grant(oldest[0].owner, Role.SINK, blocks).leases)

    return {
        "rounds": rounds,
        "take_give_64_ns": _nanoseconds(bare, calls, rounds),
        "grant_free_64_ns": _nanoseconds(leased, calls, rounds),
        "grant_free_in_turn_ns": _nanoseconds(in_turn, calls, rounds),
    }


def _nanoseconds(call: Callable[[], None], calls: int, rounds: int) -> dict[str, float]:
    return spread(one / calls * 1e9 for one in timeit.repeat(call, number=calls, repeat=rounds))
