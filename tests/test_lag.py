"""A loop that is held up is seen to have been late, and each of its turns is timed."""

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from kvferry_daemon.lag import LOOK_S, LoopLag
from kvferry_daemon.timed_loop import TimedLoop
from kvferry_proto.control import LoopStatus, TurnStatus

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


async def turns_of(work: Callable[[], Awaitable[None]]) -> TurnStatus:
    """What is told of the turns that this takes."""
    lag = LoopLag()
    lag.begin()
    await asyncio.sleep(0)  # ours ends, and then they are counted
    await work()
    await asyncio.sleep(0)  # so does the last of them
    lag.close()
    seen = lag.status().turns
    assert seen is not None
    return seen


def timed(work: Callable[[], Awaitable[None]]) -> TurnStatus:
    return uvloop.run(turns_of(work), loop_factory=TimedLoop)


def burn(seconds: float) -> None:
    until_s = time.thread_time() + seconds
    while time.thread_time() < until_s:
        pass


async def by_call_soon(done: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(done)


async def by_call_later(done: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(0.001, done)


async def by_call_at(done: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    loop.call_at(loop.time() + 0.001, done)


async def from_a_thread(done: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    threading.Thread(target=loop.call_soon_threadsafe, args=(done,)).start()


async def by_reader(done: Callable[[], None]) -> None:
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()

    def read() -> None:
        loop.remove_reader(ours)
        done()
        ours.close()
        theirs.close()

    loop.add_reader(ours, read)
    theirs.send(b"x")


async def by_task(done: Callable[[], None]) -> None:
    async def step() -> None:
        done()

    asyncio.get_running_loop().create_task(step())


WAYS_IN = [by_call_soon, by_call_later, by_call_at, from_a_thread, by_reader, by_task]


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_turn_is_timed_once_however_it_came(
    way: Callable[[Callable[[], None]], Awaitable[None]],
) -> None:
    async def work() -> None:
        ended = asyncio.Event()

        def turn() -> None:
            burn(0.012)
            ended.set()

        await way(turn)
        await ended.wait()

    seen = timed(work)
    assert seen.work_over_10_ms == 1
    assert seen.over_1_ms >= seen.over_2_ms >= seen.over_10_ms >= 1
    assert seen.work_over_1_ms >= seen.work_over_2_ms >= 1
    assert seen.work_max_ms >= 12
    assert seen.max_ms >= 12
    assert seen.seconds >= 0.012
    assert seen.turns >= 2


def test_a_turn_that_waits_is_long_and_has_no_work() -> None:
    async def work() -> None:
        time.sleep(0.11)  # noqa: ASYNC251  as one does that waits for the GIL
        await asyncio.sleep(0)

    seen = timed(work)
    assert seen.over_100_ms == 1
    assert seen.max_ms >= 110
    assert seen.work_over_100_ms == 0


def test_what_was_before_the_beginning_does_not_count() -> None:
    async def work() -> TurnStatus:
        time.sleep(0.11)  # noqa: ASYNC251
        return await turns_of(lambda: asyncio.sleep(0))

    assert uvloop.run(work(), loop_factory=TimedLoop).over_100_ms == 0


def test_a_callback_that_raises_is_timed_and_told() -> None:
    told: list[object] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))

        def turn() -> None:
            burn(0.012)
            raise ValueError("told")

        loop.call_soon(turn)
        await asyncio.sleep(0)

    assert timed(work).work_over_10_ms == 1
    assert [str(one) for one in told] == ["told"]


def test_a_loop_without_clocks_tells_of_no_turns() -> None:
    assert uvloop.run(look(1, 0)).turns is None
