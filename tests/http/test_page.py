"""The status page in a real browser: it is live, it explains, and runs nobody else's script."""

import asyncio
from pathlib import Path

import pytest

from browser import CHROMIUM, Tab, browser, open_page
from kvferry_proto import worker
from kvferry_proto.states import Role
from live import BLOCK, WINDOW, LiveDaemon, RawWorker

HOSTILE = "<img/src=x/onerror=document.title='taken'>"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def test_the_page_is_live_and_explains(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a", http_port=0, lost_s=60) as daemon,
        RawWorker(daemon.directory) as one,
        browser(tmp_path / "home") as port,
    ):
        asyncio.run(look(port, daemon.http, one))


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
