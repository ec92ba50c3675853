"""libzmq's own thread may take the core only from a loop that has nothing to do."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

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


@pytest.mark.usefixtures("socket")
def test_only_the_io_threads_are_made_patient_and_back() -> None:
    threads = IoThreads()
    while "io" not in policies():
        pass  # a thread gives itself its name
    threads.be_patient(True)
    threads.be_patient(True)
    assert policies() == {"io": {os.SCHED_BATCH}, "other": {os.SCHED_OTHER}}
    threads.be_patient(False)
    assert policies() == {"io": {os.SCHED_OTHER}, "other": {os.SCHED_OTHER}}


def test_a_link_counts_messages_and_the_turns_that_brought_them(
    socket: zmq.Socket[bytes],
) -> None:
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
