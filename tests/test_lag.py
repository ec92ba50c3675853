"""A loop that is held up is seen to have been late, and by how much."""

import asyncio
import time

import uvloop

from kvferry_daemon.lag import LOOK_S, LoopLag
from kvferry_proto.control import LoopStatus

HELD_UP_S = 2.2 * LOOK_S  # one look at least falls due more than 100 ms before its end


async def look(turns: int, held_up_s: float) -> LoopStatus:
    lag = LoopLag()
    time.sleep(held_up_s)  # noqa: ASYNC251  this is what is to be noticed
    for _ in range(1000):
        await asyncio.sleep(LOOK_S / 10)
        if lag.status().looks >= turns:
            break
    lag.close()
    return lag.status()


def test_a_loop_that_is_held_up_is_late_by_as_much() -> None:
    seen = uvloop.run(look(2, HELD_UP_S))
    assert seen.late_over_100_ms >= 1
    assert seen.late_over_2_ms >= seen.late_over_10_ms >= seen.late_over_100_ms
    assert seen.late_max_ms >= (HELD_UP_S - LOOK_S) * 1000


def test_it_goes_on_looking() -> None:
    assert uvloop.run(look(3, 0)).looks >= 3


def test_a_closed_one_looks_no_more() -> None:
    async def closed() -> int:
        lag = LoopLag()
        lag.close()
        await look(2, 0)  # another's, which began later
        return lag.status().looks

    assert uvloop.run(closed()) == 0
