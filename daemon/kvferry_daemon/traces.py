"""OpenTelemetry spans of transfers, their windows and their batches of chunks, sent by OTLP/HTTP.

The core tells what happened and when; a thread of the SDK's sends it, so that no receiver that is
slow or gone holds anything up: what does not fit into its queue is dropped.
"""

import importlib.util
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvferry_daemon.core.events import Key
from kvferry_daemon.core.report import our_version
from kvferry_daemon.core.told import (
    ChunksMoved,
    Told,
    TraceJoined,
    TransferEnded,
    TransferOpened,
    WindowMoved,
)
from kvferry_proto.states import Role

if TYPE_CHECKING:
    from opentelemetry.trace import Span

NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
EXPORT_S = 2.0  # one attempt to send
CLOSE_S = 3.0  # for what is left at the end
BATCH_MAX = 512
QUEUE_MAX = 4096


class TracesRefused(OSError):
    """There are no traces as they were asked for; the message says what to do."""


class Traces:
    """One a daemon, if it is on."""

    def __init__(self, endpoint: str, boot_id: str, now_s: Callable[[], float]) -> None:
        """``now_s``: the clock of the events. Raises TracesRefused without the extra."""
        check_installed()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        names = {
            "service.name": "kvferry",
            "service.version": our_version(),
            "service.instance.id": boot_id,
        }
        self._provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, QUEUE_MAX, max_export_batch_size=BATCH_MAX)
        )
        self._tracer = self._provider.get_tracer("kvferry", our_version())
        self._propagator = TraceContextTextMapPropagator()
        self._now_s = now_s
        self._spans: dict[Key, Span] = {}
        self._waiting: dict[Key, TransferOpened] = {}  # sources whose trace a sink may still name

    def tell(self, event: Told) -> None:
        """Make a span of what happened."""
        match event:
            case TransferOpened():
                if event.traceparent is None and event.key.role is Role.SOURCE:
                    self._waiting[event.key] = event
                else:
                    self._begin(event, event.traceparent)
            case TraceJoined():
                self._span_of(event.key, event.traceparent)
            case WindowMoved():
                self._inside(
                    "kvferry.window",
                    event,
                    base_tokens=event.base_tokens,
                    edge_tokens=event.edge_tokens,
                    sent_tokens=event.sent_tokens,
                )
            case ChunksMoved():
                self._inside(
                    "kvferry.chunks",
                    event,
                    first_token=event.first_token,
                    tokens=event.tokens,
                    chunks=event.chunks,
                    missed=event.missed,
                )
            case TransferEnded():
                self._end(event)

    def close(self) -> None:
        """Send what is left, for a while."""
        for span in self._spans.values():
            span.end()
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(CLOSE_S)

    def _begin(self, event: TransferOpened, traceparent: str | None) -> "Span":
        key = event.key
        parent = self._propagator.extract({"traceparent": traceparent or ""})  # else a new trace
        told = {
            "kvferry.transfer_id": key.transfer_id,
            "kvferry.role": key.role.value,
            "kvferry.attempt": key.attempt,
            "kvferry.worker": event.worker,
            "kvferry.start_tokens": event.start_tokens,
            "kvferry.taken_up_again": event.again,
        }
        if event.source is not None:
            told["kvferry.source"] = event.source
        began_ns = self._ns(event.at_s)
        begin = self._tracer.start_span
        span = begin("kvferry.transfer", parent, attributes=told, start_time=began_ns)
        self._spans[key] = span
        return span

    def _span_of(self, key: Key, traceparent: str | None = None) -> "Span | None":
        waiting = self._waiting.pop(key, None)
        return self._spans.get(key) if waiting is None else self._begin(waiting, traceparent)

    def _inside(self, name: str, event: WindowMoved | ChunksMoved, **told: int) -> None:
        from opentelemetry.trace import set_span_in_context

        whole = self._span_of(event.key)
        if whole is None:
            return  # its transfer has ended
        began_ns = self._ns(event.began_s)
        about = {f"kvferry.{what}": value for what, value in told.items()}
        around = set_span_in_context(whole)
        span = self._tracer.start_span(name, around, attributes=about, start_time=began_ns)
        span.end(self._ns(event.ended_s))

    def _end(self, event: TransferEnded) -> None:
        from opentelemetry.trace import StatusCode

        span = self._span_of(event.key)
        if span is None:
            return
        del self._spans[event.key]
        span.set_attribute("kvferry.state", event.state.name.lower())
        span.set_attribute("kvferry.sent_tokens", event.sent_tokens)
        if event.total_tokens is not None:
            span.set_attribute("kvferry.total_tokens", event.total_tokens)
        if event.error is not None:
            span.set_attribute("error.type", str(event.error.code))
            span.set_status(StatusCode.ERROR, event.error.message)
        span.end(self._ns(event.at_s))

    def _ns(self, at_s: float) -> int:
        """A moment of our clock as nanoseconds since 1970."""
        return time.time_ns() - int((self._now_s() - at_s) * 1e9)


def traces(endpoint: str | None, boot_id: str, now_s: Callable[[], float]) -> Traces | None:
    """As the operator wants it; None makes none, and costs nothing. May raise TracesRefused."""
    return None if endpoint is None else Traces(endpoint, boot_id, now_s)


def check_installed() -> None:
    """TracesRefused where the extra is not installed."""
    try:
        absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    except ModuleNotFoundError as error:  # a package around it
        absent = [str(error.name)]
    if absent:
        raise TracesRefused(
            f"otlp_endpoint needs {', '.join(absent)}: pip install 'kvferry[otel]', or leave it out"
        )
