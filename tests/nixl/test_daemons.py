"""Two real daemons that move blocks by NIXL, or say why they do not."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contract.conftest import Flow
from kvferry_proto.states import Role, State
from live import WAIT_S, WINDOW, LiveDaemon, RawWorker
from wire.test_restart import Pair


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def daemons(stack: ExitStack, tmp_path: Path, source: str, sink: str) -> list[LiveDaemon]:
    """A source's daemon and a sink's, with these settings of `transport`."""
    flags: dict[str, Any] = {"heartbeat_s": 0.2, "lost_s": 10, "drain_s": 0.2}
    return [
        stack.enter_context(LiveDaemon(tmp_path / name, transport=transport, **flags))
        for name, transport in (("a", source), ("b", sink))
    ]


def flow(stack: ExitStack, lives: list[LiveDaemon], total: int, **fields: Any) -> Flow:
    source, sink = [stack.enter_context(RawWorker(life.directory)) for life in lives]
    return Flow(source, sink, lives[0].address, "t", total, **fields)


def read_once(stack: ExitStack, lives: list[LiveDaemon]) -> None:
    """Move payloads until one is read: while a pool is being registered, they go as chunks."""
    for number in range(1000):
        moved = flow(stack, lives, 3 * WINDOW + 3)
        moved.transfer_id = f"first-{number}"
        moved.open()
        moved.run()
        moved.release(Role.SOURCE)
        moved.release(Role.SINK)
        if lives[1].status().counters["nixl_reads"]:
            return
    raise AssertionError(lives[1].log())


def test_sigterm_ends_daemons_that_have_read_with_nothing_to_complain_of(
    stack: ExitStack, tmp_path: Path
) -> None:
    """UCX has threads, handlers and destructors of its own."""
    with ExitStack() as workers:
        lives = daemons(stack, tmp_path, "nixl", "nixl")
        read_once(workers, lives)
    for life in lives:
        life.process.send_signal(signal.SIGTERM)
    assert [life.process.wait(WAIT_S) for life in lives] == [0, 0]
    assert [life.log().count("Traceback") for life in lives] == [0, 0]


@pytest.mark.parametrize(
    ("source", "sink", "why"),
    [
        ("nixl", "nixl", "the sink is set to it"),
        ("auto", "nixl", "the sink is set to it"),
        ("nixl", "auto", "the source is set to it"),
    ],
)
def test_who_is_set_to_nixl_moves_a_payload_by_it_and_says_so(
    stack: ExitStack, tmp_path: Path, source: str, sink: str, why: str
) -> None:
    pytest.importorskip("nixl", reason="NIXL is not installed")
    lives = daemons(stack, tmp_path, source, sink)
    read_once(stack, lives)
    moved = flow(stack, lives, 5 * WINDOW + 3)
    moved.to_the_middle()
    [peer] = lives[1].status().peers
    assert (peer.transport, peer.why) == ("nixl", why)
    assert [life.transfers("t")[0].transport for life in lives] == ["nixl", "nixl"]
    moved.run()


def test_auto_takes_tcp_where_nixl_would_not_be_faster(stack: ExitStack, tmp_path: Path) -> None:
    lives = daemons(stack, tmp_path, "auto", "auto")
    moved = flow(stack, lives, WINDOW)
    moved.open()
    moved.run()
    [peer] = lives[1].status().peers
    assert peer.transport == "tcp"
    assert peer.why


@pytest.mark.parametrize(
    ("source", "sink", "words"),
    [
        ("tcp", "nixl", "the sink is set to nixl, but the source is set to tcp"),
        ("nixl", "tcp", "the source is set to nixl, but the sink is set to tcp"),
    ],
)
def test_two_daemons_that_are_set_to_different_transports_say_so(
    stack: ExitStack, tmp_path: Path, source: str, sink: str, words: str
) -> None:
    pytest.importorskip("nixl", reason="NIXL is not installed")
    lives = daemons(stack, tmp_path, source, sink)
    refused = flow(stack, lives, WINDOW)
    refused.open_sink()
    end = refused.wait_end(Role.SINK)
    assert end.state is State.FAILED
    assert end.error is not None
    assert end.error.code == "transport_unavailable"
    assert words in end.error.message


def test_a_source_that_stood_still_meanwhile_leaves_nothing_behind(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over plain tcp a read is served by the source's own thread, so it stops with the process."""
    pytest.importorskip("nixl", reason="NIXL is not installed")
    monkeypatch.setenv("UCX_TLS", "tcp")
    lives = daemons(stack, tmp_path, "nixl", "nixl")
    read_once(stack, lives)
    stopped = flow(stack, lives, WINDOW)
    stopped.transfer_id = "s"
    stopped.open()
    stopped.ready(WINDOW)  # the answer, and the offers, are on their way or not
    lives[0].pause()
    stopped.abort(Role.SINK)
    stopped.release(Role.SINK)
    lives[1].wait_for_transfer("s", lambda row: row.ended)
    lives[0].resume()
    lives[1].wait_until_free()
    stopped.release(Role.SOURCE)
    lives[0].wait_until_free()
    again = flow(stack, lives, WINDOW)
    again.transfer_id = "r"
    again.open()
    again.run()


@pytest.mark.parametrize("killed", [("source",), ("sink",)], ids="".join)
def test_a_killed_daemon_goes_on_from_its_token(tmp_path: Path, killed: tuple[str, ...]) -> None:
    """Its pool is registered anew, and read from there."""
    pytest.importorskip("nixl", reason="NIXL is not installed")
    pair = Pair(tmp_path, transport="nixl")
    got = pair.move(killed, {0, 2})
    np.testing.assert_array_equal(np.concatenate(got), pair.arrays["ids"])
    pair.close()
