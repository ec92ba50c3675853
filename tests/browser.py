"""A headless Chromium, told what to do over its own debugging protocol."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium")
WAIT_S = 30.0
LOOK_S = 0.05


class Tab:
    """One page; what goes wrong in it is kept."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.faults: list[Any] = []

    async def say(self, method: str, **params: Any) -> Any:
        """One command, and its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            said = await self._socket.receive_json()
            if said.get("id") == self._number:
                assert "error" not in said, said
                return said["result"]
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.faults.append(said["params"])

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to."""
        done = await self.say("Runtime.evaluate", expression=expression, returnByValue=True)
        return done["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Look until it is true."""
        for _ in range(int(WAIT_S / LOOK_S)):
            if seen := await self.value(expression):
                return seen
            await asyncio.sleep(LOOK_S)
        raise AssertionError(f"never true: {expression}")


@contextmanager
def browser(home: Path) -> Iterator[str]:
    """A browser that ends with the block; the port of its debugging protocol."""
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command = [CHROMIUM, *flags, f"--user-data-dir={home}", "about:blank"]
    told = home / "DevToolsActivePort"
    until = time.monotonic() + WAIT_S
    with (home.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not told.exists() or "\n" not in told.read_text():
            assert time.monotonic() < until, "the browser does not start"
            time.sleep(LOOK_S)
        yield told.read_text().splitlines()[0]
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def open_page(port: str, url: str) -> AsyncIterator[Tab]:
    """A tab of that browser that shows this page."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?{url}") as answer:
            address = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
        async with session.ws_connect(address, max_msg_size=0) as socket:
            tab = Tab(socket)
            await tab.say("Runtime.enable")
            await tab.say("Log.enable")
            yield tab
