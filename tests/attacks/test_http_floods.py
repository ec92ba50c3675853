"""Who connects to the HTTP port without an end, says nothing, asks too much, or as somebody else."""

import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from attacks.scene import ends, without
from http_daemon import get, metrics_of
from kvferry_daemon.http.door import is_ours
from live import LiveDaemon

CONNECTIONS = 128
REQUESTS = 1000
WAIT_S = 20.0


def connected(daemon: LiveDaemon) -> socket.socket:
    host, _, port = daemon.http.removeprefix("http://").rpartition(":")
    one = socket.create_connection((host, int(port)))
    one.settimeout(WAIT_S)
    return one


def refused(daemon: LiveDaemon) -> int:
    return daemon.status().counters.get("http_refused", 0)


def test_connections_are_bounded_and_silent_ones_are_cut(tmp_path: Path) -> None:
    for defence, is_bound in (("open_http", False), (None, True)):
        with without(defence)(tmp_path / str(defence), http_port=0) as daemon, ExitStack() as stack:
            many = [stack.enter_context(connected(daemon)) for _ in range(CONNECTIONS + 20)]
            for one in many[CONNECTIONS:]:
                one.settimeout(WAIT_S if is_bound else 0.05)
            assert all(map(ends, many[CONNECTIONS:])) is is_bound
            if is_bound:
                many[0].sendall(b"GET / HT")  # and never the rest
                assert ends(many[0])
                assert ends(many[1])
                assert refused(daemon) >= 20
                until_s = time.monotonic() + WAIT_S
                while refused(daemon) < CONNECTIONS + 20:
                    assert time.monotonic() < until_s, refused(daemon)
                    time.sleep(0.1)
                assert "kvferry_build_info" in metrics_of(daemon)
                assert '"level": "error"' not in daemon.log()  # each would cost as much as it saves


def test_who_asked_for_what_is_not_there_leaves_his_place(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a", http_port=0) as daemon:
        for number in range(CONNECTIONS + 1):
            method, path, status = (("GET", "/nope", 404), ("PUT", "/", 405))[number % 2]
            with connected(daemon) as one:
                one.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert f" {status} ".encode() in one.recv(1 << 12)
        assert get(daemon, "/healthz") == (200, "ok\n")


def test_requests_behind_the_first_one_are_not_kept(tmp_path: Path) -> None:
    for defence, answered in (("open_http", REQUESTS), (None, 1)):
        with (
            without(defence)(tmp_path / str(defence), http_port=0) as daemon,
            connected(daemon) as one,
        ):
            one.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * REQUESTS)
            said = b""
            with suppress(ConnectionResetError):
                while said.count(b"200 OK") < REQUESTS and (part := one.recv(1 << 16)):
                    said += part
            assert said.count(b"200 OK") in {1: (0, 1), REQUESTS: (REQUESTS,)}[answered]


def test_a_host_that_asks_too_much_is_told_when_to_ask_again(tmp_path: Path) -> None:
    for defence, is_bound in (("no_rates", False), ("dear_requests", True)):
        with without(defence)(tmp_path / str(defence), http_port=0) as daemon:
            told = []
            for _ in range(400):
                with connected(daemon) as one:
                    one.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    told.append(one.recv(1 << 12))
                time.sleep(1 / 180)  # slower than the bound on connections a second
            late = [answer for answer in told if b" 503 " in answer]
            assert bool(late) is is_bound
            assert all(b"Retry-After: " in answer for answer in late)


def test_a_page_of_a_stranger_cannot_read_ours_under_his_own_name(tmp_path: Path) -> None:
    """His name leads to him first and to us then; the browser takes both for one site."""
    for defence, answered in (("any_host", 200), (None, 421)):
        with without(defence)(tmp_path / str(defence), http_port=0) as daemon:
            for path in ("/", "/metrics", "/page.js"):
                status, words = get(daemon, path, {"Host": "evil.example:9464"})
                assert status == answered
                if defence is None:
                    assert words.startswith("ask by address")
            assert get(daemon, "/", {"Host": "localhost:1"})[0] == 200
            assert refused(daemon) == (0 if defence else 3)


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ("", True), ("localhost", True), ("LOCALHOST:9464", True), ("127.0.0.1:9464", True),
        ("[::1]:9464", True), ("[fe80::1]", True), ("::1", True), ("node-7.example", True),
        ("Node-7.example:80", True), ("node-7.example.evil.example", False), ("evil.example", False),
        ("localhost.evil.example:80", False), ("127.0.0.1.evil.example", False), ("[evil]:1", False),
    ],
)  # fmt: skip
def test_the_names_that_we_go_by(said: str, ours: bool) -> None:
    assert is_ours(said, "node-7.example") is ours
