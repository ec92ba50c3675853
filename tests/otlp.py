"""A receiver of OTLP/HTTP traces in this process: real requests, real protobuf."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

WAIT_S = 20.0
LOOK_S = 0.02


class Span(NamedTuple):
    """What a test wants to know of one."""

    name: str
    trace: str
    span: str
    parent: str
    began_ns: int
    ended_ns: int
    failed: str  # the words of its status, if that is an error
    told: dict[str, object]
    service: dict[str, object]


class Receiver:
    """Keeps every span that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.endpoint = ""

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            service = _told(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_span(one, service) for one in scope.spans]

    def wait_for(self, **counts: int) -> None:
        """Wait until there are so many spans of these names."""
        by = time.monotonic() + WAIT_S
        while any(len(self.named(name)) < count for name, count in counts.items()):
            assert time.monotonic() < by, [one.name for one in self.spans]
            time.sleep(LOOK_S)

    def named(self, name: str, role: str = "") -> list[Span]:
        """Spans of transfers, windows or chunks; those of one side, where it is named."""
        sides = {one.span for one in self.spans if one.told.get("kvferry.role") == role}
        found = [one for one in self.spans if one.name == f"kvferry.{name}"]
        return [one for one in found if not role or {one.span, one.parent} & sides]


def _span(one: object, service: dict[str, object]) -> Span:
    return Span(
        one.name,  # type: ignore[attr-defined]
        one.trace_id.hex(),  # type: ignore[attr-defined]
        one.span_id.hex(),  # type: ignore[attr-defined]
        one.parent_span_id.hex(),  # type: ignore[attr-defined]
        one.start_time_unix_nano,  # type: ignore[attr-defined]
        one.end_time_unix_nano,  # type: ignore[attr-defined]
        one.status.message if one.status.code == 2 else "",  # type: ignore[attr-defined]
        _told(one.attributes),  # type: ignore[attr-defined]
        service,
    )


def _told(attributes: object) -> dict[str, object]:
    return {
        one.key: getattr(one.value, one.value.WhichOneof("value"))
        for one in attributes  # type: ignore[attr-defined]
    }


@contextmanager
def receiver() -> Iterator[Receiver]:
    """One that listens as long as the block lasts."""
    kept = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.take(self.rfile.read(int(self.headers["Content-Length"])))
            body = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        kept.endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield kept
        finally:
            server.shutdown()
            thread.join()
