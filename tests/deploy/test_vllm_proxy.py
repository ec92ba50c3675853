"""The example of a router, before engines that say what they are told to. Real sockets."""

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web

PROXY = Path(__file__).parents[2] / "deploy" / "vllm_proxy.py"
PATH = "/v1/completions"
CHUNK = b'data: {"choices": [{"text": "t1"}]}\n\n'
ROLE = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
ERROR = b'data: {"error": {"message": "not here", "code": 500}}\n\ndata: [DONE]\n\n'
BODY = {"prompt": "t1", "stream": True}
TOLD = {"do_remote_prefill": True, "transfer_id": "t", "attempt": 0, "source": "tcp://a:1"}
Engine = Callable[[web.Request], Awaitable[web.StreamResponse]]


def loaded() -> Any:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("vllm_proxy", PROXY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def proxy() -> Any:
    return loaded()


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


async def fails_after_the_role(request: web.Request) -> web.StreamResponse:
    """What vLLM's chat stream says of a request that ended with an error before a token."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(ROLE)
    await asyncio.sleep(0.05)
    await answer.write(ERROR[:20])
    await asyncio.sleep(0.05)
    await answer.write(ERROR[20:])
    await answer.write_eof()
    return answer


async def is_slow_to_begin(request: web.Request) -> web.StreamResponse:
    """All of a chat answer, with its role a good while before."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(ROLE)
    await asyncio.sleep(0.05)
    await answer.write(CHUNK)
    await answer.write(CHUNK)
    await answer.write_eof()
    return answer


async def fails(request: web.Request) -> web.StreamResponse:
    """An engine whose request ended with an error, before a token."""
    return web.json_response({"choices": [{"finish_reason": "error"}]})


async def ask(
    proxy: Any,
    decode: Decode,
    told: dict[str, Any] = BODY,
    prefill: Engine = prefill,
    headers: str = "",
) -> bytes:
    """All bytes that a connection to the router brings for one request, until it is ended or idle."""
    engines = web.Application()
    engines.router.add_post("/p" + PATH, prefill)
    engines.router.add_post("/d" + PATH, decode.answer)
    async with serving(engines) as port:
        url = f"http://127.0.0.1:{port}"
        async with serving(proxy.application([f"{url}/p"], [f"{url}/d"])) as router:
            reader, writer = await asyncio.open_connection("127.0.0.1", router)
            body = json.dumps(told).encode()
            writer.write(
                f"POST {PATH} HTTP/1.1\r\nHost: router\r\nConnection: close\r\n{headers}"
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


@pytest.mark.parametrize("does", [fails, fails_after_the_role, hangs])
def test_what_fails_before_the_first_token_is_tried_again(
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


def test_a_role_is_held_back_until_there_is_a_token(proxy: Any) -> None:
    decode = Decode(is_slow_to_begin)
    got = asyncio.run(ask(proxy, decode))
    assert decode.attempts == [0]
    assert got.count(ROLE) == 1
    assert got.index(ROLE) < got.index(CHUNK)
    assert got.count(CHUNK) == 2


def test_a_stream_that_says_nothing_for_long_goes_out(proxy: Any) -> None:
    """So that what is held back is bounded."""

    async def chatters(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        while True:  # until who listens is gone: see `serving`
            await answer.write(ROLE * 100)

    async def first_bytes() -> bytes:
        engines = web.Application()
        engines.router.add_post("/p" + PATH, prefill)
        engines.router.add_post("/d" + PATH, chatters)
        async with serving(engines) as port:
            url = f"http://127.0.0.1:{port}"
            async with (
                serving(proxy.application([f"{url}/p"], [f"{url}/d"])) as router,
                ClientSession() as client,
                client.post(f"http://127.0.0.1:{router}{PATH}", json=BODY) as response,
                asyncio.timeout(20),
            ):
                return await response.content.readexactly(len(ROLE))

    assert asyncio.run(first_bytes()) == ROLE


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("status", [401, 404, 422, 429])
def test_what_an_engine_refuses_has_the_engines_status(proxy: Any, side: str, status: int) -> None:
    async def refuses(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "why"}, status=status, headers={"Retry-After": "7"})

    if side == "prefill":
        got = asyncio.run(ask(proxy, Decode(streams), prefill=refuses))
    else:
        got = asyncio.run(ask(proxy, Decode(refuses)))
    assert got.startswith(f"HTTP/1.1 {status} ".encode())
    assert got.endswith(b'{"error": "why"}')
    assert b"Retry-After: 7\r\n" in got


def test_both_engines_are_told_who_asks(proxy: Any) -> None:
    asked = []

    async def notes(request: web.Request) -> web.StreamResponse:
        asked.append((request.path, request.headers.get("Authorization")))
        return await (prefill if request.path.startswith("/p") else streams)(request)

    line = "Authorization: Bearer secret\r\n"
    got = asyncio.run(ask(proxy, Decode(notes), prefill=notes, headers=line))
    assert got.startswith(b"HTTP/1.1 200")
    assert asked == [("/p" + PATH, "Bearer secret"), ("/d" + PATH, "Bearer secret")]


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]]])
def test_several_prompts_are_refused_with_words(proxy: Any, prompt: Any) -> None:
    """One transfer is one prompt's."""
    decode = Decode(streams)
    got = asyncio.run(ask(proxy, decode, {"prompt": prompt}))
    assert got.startswith(b"HTTP/1.1 400")
    assert b"one prompt" in got
    assert decode.attempts == []


@pytest.mark.parametrize("prompt", ["a", ["a"], [1, 2], [[1, 2]]])
def test_one_prompt_may_be_written_in_four_ways(proxy: Any, prompt: Any) -> None:
    decode = Decode(streams)
    got = asyncio.run(ask(proxy, decode, {"prompt": prompt, "stream": True}))
    assert got.startswith(b"HTTP/1.1 200")
    assert decode.attempts == [0]


@pytest.mark.parametrize("body", [b"[1]", b"{", b"3"])
def test_what_is_no_request_is_refused(proxy: Any, body: bytes) -> None:
    async def status() -> int:
        async with (
            serving(proxy.application(["http://p"], ["http://d"])) as router,
            ClientSession() as client,
            client.post(f"http://127.0.0.1:{router}{PATH}", data=body) as response,
        ):
            return response.status

    assert asyncio.run(status()) == 400
