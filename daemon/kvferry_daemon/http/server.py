"""Metrics, probes, and a live page, on the daemon's own loop. All of it only reads."""

import asyncio
import socket
from importlib.resources import files
from time import monotonic
from typing import Self

from aiohttp import web
from prometheus_client.registry import CollectorRegistry
from pydantic import ValidationError

from kvferry_daemon.core.explain import explain
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.report import transfers
from kvferry_daemon.http.door import Handler, HttpDoor
from kvferry_daemon.http.facts import Facts
from kvferry_daemon.http.metrics import NodeCollector, render
from kvferry_proto import control

EVERY_S = 1.0
TAKEN_S = 10.0
ROWS_MAX = 100  # of a live page: each costs the loop some 30 us a second
WATCHERS_MAX = 16
SHUT_S = 1.0
PAGE = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",  # ids are strangers'
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class HttpServer:
    """One a daemon, if it is on."""

    def __init__(self, node: Node, facts: Facts) -> None:
        self._node = node
        self._facts = facts
        self._registry = CollectorRegistry()
        self._registry.register(NodeCollector(node, facts))
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._watchers = 0
        self._shown_at_s = -EVERY_S
        self._shown = b""
        app = web.Application(middlewares=[self._through_the_door])
        shown = {
            **dict.fromkeys(PAGE, self._page),
            "/events": self._events,
            "/explain": self._explain,
        }
        for path, handler in shown.items():
            app.router.add_get(path, self._not_here if facts.by_tenant else handler)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._readiness)
        self._files = {path: files(__package__).joinpath(PAGE[path]).read_text() for path in PAGE}
        self._door: HttpDoor | None = None
        self._listening: asyncio.Server | None = None
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=SHUT_S, keepalive_timeout=0
        )

    @classmethod
    async def start(cls, listener: socket.socket, node: Node, facts: Facts) -> Self:
        """Answer on a socket that listens already."""
        server = cls(node, facts)
        await server._runner.setup()
        assert server._runner.server is not None
        server._door = HttpDoor(server._runner.server, server._on_refused, facts.host)
        server._listening = await server._loop.create_server(server._door, sock=listener)
        return server

    def _on_refused(self) -> None:
        self._node.counters["http_refused"] += 1

    @web.middleware
    async def _through_the_door(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        assert self._door is not None
        return await self._door.answer(request, handler)

    async def close(self) -> None:
        """Let those who watch go, and answer nobody any more."""
        self._closing.set()
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()

    async def _not_here(self, _request: web.Request) -> web.Response:
        """Who knows a transfer's id may pull it elsewhere, and nobody here is asked who he is."""
        words = "HTTP shows no tenant's transfers: ask at the control socket, with kvferry top\n"
        return web.Response(text=words, status=404)

    async def _metrics(self, request: web.Request) -> web.Response:
        """Without exemplars where there are tenants: those name transfers."""
        accept = "" if self._facts.by_tenant else request.headers.get("Accept", "")
        body, content_type = render(self._registry, accept)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _health(self, _request: web.Request) -> web.Response:
        if why := self._facts.failing():
            return web.Response(text=f"the ledger cannot be written: {why}\n", status=503)
        return web.Response(text="ok\n")

    async def _readiness(self, _request: web.Request) -> web.Response:
        if self._node.draining:
            return web.Response(text="draining\n", status=503)
        if not self._node.books:
            return web.Response(text="no pool yet: no worker has said hello\n", status=503)
        return web.Response(text="ready\n")

    async def _page(self, request: web.Request) -> web.Response:
        kind = TYPES[PAGE[request.path].rpartition(".")[2]]
        return web.Response(text=self._files[request.path], content_type=kind, headers=HEADERS)

    async def _explain(self, request: web.Request) -> web.Response:
        try:
            question = control.Explain(transfer_id=request.query.get("id", ""))
        except ValidationError:
            return web.Response(text="id: 1 to 128 printable ASCII characters\n", status=400)
        answer = explain(self._node, question, self._loop.time())
        status = 200 if answer.transfers else 404
        body = answer.model_dump_json()
        return web.Response(
            text=body, status=status, content_type="application/json", headers=HEADERS
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._watchers >= WATCHERS_MAX:
            return web.Response(text=f"{WATCHERS_MAX} watch already\n", status=503)
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
        self._watchers += 1
        try:
            await response.prepare(request)
            while not self._closing.is_set():
                async with asyncio.timeout(TAKEN_S):  # who never reads must not keep his place
                    await response.write(b"data: " + self._live() + b"\n\n")
                await self._pause()
        except (ConnectionResetError, TimeoutError):  # who watched has gone, or does not look
            pass
        finally:
            self._watchers -= 1
        return response

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(EVERY_S):
                await self._closing.wait()
        except TimeoutError:
            return

    def _live(self) -> bytes:
        """What the page shows, as JSON: made once for all who watch."""
        if monotonic() - self._shown_at_s >= EVERY_S / 2:
            self._shown_at_s = monotonic()
            wanted = control.GetTransfers(limit=ROWS_MAX, sort="idle")
            rows = transfers(self._node, wanted, self._loop.time())
            status = self._facts.status()
            self._shown = b'{"status":%s,"rows":%s}' % (
                status.model_dump_json().encode(),
                rows.model_dump_json().encode(),
            )
        return self._shown
