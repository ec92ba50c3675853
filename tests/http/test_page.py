"""The status page in a real browser: it is live, it explains, and runs nobody else's script."""

import asyncio
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from urllib.request import urlopen

import pytest

from browser import CHROMIUM, Tab, browser, open_page
from http_daemon import get
from kvferry_proto import worker
from kvferry_proto.states import Role
from live import BLOCK, WINDOW, LiveDaemon, RawWorker

WATCHERS_MAX = 16  # of /events
HOSTILE = "<img/src=x/onerror=document.title='taken'>"
STORY = "document.querySelector('#story-body').innerText"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def test_the_page_is_live_and_explains(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a", http_port=0, lost_s=60) as daemon,
        RawWorker(daemon.directory) as one,
        browser(tmp_path / "home") as port,
    ):
        asyncio.run(look(port, daemon.http, one))


def test_the_page_says_what_it_is_not_told_and_goes_on_when_it_can(tmp_path: Path) -> None:
    """All places to watch are taken at first; later it refuses, and then it is gone."""
    with LiveDaemon(tmp_path / "a", http_port=0, lost_s=60) as daemon, ExitStack() as watching:
        places = [watching.enter_context(events_of(daemon)) for _ in range(WATCHERS_MAX)]
        assert get(daemon, "/events")[0] == 503
        with browser(tmp_path / "home") as port:
            asyncio.run(refused(port, daemon, places))


async def refused(port: str, daemon: LiveDaemon, places: list[HTTPResponse]) -> None:
    async with open_page(port, daemon.http + "/") as tab:
        await tab.until("document.querySelector('#link').textContent.includes('trying again')")
        for place in places:
            place.close()
        await tab.until("document.querySelector('#daemon').textContent.includes('pid')")
        assert await tab.value("document.querySelector('#link').textContent") == ""
        await tab.value("explain('nobody')")
        await tab.until(STORY + ".includes('not known; near it: none')")
        await tab.value("explain('no id')")
        await tab.until(STORY + ".includes('the daemon answers 400: id: 1 to 128')")
        daemon.stop()
        await tab.value("explain('nobody')")
        await tab.until(STORY + ".includes('the daemon does not answer')")


def events_of(daemon: LiveDaemon) -> HTTPResponse:
    """One who watches, and has heard something."""
    answer: HTTPResponse = urlopen(daemon.http + "/events", timeout=10)
    answer.readline()
    return answer


async def look(port: str, url: str, one: RawWorker) -> None:
    async with open_page(port, url + "/") as tab:
        await tab.until("document.querySelector('#pools .bar') !== null")
        assert await tab.value("document.querySelectorAll('#rows tr').length") == 0
        one.snapshot(worker.Receive(transfer_id=HOSTILE))
        one.snapshot(worker.Send(transfer_id="t"))
        seen = one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW)
        one.fill(seen, BLOCK)
        one.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK, total_tokens=4 * BLOCK))
        one.snapshot(worker.Receive(transfer_id="t"))
        await tab.until("document.querySelectorAll('#rows tr').length === 3")
        await tab.until(
            f"document.querySelector('#rows').innerText.includes('{BLOCK} / {4 * BLOCK}')"
        )
        assert await tab.value("document.querySelector('#rows .done[style*=\"25%\"]') !== null")
        assert HOSTILE in await tab.value("document.querySelector('#rows').textContent")
        await explains(tab)
        assert await tab.value("document.querySelector('img')") is None
        assert await tab.value("document.title") == "kvferry"
        assert tab.faults == []


async def explains(tab: Tab) -> None:
    """A click on a row tells its story, and the filter leaves the rows that fit."""
    await tab.value("document.querySelector('#filter').value = 'bootstrapping'; show()")
    assert await tab.value("document.querySelectorAll('#rows tr').length") == 1
    await tab.value("document.querySelector('#rows tr').click()")
    await tab.until(
        "document.querySelector('#story-body').innerText.includes('what usually helps')"
    )
    story = await tab.value("document.querySelector('#story').innerText")
    assert HOSTILE in story
    assert "opened; state Bootstrapping; waiting for source" in story
