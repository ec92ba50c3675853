"""Whole transfers between real daemons, with workers that speak the wire by hand."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvferry_proto import worker
from kvferry_proto.layout import Layout, Plane
from kvferry_proto.states import TERMINAL, Mode, Role, StallReason, State
from live import BLOCK, LAYOUT, WINDOW, LiveDaemon, RawWorker

TAKE = (StallReason.WAITING_FOR_RESUME, StallReason.WAITING_FOR_BLOCKS)


@pytest.fixture
def pair(daemon: LiveDaemon, sink: LiveDaemon) -> Iterator[tuple[RawWorker, RawWorker]]:
    """A source worker and a sink worker, each at its daemon."""
    with RawWorker(daemon.directory) as source, RawWorker(sink.directory) as consumer:
        yield source, consumer


def produce(source: RawWorker, total: int, *, late: bool, transfer_id: str = "t") -> None:
    """Fill and mark ready what the window has room for now."""
    seen = source.poll(Role.SOURCE, transfer_id)
    if seen.state in TERMINAL or (seen.available_tokens == total and seen.total_tokens == total):
        return
    edge = min(total, seen.base_tokens + seen.allocated_tokens)
    source.fill(seen, edge)
    told = total if not late or seen.available_tokens == total else None
    ready = worker.Ready(transfer_id=transfer_id, ready_tokens=edge, total_tokens=told)
    source.snapshot(ready)


def move(
    source: RawWorker, consumer: RawWorker, total: int, *, late: bool, transfer_id: str = "t"
) -> tuple[list[int], worker.Snapshot]:
    """Run a transfer to its end, checking every byte; return the resumes and the last snapshot."""
    resumes: list[int] = []
    for _ in range(1000):
        produce(source, total, late=late, transfer_id=transfer_id)
        seen = consumer.poll(Role.SINK, transfer_id)
        if seen.state in TERMINAL:
            consumer.check(seen)
            return resumes, seen
        if seen.stall in TAKE and seen.sent_tokens > seen.partial_sent_tokens:
            consumer.check(seen)
            resumes.append(seen.sent_tokens)
            resume = worker.Resume(transfer_id=transfer_id, sent_tokens=seen.sent_tokens)
            consumer.snapshot(resume)
        else:
            watched = worker.Watched(role=Role.SINK, transfer_id=transfer_id, after=seen.snapshot)
            consumer.call(worker.Poll(transfers=[watched], wait_s=0.05))
    raise AssertionError(consumer.poll(Role.SINK, transfer_id))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("total", [0, 1, BLOCK, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW + 3])
def test_every_length_arrives_exactly(
    daemon: LiveDaemon, pair: tuple[RawWorker, RawWorker], total: int, late: bool
) -> None:
    source, consumer = pair
    source.snapshot(worker.Send(transfer_id="t"))
    consumer.snapshot(worker.Receive(transfer_id="t", source=daemon.address))
    resumes, end = move(source, consumer, total, late=late)
    assert end.state is State.SUCCESS
    assert end.sent_tokens == end.total_tokens == total
    assert resumes[: total // WINDOW] == [WINDOW * (n + 1) for n in range(len(resumes))]
    assert source.wait_end(Role.SOURCE).state is State.SUCCESS


def test_handoff_moves_blocks_and_no_byte(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as source, RawWorker(daemon.directory) as consumer:
        source.snapshot(worker.Send(transfer_id="t"))
        consumer.snapshot(worker.Receive(transfer_id="t", source=daemon.address))
        _, end = move(source, consumer, 3 * WINDOW, late=True)
        assert end.state is State.SUCCESS
        counters = daemon.status().counters
        assert counters["blocks_handed_over"] == 3 * WINDOW // BLOCK
        assert "bytes_received" not in counters


def test_whole_mode_shows_one_window_of_everything(
    daemon: LiveDaemon, pair: tuple[RawWorker, RawWorker]
) -> None:
    source, consumer = pair
    source.snapshot(worker.Send(transfer_id="t"))
    receive = worker.Receive(
        transfer_id="t", source=daemon.address, mode=Mode.WHOLE, max_tokens=2 * WINDOW
    )
    consumer.snapshot(receive)
    resumes, end = move(source, consumer, 2 * WINDOW - 5, late=True)
    assert (end.state, end.base_tokens, resumes) == (State.SUCCESS, 0, [])


def test_a_payload_over_max_tokens_fails_with_both_numbers(
    daemon: LiveDaemon, pair: tuple[RawWorker, RawWorker]
) -> None:
    source, consumer = pair
    source.snapshot(worker.Send(transfer_id="t", total_tokens=WINDOW + 1))
    receive = worker.Receive(
        transfer_id="t", source=daemon.address, mode=Mode.WHOLE, max_tokens=WINDOW
    )
    consumer.snapshot(receive)
    end = consumer.wait_end(Role.SINK)
    assert end.error is not None
    assert end.error.code == "max_tokens_exceeded"
    assert str(WINDOW + 1) in end.error.message
    assert source.wait_end(Role.SOURCE).state is State.FAILED


def test_layouts_that_differ_are_refused_naming_the_field(
    daemon: LiveDaemon, sink: LiveDaemon
) -> None:
    other = Layout(
        planes=(LAYOUT.planes[0], Plane(name="ids", dtype=LAYOUT.planes[0].dtype)),
        block_size_tokens=BLOCK,
    )
    with RawWorker(daemon.directory) as source, RawWorker(sink.directory, other) as consumer:
        source.snapshot(worker.Send(transfer_id="t"))
        consumer.snapshot(worker.Receive(transfer_id="t", source=daemon.address))
        end = consumer.wait_end(Role.SINK)
        assert end.error is not None
        assert end.error.code == "layout_mismatch"
        assert "planes[1] (ids) dtype: int64 at the source, int32 at the sink" in end.error.message
        assert source.wait_end(Role.SOURCE).state is State.FAILED


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_an_address_that_refuses_is_named(sink: LiveDaemon) -> None:
    with RawWorker(sink.directory) as consumer:
        address = f"tcp://127.0.0.1:{free_port()}"
        consumer.snapshot(worker.Receive(transfer_id="t", source=address))
        end = consumer.wait_end(Role.SINK)
        assert end.error is not None
        assert end.error.code == "peer_unreachable"
        assert address in end.error.message
        assert "refused" in end.error.message


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_that_is_no_kvferry_is_named(sink: LiveDaemon, says: bytes) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(20)
        consumer = stack.enter_context(RawWorker(sink.directory))

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                stack.callback(connection.close)
                connection.sendall(says)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        consumer.snapshot(worker.Receive(transfer_id="t", source=address))
        end = consumer.wait_end(Role.SINK)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert end.error is not None
    assert end.error.code == "peer_unreachable"
    assert "no kvferry" in end.error.message


def test_an_abort_at_the_source_ends_both_sides(
    daemon: LiveDaemon, pair: tuple[RawWorker, RawWorker]
) -> None:
    source, consumer = pair
    source.snapshot(worker.Send(transfer_id="t"))
    consumer.snapshot(worker.Receive(transfer_id="t", source=daemon.address))
    source.wait_for(Role.SOURCE, lambda s: s.allocated_tokens > 0)
    source.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK))
    consumer.wait_for(Role.SINK, lambda s: s.sent_tokens == BLOCK)
    source.snapshot(worker.Abort(transfer_id="t", role=Role.SOURCE, reason="preempted"))
    end = consumer.wait_end(Role.SINK)
    assert end.error is not None
    assert end.error.code == "source_failed"
    assert "preempted" in end.error.message


def test_no_progress_fails_with_the_stall_reason(daemon: LiveDaemon, tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "c", stall_s=3) as sink, RawWorker(sink.directory) as consumer:
        consumer.snapshot(worker.Receive(transfer_id="t", source=daemon.address))
        end = consumer.wait_end(Role.SINK)
        assert end.error is not None
        assert end.error.code == "stalled"
        assert "waiting_for_source" in end.error.message


def test_a_retry_on_both_sides_starts_anew(
    daemon: LiveDaemon, pair: tuple[RawWorker, RawWorker]
) -> None:
    source, consumer = pair
    source.snapshot(worker.Send(transfer_id="t"))
    consumer.snapshot(worker.Receive(transfer_id="t", source=daemon.address))
    source.wait_for(Role.SOURCE, lambda s: s.allocated_tokens > 0)
    source.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK))
    consumer.wait_for(Role.SINK, lambda s: s.sent_tokens == BLOCK)
    retried = consumer.snapshot(worker.Receive(transfer_id="t", attempt=1, source=daemon.address))
    assert (retried.sent_tokens, retried.last_resume_at) == (0, -1)
    assert source.wait_end(Role.SOURCE).state is State.FAILED
    source.snapshot(worker.Send(transfer_id="t", attempt=1, total_tokens=0))
    watched = worker.Watched(role=Role.SINK, transfer_id="t", attempt=1)
    for _ in range(100):
        reply = consumer.call(worker.Poll(transfers=[watched], wait_s=0.1))
        if reply.transfers and reply.transfers[0].state is State.SUCCESS:
            break
    else:
        raise AssertionError(reply)


@pytest.mark.parametrize("who", ["source", "sink"])
def test_a_killed_worker_ends_the_transfer_and_gives_every_block_back(
    daemon: LiveDaemon, sink: LiveDaemon, who: str
) -> None:
    """The workers are forked, so that they can be killed with their locks held."""
    with ExitStack() as stack:
        ready_out, ready_in = os.pipe()
        child = os.fork()
        if child == 0:
            _be_a_worker(daemon, sink, who, ready_in)
        stack.callback(os.waitpid, child, 0)
        stack.callback(os.kill, child, signal.SIGKILL)
        other = RawWorker((sink if who == "source" else daemon).directory)
        stack.enter_context(other)
        role = Role.SINK if who == "source" else Role.SOURCE
        if who == "source":
            other.snapshot(worker.Receive(transfer_id="t", source=daemon.address))
        else:
            other.snapshot(worker.Send(transfer_id="t"))
            other.wait_for(role, lambda s: s.allocated_tokens > 0)
            other.snapshot(worker.Ready(transfer_id="t", ready_tokens=WINDOW))
        assert os.read(ready_out, 1) == b"x"
        os.close(ready_out)
        os.close(ready_in)
        other.wait_for(role, lambda s: s.sent_tokens > 0)
        os.kill(child, signal.SIGKILL)
        end = other.wait_end(role)
        assert end.error is not None
        assert "worker_lost" in (end.error.code + end.error.message)
        other.snapshot(worker.Release(transfer_id="t", role=role))
        daemon.wait_until_free()
        sink.wait_until_free()


def _be_a_worker(daemon: LiveDaemon, sink: LiveDaemon, who: str, ready_in: int) -> None:
    """In the child: bring a transfer into the middle, then do nothing until killed."""
    try:
        if who == "source":
            me = RawWorker(daemon.directory)
            me.snapshot(worker.Send(transfer_id="t"))
            me.wait_for(Role.SOURCE, lambda s: s.allocated_tokens > 0)
            me.snapshot(worker.Ready(transfer_id="t", ready_tokens=WINDOW))
        else:
            me = RawWorker(sink.directory)
            me.snapshot(worker.Receive(transfer_id="t", source=daemon.address))
        os.write(ready_in, b"x")
        while True:
            signal.pause()
    finally:
        os._exit(1)
