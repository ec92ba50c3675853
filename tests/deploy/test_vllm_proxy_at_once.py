"""The example of a router, where it knows prefill's source and asks both engines at once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientSession, web

from deploy.test_vllm_proxy import BODY, CHUNK, PATH, TOLD, loaded, serving, streams


@pytest.fixture
def proxy() -> Any:
    return loaded()


class Pair:
    """Both engines, that note what they are asked and answer as a test says."""

    def __init__(self) -> None:
        self.source = "tcp://a:1"
        self.asked: list[tuple[str, int, str | None]] = []  # engine, attempt, source
        self._news = asyncio.Event()
        self.may_prefill = asyncio.Event()
        self.prefill_fails = False
        self.holds_retry = False  # whoever asks prefill after a failure waits
        self.sends = True  # prefill has a daemon
        self.may_decode = asyncio.Event()
        self.left = 0  # requests that the router went away from
        for event in (self.may_prefill, self.may_decode):
            event.set()

    async def prefill(self, request: web.Request) -> web.StreamResponse:
        told = (await request.json())["kv_transfer_params"]
        self.asked.append(("prefill", told["attempt"], None))
        await self._wait(self.may_prefill)
        if self.prefill_fails:
            self.prefill_fails = False
            if self.holds_retry:
                self.may_prefill.clear()
            return web.json_response({"error": "no"}, status=500)
        params = {**TOLD, "transfer_id": told["transfer_id"], "attempt": told["attempt"]}
        sent = {**params, "source": self.source} if self.sends else None
        return web.json_response({"kv_transfer_params": sent})

    async def decode(self, request: web.Request) -> web.StreamResponse:
        told = (await request.json())["kv_transfer_params"] or {"attempt": -1, "source": None}
        self.asked.append(("decode", told["attempt"], told["source"]))
        await self._wait(self.may_decode)
        return await streams(request)

    async def _wait(self, event: asyncio.Event) -> None:
        self._news.set()
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise

    async def wait_for(self, *asked: tuple[str, int, str | None]) -> None:
        """Until these have been asked, since the last look, and no others."""
        async with asyncio.timeout(20):
            while len(self.asked) < len(asked):
                await self._news.wait()
                self._news.clear()
        assert sorted(self.asked) == sorted(asked)
        self.asked.clear()


@asynccontextmanager
async def routed(
    proxy: Any, pair: Pair, prefills: tuple[str, ...] = ("p",)
) -> AsyncIterator[Callable[[], Coroutine[Any, Any, int]]]:
    """Asks the router before engines of two kinds, and says with what status it answered."""
    engines = web.Application()
    for name in prefills:
        engines.router.add_post(f"/{name}{PATH}", pair.prefill)
    engines.router.add_post("/d" + PATH, pair.decode)
    async with serving(engines) as port:
        url = f"http://127.0.0.1:{port}"
        app = proxy.application([f"{url}/{name}" for name in prefills], [f"{url}/d"])
        async with serving(app) as router, ClientSession() as client, asyncio.timeout(30):

            async def asks() -> int:
                url = f"http://127.0.0.1:{router}{PATH}"
                async with client.post(url, json=BODY) as response:
                    assert (await response.read()).count(CHUNK) == 2 * (response.status == 200)
                    return response.status

            yield asks


def test_once_prefills_source_is_known_both_engines_are_asked_at_once(proxy: Any) -> None:
    """Decode is admitted while prefill computes, and drains the window before it is full."""

    async def scene() -> None:
        pair = Pair()
        async with routed(proxy, pair) as asks:
            assert await asks() == 200
            assert pair.asked == [("prefill", 0, None), ("decode", 0, "tcp://a:1")]
            pair.asked.clear()
            for event in (pair.may_prefill, pair.may_decode):
                event.clear()
            answer = asyncio.create_task(asks())
            await pair.wait_for(("prefill", 0, None), ("decode", 0, "tcp://a:1"))
            pair.may_prefill.set()
            pair.may_decode.set()
            assert await answer == 200
            assert pair.left == 0

    asyncio.run(scene())


def test_decodes_request_of_a_failed_prefill_is_ended(proxy: Any) -> None:
    async def scene() -> None:
        pair = Pair()
        async with routed(proxy, pair) as asks:
            await asks()
            pair.asked.clear()
            pair.may_prefill.clear()
            pair.may_decode.clear()
            answer = asyncio.create_task(asks())
            await pair.wait_for(("prefill", 0, None), ("decode", 0, "tcp://a:1"))
            pair.prefill_fails = True
            pair.may_prefill.set()
            await pair.wait_for(("prefill", 1, None), ("decode", 1, "tcp://a:1"))
            assert pair.left == 1
            pair.may_decode.set()
            assert await answer == 200

    asyncio.run(scene())


def test_a_retry_asks_prefill_first_though_its_source_is_known(proxy: Any) -> None:
    """It goes to another prefill engine, and what is known of that may be as old."""

    async def scene() -> None:
        pair = Pair()
        async with routed(proxy, pair, prefills=("p", "q")) as asks:
            for _ in range(2):
                await asks()
            pair.asked.clear()
            pair.may_prefill.clear()
            pair.may_decode.clear()
            answer = asyncio.create_task(asks())
            await pair.wait_for(("prefill", 0, None), ("decode", 0, "tcp://a:1"))
            pair.prefill_fails = pair.holds_retry = True
            pair.may_prefill.set()
            await pair.wait_for(("prefill", 1, None))
            pair.source = "tcp://a:2"
            pair.may_prefill.set()
            await pair.wait_for(("decode", 1, "tcp://a:2"))
            pair.may_decode.set()
            assert await answer == 200

    asyncio.run(scene())


@pytest.mark.parametrize("source", ["tcp://a:2", None])
def test_where_prefills_daemon_went_elsewhere_it_is_learned_anew(
    proxy: Any, source: str | None
) -> None:
    """Decode looks for it where it was; or for nothing, when the engine has met no daemon since."""

    async def scene() -> None:
        pair = Pair()
        async with routed(proxy, pair) as asks:
            await asks()
            pair.asked.clear()
            pair.source, pair.sends = source or "", source is not None
            pair.may_decode.clear()
            answer = asyncio.create_task(asks())
            await pair.wait_for(
                ("prefill", 0, None),
                ("decode", 0, "tcp://a:1"),
                ("prefill", 1, None),
                ("decode", 1, source) if source else ("decode", -1, None),
            )
            assert pair.left == 1
            pair.may_decode.set()
            assert await answer == 200

    asyncio.run(scene())
