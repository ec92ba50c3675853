"""Spans of real daemons, sent to a receiver in this process: the router's trace goes through."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.payloads import LAYOUT, payload, pieces
from kvferry_client import connect
from kvferry_daemon.output import Exit
from kvferry_proto import worker
from kvferry_proto.states import Role
from live import WAIT_S, WINDOW, LiveDaemon, RawWorker
from otlp import Receiver, receiver

TOKENS = 4 * WINDOW
ROUTER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = "00-{}-{}-01".format(*ROUTER)
JITTER_NS = 10**6  # two clocks are read, one after the other
OTHER = "00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-01"


@pytest.fixture
def spans() -> Iterator[Receiver]:
    with receiver() as kept:
        yield kept


def moved(source: LiveDaemon, sink: LiveDaemon, at_source: str | None, at_sink: str | None) -> None:
    """Move a payload of four windows; each side names the trace that it was given."""
    arrays = payload(TOKENS)

    def prefill() -> None:
        with (
            connect(source.directory, LAYOUT, "prefill") as client,
            client.send("request-1", traceparent=at_source) as sending,
        ):
            for first_token, piece in pieces(arrays, WINDOW):
                sending.fill(first_token, piece)
            sending.finish({"first_token": 1})

    thread = threading.Thread(target=prefill)
    thread.start()
    with connect(sink.directory, LAYOUT, "decode") as client:
        options = {"source": None if source is sink else source.address, "traceparent": at_sink}
        with client.receive("request-1", **options) as receiving:  # type: ignore[arg-type]
            assert sum(1 for _ in receiving) >= TOKENS // WINDOW
    thread.join()


def ended(daemon: LiveDaemon) -> None:
    """Stop it; its last spans are sent by then."""
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(WAIT_S) == 0, daemon.log()


def test_transfer_windows_and_chunks_are_in_the_routers_trace(
    tmp_path: Path, spans: Receiver
) -> None:
    flags = {"otlp_endpoint": spans.endpoint}
    with LiveDaemon(tmp_path / "a", **flags) as a, LiveDaemon(tmp_path / "b", **flags) as b:
        moved(a, b, None, PARENT)
        ended(b)
        ended(a)
    assert {one.trace for one in spans.spans} == {ROUTER[0]}, "the source heard it from the sink"
    for role in ("source", "sink"):
        (whole,) = spans.named("transfer", role)
        assert whole.parent == ROUTER[1]
        assert whole.told["kvferry.transfer_id"] == "request-1"
        assert whole.told["kvferry.state"] == "success"
        assert whole.told["kvferry.total_tokens"] == TOKENS
        assert not whole.failed
        parts = spans.named("window", role) + spans.named("chunks", role)
        assert {one.parent for one in parts} == {whole.span}
        for one in parts:
            assert whole.began_ns - JITTER_NS <= one.began_ns <= one.ended_ns + JITTER_NS
            assert one.ended_ns <= whole.ended_ns + JITTER_NS
        chunks = spans.named("chunks", role)
        assert sum(int(str(one.told["kvferry.tokens"])) for one in chunks) == TOKENS
        assert {one.told["kvferry.missed"] for one in chunks} == {0}
    bases = [one.told["kvferry.base_tokens"] for one in spans.named("window", "sink")]
    assert bases == list(range(0, TOKENS, WINDOW))
    assert len({str(one.service["service.instance.id"]) for one in spans.spans}) == 2


def test_a_source_that_names_a_trace_of_its_own_keeps_it(tmp_path: Path, spans: Receiver) -> None:
    with LiveDaemon(tmp_path / "a", otlp_endpoint=spans.endpoint) as daemon:
        moved(daemon, daemon, OTHER, PARENT)
        ended(daemon)
    (source,), (sink,) = spans.named("transfer", "source"), spans.named("transfer", "sink")
    assert (source.trace, source.parent) == (OTHER[3:35], OTHER[36:52])
    assert (sink.trace, sink.parent) == ROUTER


@pytest.mark.parametrize("traceparent", [None, "", "no trace at all", "00-" + "0" * 32 + "-x-01"])
def test_without_a_good_trace_a_new_one_begins(
    tmp_path: Path, spans: Receiver, traceparent: str | None
) -> None:
    with LiveDaemon(tmp_path / "a", otlp_endpoint=spans.endpoint) as daemon:
        moved(daemon, daemon, traceparent, traceparent)
        ended(daemon)
    (source,), (sink,) = spans.named("transfer", "source"), spans.named("transfer", "sink")
    assert (source.parent, sink.parent) == ("", "")
    assert source.trace != sink.trace


def test_a_failed_transfer_says_why_and_a_next_life_has_a_span_of_its_own(
    tmp_path: Path, spans: Receiver
) -> None:
    with (
        LiveDaemon(tmp_path / "a", otlp_endpoint=spans.endpoint, lost_s=60, stop_s=0.2) as daemon,
        RawWorker(daemon.directory) as one,
    ):
        call = worker.Receive(transfer_id="waits", traceparent=PARENT)
        one.snapshot(call)
        daemon.process.kill()
        with daemon.again() as next_life:
            with RawWorker(next_life.directory) as other:
                other.snapshot(worker.Send(transfer_id="gone"))
                reason = worker.Abort(role=Role.SOURCE, transfer_id="gone", reason="enough")
                other.snapshot(reason)
                spans.wait_for(transfer=1)
                (failed,) = spans.named("transfer")
            next_life.process.send_signal(signal.SIGTERM)
            assert next_life.process.wait(WAIT_S) == 3, "one waits still"
    assert failed.told["error.type"] == "aborted"
    assert "enough" in failed.failed
    (kept,) = spans.named("transfer", "sink")
    assert (kept.trace, kept.told["kvferry.taken_up_again"]) == (ROUTER[0], True)


def test_another_trace_in_the_same_call_is_no_other_call(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a", lost_s=60) as daemon, RawWorker(daemon.directory) as one:
        one.snapshot(worker.Receive(transfer_id="t", traceparent=PARENT))
        one.snapshot(worker.Receive(transfer_id="t", traceparent=OTHER))
        assert one.code(worker.Receive(transfer_id="t", window_tokens=16)) == "parameters_differ"
        long = {"kind": "receive", "transfer_id": "u", "traceparent": "x" * 129}
        assert one.fields(**long).error.code == "bad_message"


def test_a_receiver_that_is_gone_holds_nothing_up(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a", otlp_endpoint="http://127.0.0.1:1/v1/traces") as daemon:
        moved(daemon, daemon, PARENT, PARENT)
        ended(daemon)
        lines = [json.loads(line) for line in daemon.log().splitlines()]
    assert [line["event"] for line in lines if line["logger"].endswith("daemon")][-1] == "stopped"


def test_without_the_extra_the_daemon_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from kvferry_daemon.cli import main\n"
        f"main(['serve', '--runtime-dir', {str(tmp_path / 'd')!r}, '--otlp-endpoint', 'http://h/'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    assert "pip install 'kvferry[otel]'" in done.stderr


def test_without_traces_nothing_of_them_is_loaded(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as daemon:
        moved(daemon, daemon, PARENT, PARENT)
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
        threads = Path(f"/proc/{daemon.process.pid}/task")
        names = {one.joinpath("comm").read_text().strip() for one in threads.iterdir()}
    assert "protobuf" not in maps
    assert not any(name.startswith("OtelBatch") for name in names)
