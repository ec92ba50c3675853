"""Metrics, probes, the page and its events, over real HTTP against live daemons."""

import http.client
import json
import re
import resource
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as open_metrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from cli.processes import kvferry
from http_daemon import get, metrics_of
from kvferry_client import connect
from kvferry_proto import worker
from kvferry_proto.states import Role, StallReason
from live import BLOCK, LAYOUT, WAIT_S, WINDOW, LiveDaemon, RawWorker

OPEN = {"Accept": "application/openmetrics-text;version=1.0.0"}
LONG_ID = "x" * 128
read_open: Any = open_metrics.text_string_to_metric_families  # it has no types


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LiveDaemon]:
    with LiveDaemon(tmp_path / "a", http_port=0, lost_s=60) as live:
        yield live
        assert "Traceback" not in live.log()


def samples(daemon: LiveDaemon) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and the labels' values, which are in the order of the labels' names."""
    families = read_text(metrics_of(daemon))
    return {(s.name, tuple(s.labels.values())): s.value for f in families for s in f.samples}


def move(one: RawWorker, transfer_id: str, tokens: int = 2 * BLOCK) -> None:
    """A whole transfer within the daemon."""
    one.snapshot(worker.Send(transfer_id=transfer_id))
    one.snapshot(worker.Receive(transfer_id=transfer_id))
    seen = one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens >= tokens, transfer_id)
    one.fill(seen, tokens)
    one.snapshot(worker.Ready(transfer_id=transfer_id, ready_tokens=tokens, total_tokens=tokens))
    one.wait_end(Role.SINK, transfer_id)
    one.wait_end(Role.SOURCE, transfer_id)
    for role in Role:
        one.snapshot(worker.Release(transfer_id=transfer_id, role=role))


def test_probes_follow_pools_and_draining(daemon: LiveDaemon) -> None:
    assert get(daemon, "/healthz") == (200, "ok\n")
    status, words = get(daemon, "/readyz")
    assert (status, words.partition(":")[0]) == (503, "no pool yet")
    with connect(daemon.directory, LAYOUT, "one"):
        assert get(daemon, "/readyz") == (200, "ready\n")
        assert kvferry("drain", "--runtime-dir", daemon.directory).returncode == 0
        assert get(daemon, "/readyz") == (503, "draining\n")
        assert get(daemon, "/healthz")[0] == 200
        assert kvferry("undrain", "--runtime-dir", daemon.directory).returncode == 0
        assert get(daemon, "/readyz")[0] == 200


def test_a_daemon_is_not_healthy_while_its_ledger_cannot_be_written(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
        call = worker.Send(call=1, transfer_id="waits")
        one.socket.send(worker.CALLS.encode(call))  # its answer waits for the ledger
        wait_until(lambda: get(daemon, "/healthz")[0] == 503)
        assert "the ledger cannot be written" in get(daemon, "/healthz")[1]
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, limits)
        assert isinstance(one.reply(), worker.Snapshots)
        wait_until(lambda: get(daemon, "/healthz") == (200, "ok\n"))


def wait_until(condition: Callable[[], bool]) -> None:
    """Look until it is so."""
    until_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_metrics_count_what_moved(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        before = samples(daemon)
        move(one, "t")
        one.snapshot(worker.Receive(transfer_id="waits"))
        after = samples(daemon)
    assert before["kvferry_tokens_total", ("sink",)] == 0
    assert after["kvferry_tokens_total", ("sink",)] == 2 * BLOCK
    assert after["kvferry_tokens_total", ("source",)] == 2 * BLOCK
    assert after["kvferry_transfers_success_total", ("sink",)] == 1
    assert after["kvferry_transfer_seconds_count", ("sink",)] == 1
    assert after["kvferry_transfers", ("sink", "bootstrapping")] == 1
    assert after["kvferry_transfers_stalled", ("waiting_for_source", "sink")] == 1
    assert after["kvferry_stalls_total", ("waiting_for_source", "sink")] >= 1
    assert after["kvferry_stall_seconds_total", ("waiting_for_source", "sink")] > 0
    blocks = [
        after["kvferry_pool_blocks", ("host", state)] for state in ("free", "leased", "quarantined")
    ]
    assert sum(blocks) == 4 * WINDOW // BLOCK
    assert set(before) - {k for k in before if "transfer_seconds" in k[0]} <= set(after)


def test_a_role_that_is_full_shows_though_the_other_half_and_another_pool_are_free(
    daemon: LiveDaemon,
) -> None:
    other = LAYOUT.model_copy(update={"planes": LAYOUT.planes[:1]})
    half = 2 * WINDOW // BLOCK
    with RawWorker(daemon.directory) as one, RawWorker(daemon.directory, other):
        for transfer_id in ("t0", "t1", "t2"):
            one.snapshot(worker.Send(transfer_id=transfer_id))
            one.snapshot(worker.Receive(transfer_id=transfer_id))
            one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW, transfer_id)
            ready = worker.Ready(transfer_id=transfer_id, ready_tokens=WINDOW, total_tokens=WINDOW)
            one.snapshot(ready)
            if transfer_id != "t2":  # which is kept, and not released
                one.wait_end(Role.SINK, transfer_id)
        one.wait_for(Role.SINK, lambda s: s.stall is StallReason.WAITING_FOR_BLOCKS, "t2")
        found = samples(daemon)
        status = kvferry("status", "--runtime-dir", daemon.directory).stdout
    assert found["kvferry_pool_blocks", ("host", "free")] > half, "of four halves"
    assert found["kvferry_transfers_stalled", ("waiting_for_blocks", "sink")] == 1
    assert found["kvferry_pool_held_blocks", ("host", "sink")] == half
    assert found["kvferry_pool_quota_blocks", ("host", "sink")] == 2 * half
    assert found["kvferry_pool_fullest_ratio", ("host", "sink")] == 1
    assert found["kvferry_pool_fullest_ratio", ("host", "source")] < 1
    assert f"{half} of {half}" in status


def test_chunks_between_daemons_are_timed(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a", lost_s=60) as source,
        LiveDaemon(tmp_path / "b", lost_s=60, http_port=0) as sink,
        RawWorker(source.directory) as prefill,
        RawWorker(sink.directory) as decode,
    ):
        prefill.snapshot(worker.Send(transfer_id="t"))
        decode.snapshot(worker.Receive(transfer_id="t", source=source.address))
        seen = prefill.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW)
        prefill.fill(seen, WINDOW)
        prefill.snapshot(worker.Ready(transfer_id="t", ready_tokens=WINDOW, total_tokens=WINDOW))
        decode.wait_end(Role.SINK)
        found = samples(sink)
    received = found["kvferry_chunks_total", ("received",)]
    assert found["kvferry_chunk_seconds_count", ()] == received > 0
    assert found["kvferry_chunk_seconds_bucket", ("+Inf",)] == received
    assert found["kvferry_bytes_total", ("received",)] >= WINDOW * LAYOUT.block_bytes // BLOCK


def test_a_bucket_names_a_transfer_that_fell_into_it_however_long_its_id(
    daemon: LiveDaemon,
) -> None:
    with RawWorker(daemon.directory) as one:
        move(one, LONG_ID)
        text = get(daemon, "/metrics", OPEN)[1]
    named = [
        sample.exemplar.labels["transfer_id"]
        for family in read_open(text)  # which refuses labels of more than 128 characters
        for sample in family.samples
        if sample.exemplar is not None
    ]
    assert named
    assert all(LONG_ID.startswith(name) and len(name) > 100 for name in named)


def test_labels_do_not_grow_with_transfers(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        move(one, "t0")
        few = set(samples(daemon))
        for number in range(1, 20):
            move(one, f"t{number}")
        assert set(samples(daemon)) == few


def test_the_page_comes_whole_and_runs_no_script_but_its_own(daemon: LiveDaemon) -> None:
    with urllib.request.urlopen(daemon.http + "/", timeout=10) as answer:
        page = answer.read().decode()
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "onclick" not in page
    for name in re.findall(r'(?:src|href)="([^":]+)"', page):
        assert get(daemon, f"/{name}")[0] == 200
    assert get(daemon, "/nothing")[0] == 404


def events(daemon: LiveDaemon) -> tuple[http.client.HTTPConnection, Iterator[Any]]:
    host, _, port = daemon.http.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", "/events")
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"

    def read() -> Iterator[Any]:
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    return connection, read()


def test_events_bring_what_is_new_within_a_second(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        connection, news = events(daemon)
        with closing(connection):
            assert next(news)["rows"]["transfers"] == []
            one.snapshot(worker.Receive(transfer_id="<b>new</b>"))
            seen = next(news)["rows"]["transfers"] or next(news)["rows"]["transfers"]
            assert seen[0]["snapshot"]["transfer_id"] == "<b>new</b>"
            status, body = get(daemon, "/explain?id=%3Cb%3Enew%3C%2Fb%3E")
            assert (status, len(json.loads(body)["transfers"])) == (200, 1)
    assert get(daemon, "/explain?id=other")[0] == 404
    assert get(daemon, "/explain?id=a%20b")[0] == 400


def test_watchers_are_bounded_and_hold_up_no_end(daemon: LiveDaemon) -> None:
    watching = [events(daemon) for _ in range(16)]
    for _, news in watching:
        next(news)
    assert get(daemon, "/events")[0] == 503
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(10) == 0
    for connection, _ in watching:
        connection.close()


def test_a_taken_port_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = kvferry("serve", "--runtime-dir", tmp_path / "d", "--http-port", port)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert f"cannot listen for HTTP at 127.0.0.1:{port}: Address already in use" in line
    assert "another http_port" in line
    assert not (tmp_path / "d").exists()


def test_a_daemon_without_it_loads_none_of_it(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as live:
        maps = Path(f"/proc/{live.process.pid}/maps").read_text()
    assert "/kvferry" not in maps or "aiohttp" not in maps
    assert "uvloop" in maps, "what is loaded shows here"
    assert "aiohttp" not in maps


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*"])
def test_http_for_every_address_is_refused(host: str, tmp_path: Path) -> None:
    done = kvferry("config", "check", "--http-host", host, "--http-port", 0)
    assert done.returncode == 2
    assert "http_host" in done.stderr
