"""The example of a router, before engines that say what they are told to. Real sockets."""

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

PROXY = Path(__file__).parents[2] / "deploy" / "vllm_proxy.py"
PATH = "/v1/completions"
CHUNK = b'data: {"choices": [{"text": "t1"}]}\n\n'
TOLD = {"do_remote_prefill": True, "transfer_id": "t", "attempt": 0, "source": "tcp://a:1"}
Engine = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
def proxy() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_proxy", PROXY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[int]:
    """The port at which an application answers."""
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def prefill(request: web.Request) -> web.StreamResponse:
    """A prefill engine that has done its part."""
    told = (await request.json())["kv_transfer_params"]
    return web.json_response({"kv_transfer_params": {**TOLD, "attempt": told["attempt"]}})


class Decode:
    """A decode engine: what it does at each request, the last one again and again."""

    def __init__(self, *does: Engine) -> None:
        self.attempts: list[int] = []
        self._does = does

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.attempts.append((await request.json())["kv_transfer_params"]["attempt"])
        return await self._does[min(len(self.attempts), len(self._does)) - 1](request)


async def streams(request: web.Request) -> web.StreamResponse:
    """All of an answer."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(CHUNK)
    await answer.write(CHUNK)
    await answer.write_eof()
    return answer


async def dies(request: web.Request) -> web.StreamResponse:
    """Half of one: what a client sees of an engine that is killed."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(CHUNK)
    assert request.transport is not None
    request.transport.close()  # once that is sent
    return answer


async def hangs_after_half(request: web.Request) -> web.StreamResponse:
    """Half of one, and then nothing."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(CHUNK)
    return await hangs(request)


async def hangs(request: web.Request) -> web.StreamResponse:
    """Nothing, for as long as somebody waits."""
    await asyncio.Event().wait()  # until who waited is gone: see `serving`
    raise AssertionError


async def fails(request: web.Request) -> web.StreamResponse:
    """An engine whose request ended with an error, before a token."""
    return web.json_response({"choices": [{"finish_reason": "error"}]})


async def ask(proxy: Any, decode: Decode) -> bytes:
    """All bytes that a connection to the router brings for one request, until it is ended or idle."""
    engines = web.Application()
    engines.router.add_post("/p" + PATH, prefill)
    engines.router.add_post("/d" + PATH, decode.answer)
    async with serving(engines) as port:
        url = f"http://127.0.0.1:{port}"
        async with serving(proxy.application([f"{url}/p"], [f"{url}/d"])) as router:
            reader, writer = await asyncio.open_connection("127.0.0.1", router)
            body = json.dumps({"prompt": "t1", "stream": True}).encode()
            writer.write(
                f"POST {PATH} HTTP/1.1\r\nHost: router\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            async with asyncio.timeout(20):
                got = await reader.read()
            writer.close()
            return got


@pytest.mark.parametrize("does", [dies, hangs_after_half])
def test_an_answer_that_breaks_off_ends_the_connection(
    proxy: Any, monkeypatch: pytest.MonkeyPatch, does: Engine
) -> None:
    """A second answer behind half a one is noise, and an end that looks proper is a lie."""
    monkeypatch.setattr(proxy, "ANSWER_S", 1.0)
    decode = Decode(does, streams)
    got = asyncio.run(ask(proxy, decode))
    assert decode.attempts == [0]
    assert got.count(b"HTTP/1.1 ") == 1
    assert got.count(CHUNK) == 1
    assert not got.endswith(b"0\r\n\r\n")  # what ends an answer of many chunks


@pytest.mark.parametrize("does", [fails, hangs])
def test_what_fails_before_the_first_byte_is_tried_again(
    proxy: Any, monkeypatch: pytest.MonkeyPatch, does: Engine
) -> None:
    monkeypatch.setattr(proxy, "ANSWER_S", 1.0)
    decode = Decode(does, streams)
    got = asyncio.run(ask(proxy, decode))
    assert decode.attempts == [0, 1]
    assert got.startswith(b"HTTP/1.1 200")
    assert got.count(CHUNK) == 2
    assert got.endswith(b"0\r\n\r\n")


def test_what_fails_again_and_again_is_told_once(proxy: Any) -> None:
    decode = Decode(fails)
    got = asyncio.run(ask(proxy, decode))
    assert decode.attempts == [0, 1, 2]
    assert got.startswith(b"HTTP/1.1 502")
    assert b"attempt 2: TryAgainError" in got
