"""An example of a router before vLLM engines that hand over through kvferry; not a product.

    python deploy/vllm_proxy.py --port 8000 --prefill http://p1:8100 --decode http://d1:8200

Each of ``--prefill`` and ``--decode`` may stand several times; they take turns. A request goes to a
prefill engine first, for one token, and then to a decode engine with what prefill answered. When
either fails before a byte of the answer has gone out, the request is tried again as attempt + 1, the
number by which both daemons know what is old. An answer that breaks off later ends the connection.
Needs aiohttp, which vLLM brings.
"""

import argparse
import itertools
import json
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

ATTEMPTS = 3
ANSWER_S = 3600.0
logger = logging.getLogger(__name__)


class TryAgainError(Exception):
    """An engine failed and the client has seen nothing of it yet."""


class Router:
    """Sends requests to engines in turn."""

    def __init__(self, prefill: list[str], decode: list[str]) -> None:
        self._prefill, self._decode = itertools.cycle(prefill), itertools.cycle(decode)
        self._session: aiohttp.ClientSession | None = None

    async def session(self, _app: web.Application) -> AsyncIterator[None]:
        """Connections to the engines, for as long as the application runs."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout) as self._session:
            yield

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request, tried up to so many times."""
        body = await request.json()
        transfer_id = f"proxy-{secrets.token_hex(12)}"  # never used again
        for attempt in range(ATTEMPTS):
            try:
                params = await self._ask_prefill(request.path, body, transfer_id, attempt)
                return await self._ask_decode(request, body, params)
            except (TryAgainError, aiohttp.ClientError, TimeoutError) as error:
                failure = f"attempt {attempt}: {type(error).__name__}: {error}"
        return web.json_response({"error": failure}, status=502)

    async def _ask_prefill(
        self, path: str, body: dict[str, Any], transfer_id: str, attempt: int
    ) -> dict[str, Any] | None:
        params = {"do_remote_decode": True, "transfer_id": transfer_id, "attempt": attempt}
        asked = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": params}
        for name in ("stream_options", "min_tokens"):
            asked.pop(name, None)
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        async with self._post(next(self._prefill) + path, asked) as response:
            told = (await response.json())["kv_transfer_params"]
            return told if told is None else dict(told)

    async def _ask_decode(
        self, request: web.Request, body: dict[str, Any], params: dict[str, Any] | None
    ) -> web.StreamResponse:
        """Pass decode's answer on, as it comes. Without params it computes the prompt itself."""
        asked = {**body, "kv_transfer_params": params}
        async with self._post(next(self._decode) + request.path, asked) as response:
            chunks = response.content.iter_any()
            first = await anext(chunks, b"")  # nothing goes out before there is something
            if _is_failure(first):
                raise TryAgainError(first[:300].decode(errors="replace"))
            answer = web.StreamResponse(headers={"Content-Type": response.content_type})
            await _pass_on(request, answer, first, chunks)
            return answer

    @asynccontextmanager
    async def _post(self, url: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        async with self._session.post(url, json=body) as response:
            if response.status >= 500:
                raise TryAgainError(f"{url}: {response.status}: {(await response.text())[:300]}")
            if response.status >= 400:  # the client's own mistake
                raise web.HTTPBadRequest(
                    text=await response.text(), content_type="application/json"
                )
            yield response


async def _pass_on(
    request: web.Request, answer: web.StreamResponse, first: bytes, rest: AsyncIterator[bytes]
) -> None:
    """Pass an answer on. If it breaks off, end the connection.

    Half of it may be with the client, who must take neither that for all nor another one for its end.
    """
    try:
        await answer.prepare(request)
        await answer.write(first)
        async for chunk in rest:
            await answer.write(chunk)
        await answer.write_eof()
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        logger.warning("an answer broke off: %s: %s", type(error).__name__, error)
        if request.transport is not None:
            request.transport.close()


def _is_failure(first: bytes) -> bool:
    """Whether an answer, or the first line of a stream, is that a request could not be served."""
    try:
        said = json.loads(first.strip().removeprefix(b"data: ").split(b"\n")[0])
    except ValueError:
        return False
    choices = said.get("choices") or [{}]
    return "error" in said or choices[0].get("finish_reason") == "error"


def application(prefill: list[str], decode: list[str]) -> web.Application:
    """The router as a web application."""
    router = Router(prefill, decode)
    app = web.Application(client_max_size=1 << 26)
    app.cleanup_ctx.append(router.session)
    app.router.add_post("/v1/completions", router.handle)
    app.router.add_post("/v1/chat/completions", router.handle)
    return app


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description="prefill first, then decode")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", action="append", required=True, metavar="URL")
    parser.add_argument("--decode", action="append", required=True, metavar="URL")
    told = parser.parse_args()
    web.run_app(application(told.prefill, told.decode), host=told.host, port=told.port)


if __name__ == "__main__":
    main()
