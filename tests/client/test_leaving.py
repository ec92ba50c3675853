"""Calls that wait, are cancelled or fail half-way: nobody is held up, and nothing is left."""

import asyncio
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from client.payloads import BLOCK, LAYOUT, WINDOW, Daemons, payload
from kvferry_client import AsyncClient, FerryError, Layout, Role, connect, sync
from kvferry_proto import worker
from live import LiveDaemon

WATCHED = worker.Watched(role=Role.SINK, transfer_id="t", after=99)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def locks(daemon: LiveDaemon) -> list[str]:
    return os.listdir(daemon.directory / "workers")


def test_a_poll_that_waits_holds_up_no_other_thread(daemons: Daemons) -> None:
    with connect(daemons[0].directory, LAYOUT) as client:
        client.receive("t")
        waiting = threading.Thread(target=client.poll, args=(WATCHED,), kwargs={"wait_s": 3})
        waiting.start()
        sending = client.send("u")
        sending.fill(0, payload(BLOCK), aux={"first_token": 1})
        assert waiting.is_alive()
        sending.abort()
        client.call(worker.Abort(role=Role.SINK, transfer_id="t"))
        client.call(worker.Poll(transfers=[WATCHED], wait_s=0))
        client.call(worker.Release(role=Role.SINK, transfer_id="t"))
        waiting.join()


def test_many_tasks_wait_at_once_and_hold_up_nobody(daemons: Daemons) -> None:
    async def run() -> None:
        async with AsyncClient(daemons[0].directory, LAYOUT) as client:

            async def wait(number: int) -> None:
                receiving = await client.receive(f"n{number}")
                async for _ in receiving.windows():
                    pass

            tasks = [asyncio.create_task(wait(number)) for number in range(40)]
            for number in range(40):
                await asyncio.to_thread(daemons[0].wait_for_transfer, f"n{number}", lambda _: True)
            assert (await client.poll(WATCHED.model_copy(update={"transfer_id": "n0"}))) is not None
            assert not any(task.done() for task in tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_threads_that_wait_again_and_again_let_the_others_in(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 33rd rank of a group in one process was not opened within 60 s."""
    monkeypatch.setattr(sync, "CONNECTIONS_MAX", 2)
    with connect(daemons[0].directory, LAYOUT) as client:
        receiving = client.receive("t")
        over = threading.Event()

        def look() -> None:
            while not over.is_set():
                client.poll(WATCHED, wait_s=0.02)

        looking = [threading.Thread(target=look) for _ in range(4)]
        for thread in looking:
            thread.start()
        asking = threading.Thread(target=lambda: [client.poll(WATCHED) for _ in range(20)])
        asking.start()
        asking.join(10)
        was_let_in = not asking.is_alive()
        over.set()
        for thread in (*looking, asking):
            thread.join()
        receiving.abort()
        assert was_let_in


def test_a_resume_that_was_cut_short_is_made_again(daemons: Daemons) -> None:
    a, b = daemons

    async def run() -> list[int]:
        async with (
            AsyncClient(a.directory, LAYOUT) as source,
            AsyncClient(b.directory, LAYOUT) as sink,
            await source.send("t") as sending,
            await sink.receive("t", source=a.address) as receiving,
        ):
            filling = asyncio.create_task(
                sending.fill(0, payload(3 * WINDOW), aux={"first_token": 1})
            )
            windows = receiving.windows()
            ends = [(await anext(windows)).end_token]
            b.pause()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await anext(windows)
            b.resume()
            await filling
            await sending.finish()
            ends += [window.end_token async for window in receiving.windows()]
            return ends

    assert asyncio.run(run())[-1] == 3 * WINDOW


def test_a_release_that_failed_is_made_again(daemons: Daemons) -> None:
    with connect(daemons[0].directory, LAYOUT) as client:
        sending = client.send("t")
        steps = sending.logic.release()
        next(steps)
        steps.close()  # as an interrupt would: the call was made, its answer never came
        assert not sending.logic.released
        sending.abort()
        daemons[0].wait_until_free()


def test_leaving_ends_the_calls_that_are_under_way(daemons: Daemons) -> None:
    async def run() -> list[BaseException | None]:
        async with AsyncClient(daemons[0].directory, LAYOUT) as client:
            await client.receive("t")
            calls = [client.poll(WATCHED, wait_s=30) for _ in range(20)]
            tasks = [asyncio.create_task(call) for call in calls]
            await asyncio.sleep(0)
        done = await asyncio.gather(*tasks, return_exceptions=True)
        return [one if isinstance(one, BaseException) else None for one in done]

    errors = asyncio.run(run())
    assert {getattr(error, "code", None) for error in errors} == {"client_closed"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_cancelled_opening_leaves_no_transfer(daemons: Daemons, rank: int) -> None:
    a, _ = daemons

    async def run() -> None:
        async with AsyncClient(a.directory, LAYOUT) as client:
            a.pause()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.send("t", rank=rank, world_size=rank + 1, window_tokens=BLOCK)
            a.resume()
            await asyncio.wait(client._tidying)
            rows = await asyncio.to_thread(a.transfers, "t")
            assert all(row.snapshot.error is not None for row in rows)
            assert all(not row.snapshot.runs for row in rows)

    asyncio.run(run())


def test_a_cancelled_opening_of_a_rank_that_is_taken_troubles_nobody(daemons: Daemons) -> None:
    a, _ = daemons
    troubles: list[dict[str, Any]] = []
    group: dict[str, Any] = {"rank": 0, "world_size": 2, "window_tokens": BLOCK}

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, told: troubles.append(told))
        async with (
            AsyncClient(a.directory, LAYOUT) as one,
            AsyncClient(a.directory, LAYOUT) as two,
        ):
            sending = await one.send("t", **group)
            opening = asyncio.create_task(two.send("t", **group))
            await asyncio.sleep(0)
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            if two._tidying:  # waited for, not awaited: its trouble would be told
                await asyncio.wait(two._tidying)
            gc.collect()
            (row,) = await asyncio.to_thread(a.transfers, "t")
            assert not row.ended
            await sending.abort()

    asyncio.run(run())
    assert not troubles


def test_a_cancelled_join_leaves_nothing(daemons: Daemons) -> None:
    a, _ = daemons
    before = descriptors()

    async def run() -> None:
        a.pause()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), AsyncClient(a.directory, LAYOUT):
                raise AssertionError("it cannot have joined")
        a.resume()

    asyncio.run(run())
    assert descriptors() == before
    assert threading.active_count() == 1 or "kvferry-heartbeat" not in [
        thread.name for thread in threading.enumerate()
    ]


def test_a_refused_join_leaves_nothing(daemons: Daemons) -> None:
    big = LAYOUT.model_copy(update={"block_size_tokens": 1 << 16})
    wrong = Layout.model_validate({**big.model_dump(), "planes": LAYOUT.planes})
    before = descriptors()
    for _ in range(3):
        with pytest.raises(FerryError) as caught:
            connect(daemons[0].directory, wrong)
        assert caught.value.code == "pool_refused"
    assert descriptors() == before
    assert locks(daemons[0]) == []


def test_a_child_process_does_not_keep_its_parents_blocks(daemons: Daemons) -> None:
    """A fork copies the descriptor of the lock; leaving unlocks it all the same."""
    stop, stopped = os.pipe()
    client = connect(daemons[0].directory, LAYOUT)
    client.send("t")
    child = os.fork()
    if child == 0:
        os.close(stopped)
        os.read(stop, 1)
        os._exit(0)
    os.close(stop)
    try:
        client.close()
        daemons[0].wait_until_free()
        assert daemons[0].status().workers == 0
    finally:
        os.close(stopped)
        os.waitpid(child, 0)


def test_calls_are_repeated_until_they_are_answered(tmp_path: Path) -> None:
    """What was sent while the daemon was away is lost with its socket."""
    daemon = LiveDaemon(tmp_path / "a")
    with connect(daemon.directory, LAYOUT) as client:
        daemon.stop()
        found: list[str] = []

        def ask() -> None:
            found.append(client.poll(WATCHED).refused[0].error.code)

        asking = threading.Thread(target=ask)
        asking.start()
        with LiveDaemon(tmp_path / "a"):
            asking.join()
    assert found == ["unknown_transfer"]
