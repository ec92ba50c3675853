"""libzmq's own thread may take the core only from a loop that has nothing to do."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from kvferry_daemon.links import io_thread, zmq_link
from kvferry_daemon.links.io_thread import IoThreads
from kvferry_daemon.links.zmq_link import ZmqLink, make_socket


@pytest.fixture
def socket() -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = make_socket(context, zmq.DEALER)  # with it come the threads
    yield socket
    socket.close(linger=0)
    context.term()


def policies() -> dict[str, set[int]]:
    """By the first letters of a thread's name."""
    found: dict[str, set[int]] = {}
    for task in Path("/proc/self/task").iterdir():
        kind = "io" if (task / "comm").read_text().startswith("ZMQbg/IO") else "other"
        found.setdefault(kind, set()).add(os.sched_getscheduler(int(task.name)))
    return found


def wait_for_io_thread() -> None:
    """A thread gives itself its name."""
    while "io" not in policies():
        pass


@pytest.mark.usefixtures("socket")
def test_only_the_io_threads_are_made_patient_and_back() -> None:
    threads = IoThreads()
    wait_for_io_thread()
    threads.be_patient(True)
    threads.be_patient(True)
    assert policies() == {"io": {os.SCHED_BATCH}, "other": {os.SCHED_OTHER}}
    threads.be_patient(False)
    assert policies() == {"io": {os.SCHED_OTHER}, "other": {os.SCHED_OTHER}}


@pytest.mark.usefixtures("socket")
def test_a_system_that_refuses_is_told_of_once_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under gVisor, or a seccomp filter; what calls this also looks for dead workers."""

    def refuse(_task: int, _policy: int, _param: os.sched_param) -> None:
        raise PermissionError(1, "Operation not permitted")

    wait_for_io_thread()
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    threads = IoThreads()
    for patient in (True, False, True):
        threads.be_patient(patient)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_system_without_proc_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(io_thread, "TASKS", tmp_path / "nothing")
    IoThreads().be_patient(True)


@pytest.mark.usefixtures("socket")
def test_threads_that_the_operator_put_into_another_class_stay_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole daemon under ``chrt --fifo``, or ``--idle``, where leaving it is a privilege."""
    moved: list[int] = []
    wait_for_io_thread()
    monkeypatch.setattr(os, "sched_getscheduler", lambda _task: os.SCHED_FIFO)
    monkeypatch.setattr(os, "sched_setscheduler", lambda task, *_more: moved.append(task))
    threads = IoThreads()
    threads.be_patient(True)
    threads.be_patient(False)
    assert moved == []


def test_a_link_counts_messages_and_the_turns_that_brought_them(
    socket: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_link, "TURN_S", 60.0)  # however long this machine takes for one
    other = socket.context.socket(zmq.DEALER)
    other.bind("inproc://other")
    socket.connect("inproc://other")
    for _ in range(5):
        other.send(b"one of a crowd")

    async def receive() -> tuple[int, int]:
        seen: list[list[bytes]] = []
        link = ZmqLink(socket, seen.append)
        for _ in range(4):
            await asyncio.sleep(0)  # all come in the first turn
        link.close()
        return link.messages, link.turns

    try:
        assert asyncio.run(receive()) == (5, 1)
    finally:
        other.close(linger=0)
