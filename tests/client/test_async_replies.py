"""An asyncio client and a daemon whose replies it cannot read."""

import asyncio
import threading
from pathlib import Path

import pytest
import zmq

from kvferry_client.aio_connection import AsyncConnection
from kvferry_client.session import Session
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.fields import ErrorInfo
from live import LAYOUT, WAIT_S


def answer(directory: Path, replies: int) -> None:
    """Be a daemon whose first reply is no message, and who refuses what comes then."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.bind(f"ipc://{directory / 'worker.sock'}")
    for number in range(replies):
        assert socket.poll(int(WAIT_S * 1000))
        route, frame = socket.recv_multipart()
        error = ErrorInfo.of(Code.DRAINING, "not now")
        failure = worker.Failure(call=worker.CALLS.decode(frame).call, error=error)
        socket.send_multipart([route, worker.REPLIES.encode(failure) if number else b"\xc1"])
    socket.close()
    context.term()


def test_a_reply_that_cannot_be_read_ends_the_calls_and_not_the_client(tmp_path: Path) -> None:
    """It ended what reads the replies: each later call waited for an answer that had come."""
    (tmp_path / "workers").mkdir()
    daemon = threading.Thread(target=answer, args=(tmp_path, 2))
    daemon.start()

    async def codes() -> list[str]:
        session = Session(tmp_path, LAYOUT, "")
        connection = AsyncConnection(session)
        found = []
        for _ in range(2):
            async with asyncio.timeout(5):
                with pytest.raises(FerryError) as refused:
                    await connection.join()
            found.append(refused.value.code.value)
        await connection.close()
        session.close()
        return found

    assert asyncio.run(codes()) == ["bad_message", "draining"]
    daemon.join()
