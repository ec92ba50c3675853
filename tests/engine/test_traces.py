"""A router's trace goes through an engine's ferry to both daemons."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.pages import Pages, two_engines
from live import BLOCK, WAIT_S, LiveDaemon
from otlp import Receiver, receiver

PREFILL = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
DECODE = "4bf92f3577b34da6a3ce929d0e0e4736", "b7ad6b7169203331"


@pytest.fixture
def spans() -> Iterator[Receiver]:
    with receiver() as kept:
        yield kept


def test_both_sides_spans_are_of_the_routers_trace(tmp_path: Path, spans: Receiver) -> None:
    prefill, decode = Pages(), Pages()
    where = {"otlp_endpoint": spans.endpoint}
    with (
        LiveDaemon(tmp_path / "a", **where) as a,
        LiveDaemon(tmp_path / "b", **where) as b,
        two_engines(a, b, prefill, decode) as (source, sink),
    ):
        tables = [prefill.take(BLOCK)], [decode.take(BLOCK)]
        outgoing = source.send("t", total_tokens=BLOCK, traceparent="00-{}-{}-01".format(*PREFILL))
        outgoing.computed(tables[0], BLOCK)
        incoming = sink.receive(
            "t",
            source=a.address,
            tables=tables[1],
            first_token=0,
            end_token=BLOCK,
            traceparent="00-{}-{}-01".format(*DECODE),
        )
        assert incoming.wait(WAIT_S)
        assert incoming.error is None
        for daemon in (b, a):  # what ended is told at the latest by then
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(WAIT_S) == 0, daemon.log()
    of_source, of_sink = spans.named("transfer", "source"), spans.named("transfer", "sink")
    assert [(one.trace, one.parent) for one in of_source] == [PREFILL]
    assert [(one.trace, one.parent) for one in of_sink] == [DECODE]
