"""A client whose thread is not let run: an engine holds the GIL, or the machine is busy."""

import asyncio
import time
from pathlib import Path

import pytest

from kvferry_client import AsyncClient
from kvferry_client.session import REPEAT_S, waits
from kvferry_proto import worker
from live import LAYOUT, LiveDaemon

WAIT_S = 1.0


def test_it_asks_again_before_it_says_that_there_is_no_daemon(tmp_path: Path) -> None:
    async def run(daemon: LiveDaemon) -> str:
        async with AsyncClient(daemon.directory, LAYOUT) as client:
            daemon.pause()
            call = asyncio.create_task(client.call(worker.Heartbeat(), WAIT_S))
            await asyncio.sleep(REPEAT_S / 2)  # it has asked once
            time.sleep(2 * WAIT_S)  # noqa: ASYNC251  nothing of this thread goes on meanwhile
            daemon.resume()
            return str((await call).kind)

    with LiveDaemon(tmp_path / "a", lost_s=60) as daemon:
        assert asyncio.run(run(daemon)) == "snapshots"


@pytest.mark.parametrize(("wait_s", "held_s"), [(10.0, 0.0), (1.2, 0.0), (2.0, 3.0), (0.1, 0.0)])
def test_it_waits_as_long_as_it_is_told_in_all(wait_s: float, held_s: float) -> None:
    found = list(waits(wait_s, held_s))
    assert sum(found) == pytest.approx(wait_s + held_s)
    assert max(found) <= REPEAT_S + held_s
    assert min(found) > 0
