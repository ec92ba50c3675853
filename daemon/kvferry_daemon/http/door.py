"""Bounds who asks by HTTP: aiohttp takes in whoever connects, and all that they send.

A connection is good for one request, which has to be there in time; else many in one connection
would be kept until their turn comes. Each host has its share of the loop's time.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from time import monotonic, thread_time
from typing import cast

from aiohttp import web

from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.hosts import host_of

CONNECTIONS_MAX = 128
CONNECTIONS_A_S = 200
REQUEST_S = 10.0
REQUESTS_A_S = 200  # of one host
SHARE_S = 0.00125  # of the loop's time: more counts as more requests, so a host has a quarter of it

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpDoor:
    """Makes the protocol of each connection; ``server`` is aiohttp's own maker."""

    def __init__(self, server: web.Server, on_refused: Callable[[], None], host: str) -> None:
        self._on_refused = on_refused
        self._host = host
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._silent: set[asyncio.BaseProtocol] = set()  # new ones, that have not asked yet
        self._coming = Allowances(CONNECTIONS_A_S)
        self._allowed = Allowances(REQUESTS_A_S)

    def __call__(self) -> asyncio.Protocol:
        """For one more connection."""
        is_full = len(self._server.connections) >= CONNECTIONS_MAX
        if is_full or self._coming.wait_s("", monotonic()):
            self._on_refused()
            return _Closed()
        protocol: asyncio.Protocol = self._server()
        self._silent.add(protocol)
        self._loop.call_later(REQUEST_S, self._look, protocol)
        return protocol

    def _look(self, protocol: asyncio.Protocol) -> None:
        transport: asyncio.Transport | None = getattr(protocol, "transport", None)
        if protocol in self._silent and transport is not None:
            self._on_refused()
            transport.abort()
        self._silent.discard(protocol)

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a request, or say when to try again. Nothing more is read on its connection."""
        self._silent.discard(request.protocol)
        if request.transport is not None:
            request.transport.pause_reading()
        host = host_of(str(request.remote))
        wait_s = self._allowed.wait_s(host, monotonic())
        if wait_s:
            self._on_refused()
            response: web.StreamResponse = web.Response(
                text="too many requests\n",
                status=503,
                headers={"Retry-After": str(math.ceil(wait_s))},
            )
        elif not is_ours(request.headers.get("Host", ""), self._host):
            self._on_refused()
            words = f"ask by address, as localhost, or as {self._host}, which http_host names\n"
            response = web.Response(text=words, status=421)
        else:
            response = await self._handled(request, handler, host)
        response.force_close()
        return response

    async def _handled(
        self, request: web.Request, handler: Handler, host: str
    ) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        begun_s = thread_time()
        try:
            response = await handler(request)
        except web.HTTPException as error:  # aiohttp's own: nothing is there, or not that way
            headers = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
            response = web.Response(text=error.text, status=error.status, headers=headers)
        finally:
            if response is None or not response.prepared:  # a stream's time is not the loop's
                self._allowed.owe(host, (thread_time() - begun_s) / SHARE_S)
        return response


def is_ours(said: str, host: str) -> bool:
    """Whether a request is for us by a name that no stranger's DNS can give us.

    Else a page of his could read ours in the browser of somebody who reaches us.
    """
    name = said.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name in ("", "localhost", host.strip("[]").lower()):  # who tells none is no browser
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class _Closed(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()  # uvloop's is none by its class
