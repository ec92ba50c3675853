"""Bad input over the real worker socket: a typed error, nothing changed, the daemon alive.

The fixtures assert the last part: no crash, no traceback, every block back in the pool.
"""

import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq

from kvferry_proto import worker
from kvferry_proto.codec import FRAME_BYTES_MAX
from kvferry_proto.states import Mode, Role, State
from live import BLOCK, LAYOUT, WINDOW, LiveDaemon, RawWorker

FULL_MS = 200  # no room for so long: the daemon's queue is full, and ours
DUE_S = 0.9


@pytest.fixture
def one(daemon: LiveDaemon) -> Iterator[RawWorker]:
    """A worker with a source and a sink transfer `t`, open and idle."""
    with RawWorker(daemon.directory) as raw:
        raw.snapshot(worker.Send(transfer_id="t"))
        raw.snapshot(worker.Receive(transfer_id="t"))
        raw.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW)
        yield raw


def unchanged(one: RawWorker) -> tuple[worker.Snapshot, worker.Snapshot]:
    return one.poll(Role.SOURCE), one.poll(Role.SINK)


def packed(**fields: object) -> bytes:
    frame: bytes = msgpack.packb(fields)
    return frame


WRONG_FRAMES: dict[str, list[bytes]] = {
    "garbage": [b"\xc1\xff\x00garbage"],
    "empty": [b""],
    "not a map": [msgpack.packb([1, 2])],
    "unknown kind": [packed(kind="explode", call=1)],
    "no kind": [packed(call=1)],
    "missing field": [packed(kind="resume", transfer_id="t")],
    "wrong type": [packed(kind="resume", transfer_id="t", sent_tokens="3")],
    "true for a number": [packed(kind="resume", transfer_id="t", sent_tokens=True)],
    "negative": [packed(kind="ready", transfer_id="t", ready_tokens=-1)],
    "huge": [packed(kind="ready", transfer_id="t", ready_tokens=(1 << 64) - 1)],
    "nan": [packed(kind="poll", wait_s=float("nan"), transfers=[])],
    "no transfers": [packed(kind="poll", transfers=[])],
    "long id": [packed(kind="send", transfer_id="x" * 129)],
    "id with control characters": [packed(kind="send", transfer_id="a\nb")],
    "duplicate key": [b"\x82\xa4kind\xa4send\xa4kind\xa4send"],
    "depth": [b"\x91" * 5000],
    "declared array of 4 billion": [b"\xdd\xff\xff\xff\xff"],
    "extension type": [msgpack.packb({"kind": msgpack.ExtType(5, b"x")})],
    "two frames": [packed(kind="heartbeat"), b"more"],
}


@pytest.mark.parametrize("name", WRONG_FRAMES)
def test_a_frame_that_is_no_message_is_refused(one: RawWorker, name: str) -> None:
    before = unchanged(one)
    reply = one.raw(*WRONG_FRAMES[name])
    assert isinstance(reply, worker.Failure)
    assert reply.error.code == "bad_message"
    assert reply.error.fault == "caller"
    assert unchanged(one) == before


def test_a_frame_over_the_limit_ends_the_connection_not_the_daemon(
    daemon: LiveDaemon, one: RawWorker
) -> None:
    before = unchanged(one)
    other = one.connect()
    other.send(b"\xc4" * (FRAME_BYTES_MAX + 1))
    assert not other.poll(300), "an oversized frame got an answer"
    assert unchanged(one) == before


@pytest.mark.parametrize("where", ["worker", "peer"])
def test_who_sends_faster_than_is_read_and_dies_ends_no_daemon(
    daemon: LiveDaemon, one: RawWorker, where: str
) -> None:
    """libzmq aborts if a heartbeat of its own comes due at a full queue whose connection ended."""
    costly = packed(kind="poll", transfers=[{"role": "sink", "transfer_id": "x"}] * 1024)
    before = unchanged(one)
    local = f"ipc://{daemon.directory / where}.sock"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for _ in range(2):  # the connection ends before one comes due, nearly always
        flooder = context.socket(zmq.DEALER)
        flooder.connect(daemon.address if where == "peer" else local)
        while flooder.poll(FULL_MS, zmq.POLLOUT):
            flooder.send(costly, zmq.NOBLOCK)
        flooder.close(linger=0)
        until = time.monotonic() + DUE_S
        while time.monotonic() < until:
            assert unchanged(one) == before
    context.term()


def test_a_call_before_hello_is_told_to_say_hello(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory, hello=False) as raw:
        assert raw.code(worker.Heartbeat()) == "hello_first"


def test_hello_without_a_lock_is_refused(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory, hello=False) as raw:
        assert raw.code(worker.Hello(lock="nobody", layout=LAYOUT)) == "worker_not_locked"


def test_hello_with_a_made_up_session_is_refused(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory, hello=False) as raw:
        hello = worker.Hello(lock=raw.lock_name, layout=LAYOUT, session="0" * 64)
        assert raw.code(hello) == "unknown_session"


def test_versions_without_overlap_are_refused_with_both_ranges(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory, hello=False) as raw:
        fields = worker.Hello(lock=raw.lock_name, layout=LAYOUT).model_dump()
        reply = raw.fields(**{**fields, "versions": {"low": 7, "high": 9}})
        assert reply.error.code == "no_common_version"
        assert "7 to 9" in reply.error.message
        assert "1 to 1" in reply.error.message


def test_a_session_is_good_on_a_second_connection(one: RawWorker) -> None:
    assert one.welcome is not None
    one.socket = one.connect()
    again = one.call(worker.Hello(lock=one.lock_name, layout=LAYOUT, session=one.welcome.session))
    assert again.session == one.welcome.session
    assert one.poll(Role.SINK).transfer_id == "t"


CALLS: dict[str, Any] = {
    "ready": worker.Ready(transfer_id="t", ready_tokens=BLOCK),
    "resume": worker.Resume(transfer_id="t", sent_tokens=0),
    "release": worker.Release(transfer_id="t", role=Role.SOURCE),
    "abort": worker.Abort(transfer_id="t", role=Role.SINK),
    "send": worker.Send(transfer_id="t"),
    "receive": worker.Receive(transfer_id="t"),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_workers_transfer_is_out_of_reach(
    daemon: LiveDaemon, one: RawWorker, name: str
) -> None:
    before = unchanged(one)
    with RawWorker(daemon.directory) as thief:
        assert thief.code(CALLS[name]) == "not_your_transfer"
        watched = worker.Watched(role=Role.SINK, transfer_id="t")
        refused = thief.call(worker.Poll(transfers=[watched])).refused
        assert [r.error.code for r in refused] == ["not_your_transfer"]
    assert unchanged(one) == before


@pytest.mark.parametrize("name", ["ready", "resume", "release", "abort"])
def test_an_unknown_transfer_is_named(one: RawWorker, name: str) -> None:
    call = CALLS[name].model_copy(update={"transfer_id": "nobody"})
    assert one.code(call) == "unknown_transfer"


REFUSED: dict[str, tuple[Any, str]] = {
    "resume ahead": (worker.Resume(transfer_id="t", sent_tokens=1), "resume_ahead"),
    "ready beyond the window": (
        worker.Ready(transfer_id="t", ready_tokens=WINDOW + 1),
        "ready_beyond_window",
    ),
    "total below ready": (
        worker.Ready(transfer_id="t", ready_tokens=BLOCK, total_tokens=BLOCK - 1),
        "total_too_small",
    ),
    "start between blocks": (worker.Receive(transfer_id="u", start_tokens=3), "start_unaligned"),
    "window larger than the pool": (
        worker.Receive(transfer_id="u", window_tokens=1 << 20),
        "window_too_large",
    ),
    "window of more blocks than a snapshot can name": (
        worker.Send(transfer_id="u", window_tokens=BLOCK * (worker.WINDOW_BLOCKS_MAX + 1)),
        "window_too_large",
    ),
    "whole payload larger than the pool": (
        worker.Receive(transfer_id="u", mode=Mode.WHOLE, max_tokens=1 << 20),
        "window_too_large",
    ),
    "whole mode without a size": (
        worker.Receive(transfer_id="u", mode=Mode.WHOLE),
        "bad_message",
    ),
    "other parameters": (
        worker.Receive(transfer_id="t", window_tokens=BLOCK),
        "parameters_differ",
    ),
    "no address": (worker.Receive(transfer_id="u", source="ipc:///etc"), "bad_address"),
    "no port": (worker.Receive(transfer_id="u", source="tcp://host:99999"), "bad_address"),
    **{
        f"no host: {host!a}": (
            worker.Receive(transfer_id="u", source=f"tcp://{host}:1{rest}"),
            "bad_address",
        )
        for host, rest in (
            ("-x", ""),
            (".x", ""),
            ("a..b", ""),
            ("a" * 80, ""),
            ("[%]", ""),
            ("host", "\n"),
            ("host", "\u0663"),
            ("[x]", ""),
            ("", ""),
        )
    },
    "aux that the layout lacks": (
        worker.Ready(transfer_id="t", ready_tokens=0, aux={"x": 1}),
        "aux_missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_with_wrong_numbers_changes_nothing(one: RawWorker, name: str) -> None:
    call, code = REFUSED[name]
    before = unchanged(one)
    assert one.code(call) == code
    assert unchanged(one) == before
    reply = one.call(worker.Poll(transfers=[worker.Watched(role=Role.SINK, transfer_id="u")]))
    assert [r.error.code for r in reply.refused] == ["unknown_transfer"]


def test_the_same_call_again_answers_the_snapshot(one: RawWorker) -> None:
    before = unchanged(one)
    assert one.snapshot(worker.Send(transfer_id="t")) == before[0]
    assert one.snapshot(worker.Receive(transfer_id="t")) == before[1]


def test_a_total_never_changes(one: RawWorker) -> None:
    one.snapshot(worker.Ready(transfer_id="t", ready_tokens=0, total_tokens=100))
    for total in (99, 101):
        call = worker.Ready(transfer_id="t", ready_tokens=0, total_tokens=total)
        assert one.code(call) == "total_changed"
    assert one.poll(Role.SOURCE).total_tokens == 100


def test_a_lower_attempt_is_stale_but_its_release_acts(one: RawWorker) -> None:
    one.snapshot(worker.Receive(transfer_id="t", attempt=2))
    assert one.poll(Role.SINK, attempt=0).error is not None
    assert one.code(worker.Resume(transfer_id="t", sent_tokens=0)) == "stale_attempt"
    assert one.code(worker.Receive(transfer_id="t", attempt=1)) == "stale_attempt"
    released = one.snapshot(worker.Release(transfer_id="t", role=Role.SINK))
    assert released.state is State.FAILED


def test_a_budget_that_holds_no_window_is_refused_with_the_numbers(daemon: LiveDaemon) -> None:
    huge = LAYOUT.planes[0].model_copy(update={"shape": (1 << 22,)})
    with RawWorker(daemon.directory, hello=False) as raw:
        layout = LAYOUT.model_copy(update={"planes": (huge,)})
        layout = type(layout).model_validate(layout.model_dump())
        reply = raw.call(worker.Hello(lock=raw.lock_name, layout=layout))
        assert reply.error.code == "pool_refused"
        assert str(WINDOW // BLOCK * layout.block_bytes) in reply.error.message


def test_a_second_worker_shares_the_pool(daemon: LiveDaemon, one: RawWorker) -> None:
    with RawWorker(daemon.directory) as two:
        assert one.welcome is not None
        assert two.welcome is not None
        assert two.welcome.pool == one.welcome.pool
        assert two.welcome.session != one.welcome.session
    assert len(daemon.status().pools) == 1


def test_a_batch_answers_each_call_in_order(one: RawWorker) -> None:
    calls: list[worker.Verb] = [
        worker.Resume(transfer_id="nobody", sent_tokens=0),
        worker.Heartbeat(call=7),
        worker.Poll(transfers=[worker.Watched(role=Role.SINK, transfer_id="t")], wait_s=5),
    ]
    replies = one.call(worker.Batch(calls=calls)).replies
    assert [reply.kind for reply in replies] == ["failure", "snapshots", "snapshots"]
    assert replies[1].call == 7
