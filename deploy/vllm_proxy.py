"""An example of a router before vLLM engines that hand over through kvferry; not a product.

    python deploy/vllm_proxy.py --port 8000 --prefill http://p1:8100 --decode http://d1:8200

Each of ``--prefill`` and ``--decode`` may stand several times; they take turns. A request goes to a
prefill engine first, for one token, and then to a decode engine with what prefill answered. That says
where prefill's daemon is: once it is known both engines are asked at once, so that decode takes a long
prompt over while it is computed. After a failure it is learned anew.

When either fails before a token of the answer has gone out, the request is tried again as attempt + 1,
the number by which both daemons know what is old. An answer that breaks off later ends the connection.
What an engine refuses (a status of 4xx) is passed on. Needs aiohttp, which vLLM brings.
"""

import argparse
import asyncio
import itertools
import json
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

ATTEMPTS = 3
ANSWER_S = 3600.0
HELD_BYTES_MAX = 1 << 16  # of a stream that has said nothing yet
PASSED_ON = ("Content-Type", "Retry-After", "WWW-Authenticate")
Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


class TryAgainError(Exception):
    """An engine failed and the client has seen nothing of it yet."""


class RefusedError(Exception):
    """An engine does not take the request: the client's own mistake, or it is to ask later."""

    def __init__(self, answer: web.Response) -> None:
        """``answer``: what the client is told."""
        super().__init__()
        self.answer = answer


class Router:
    """Sends requests to engines in turn."""

    def __init__(self, prefill: list[str], decode: list[str]) -> None:
        self._prefill, self._decode = itertools.cycle(prefill), itertools.cycle(decode)
        self._sources: dict[str, str] = {}  # by prefill engine: where its daemon is
        self._session: aiohttp.ClientSession | None = None

    async def session(self, _app: web.Application) -> AsyncIterator[None]:
        """Connections to the engines, for as long as the application runs."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout) as self._session:
            yield

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request, tried up to so many times."""
        body = _read(await request.text())
        transfer_id = f"proxy-{secrets.token_hex(12)}"  # never used again
        for attempt in range(ATTEMPTS):
            try:
                return await self._try(request, body, transfer_id, attempt)
            except RefusedError as error:
                return error.answer
            except (TryAgainError, aiohttp.ClientError, TimeoutError) as error:
                failure = f"attempt {attempt}: {type(error).__name__}: {error}"
        return web.json_response({"error": failure}, status=502)

    async def _try(
        self, request: web.Request, body: dict[str, Any], transfer_id: str, attempt: int
    ) -> web.StreamResponse:
        """One attempt, with prefill and decode at once where prefill's source is known."""
        engine, named = next(self._prefill), {"transfer_id": transfer_id, "attempt": attempt}
        source = None if attempt else self._sources.get(engine)  # a retry asks prefill first
        goes_out = asyncio.Event()
        try:
            async with _running(self._ask_prefill(engine, request, body, named)) as prefill:
                fetch = {"do_remote_prefill": True, "source": source, **named}
                params = await prefill if source is None else fetch
                async with _running(self._ask_decode(request, body, params, goes_out)) as decode:
                    await asyncio.wait([prefill, decode], return_when=asyncio.FIRST_COMPLETED)
                    if not decode.done() and not goes_out.is_set():
                        _check_source(params, await prefill)
                    return await decode
        except (TryAgainError, aiohttp.ClientError, TimeoutError):
            self._sources.pop(engine, None)
            raise

    async def _ask_prefill(
        self, engine: str, request: web.Request, body: dict[str, Any], named: dict[str, Any]
    ) -> dict[str, Any] | None:
        params = {"do_remote_decode": True, **named}
        asked = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": params}
        for name in ("stream_options", "min_tokens"):
            asked.pop(name, None)
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        async with self._post(engine, request, asked) as response:
            told = (await response.json())["kv_transfer_params"]
        if told is None:  # it has never met its daemon
            return None
        self._sources[engine] = told["source"]
        return dict(told)

    async def _ask_decode(
        self,
        request: web.Request,
        body: dict[str, Any],
        params: dict[str, Any] | None,
        goes_out: asyncio.Event,
    ) -> web.StreamResponse:
        """Pass decode's answer on, as it comes. Without params it computes the prompt itself."""
        asked = {**body, "kv_transfer_params": params}
        async with self._post(next(self._decode), request, asked) as response:
            chunks = response.content.iter_any()
            first = await _first(chunks, is_stream=response.content_type == "text/event-stream")
            goes_out.set()
            answer = web.StreamResponse(headers={"Content-Type": response.content_type})
            await _pass_on(request, answer, first, chunks)
            return answer

    @asynccontextmanager
    async def _post(
        self, engine: str, request: web.Request, body: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask an engine what the client asks, and as the client."""
        assert self._session is not None
        url, headers = engine + request.path, _those(request.headers, "Authorization")
        async with self._session.post(url, json=body, headers=headers) as response:
            if response.status >= 500:
                raise TryAgainError(f"{url}: {response.status}: {(await response.text())[:300]}")
            if response.status >= 400:
                told = _those(response.headers, *PASSED_ON)
                said = await response.read()
                raise RefusedError(web.Response(status=response.status, body=said, headers=told))
            yield response


@asynccontextmanager
async def _running(asking: Coroutine[Any, Any, Answer]) -> AsyncIterator[asyncio.Task[Answer]]:
    """Ask an engine beside something else; when that is over the engine's request is ended."""
    task = asyncio.create_task(asking)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _check_source(params: dict[str, Any] | None, told: dict[str, Any] | None) -> None:
    """TryAgainError where decode waits for what prefill does not send, or not from there."""
    asked, sends = (one["source"] if one else None for one in (params, told))
    if asked != sends:
        raise TryAgainError(f"decode was told {asked}, and prefill sends from {sends}")


def _those(headers: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: headers[name] for name in names if name in headers}


def _read(text: str) -> dict[str, Any]:
    """A request for one answer; HTTPBadRequest for another, since a transfer is one prompt's."""
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="a request is an object of JSON")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise web.HTTPBadRequest(text="this router takes one prompt a request, not several")
    return body


async def _first(chunks: AsyncIterator[bytes], *, is_stream: bool) -> bytes:
    """What an answer begins with: all of it, or of a stream up to its first token.

    TryAgainError if it is a failure, which a chat's stream tells behind the assistant's role.
    """
    first = b""
    async for chunk in chunks:
        first += chunk
        if is_stream and (len(first) > HELD_BYTES_MAX or any(map(_says_something, _told(first)))):
            break
    if any(map(_is_failure, _told(first))):
        raise TryAgainError(first[:300].decode(errors="replace"))
    return first


def _told(first: bytes) -> Iterator[dict[str, Any]]:
    """The objects of an answer, or of the lines of a stream that are here."""
    for line in first.splitlines():
        with suppress(ValueError):
            said = json.loads(line.removeprefix(b"data: "))
            if isinstance(said, dict):
                yield said


def _says_something(said: dict[str, Any]) -> bool:
    """Whether there is more in a stream's line than whose words will come."""
    return bool(said.get("error")) or any(
        one.get("text")
        or one.get("finish_reason")
        or any(value for name, value in (one.get("delta") or {}).items() if name != "role")
        for one in said.get("choices") or []
    )


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


def _is_failure(said: dict[str, Any]) -> bool:
    """Whether an answer, or a line of a stream, is that a request could not be served."""
    choices = said.get("choices") or []
    return bool(said.get("error")) or any(one.get("finish_reason") == "error" for one in choices)


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
