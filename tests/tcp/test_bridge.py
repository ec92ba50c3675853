"""Events from threads come to the loop, whatever one of them does there."""

import asyncio
from typing import Any

from kvferry_daemon.transports.tcp.bridge import LoopBridge


def test_an_event_that_cannot_be_handled_holds_up_no_other() -> None:
    async def run() -> list[int]:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        seen: list[int] = []
        faults: list[Any] = []
        loop.set_exception_handler(lambda _, context: faults.append(context["exception"]))

        def handle(event: int) -> None:
            seen.append(event)
            if event == 1:
                raise OSError("no descriptor left")
            if event == 3:
                done.set()

        bridge = LoopBridge(loop, handle)
        for event in (1, 2, 3):
            bridge.post(event)
        async with asyncio.timeout(10):
            await done.wait()
        assert [str(fault) for fault in faults] == ["no descriptor left"]
        return seen

    assert asyncio.run(run()) == [1, 2, 3]
