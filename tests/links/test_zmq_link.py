"""What a link hands over of what comes in, and what it only takes off the queue."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq

from kvferry_daemon.links.zmq_link import (
    LARGE_BYTES,
    QUEUED_MAX,
    Heard,
    ZmqLink,
    make_socket,
)

Frames = list[bytes]
WAIT_S = 5.0
HELD_UP_MS = 1000


def taken_in(
    path: Path, messages: list[Frames], is_unwanted: Callable[[bytes, str], bool]
) -> list[Frames]:
    """What is handed over of these messages; the last one has to be."""

    async def run(context: "zmq.Context[Any]") -> list[Frames]:
        listening = make_socket(context, zmq.ROUTER)
        listening.bind(f"ipc://{path}")
        there: list[Frames] = []
        last = asyncio.Event()

        def on_message(frames: Frames) -> None:
            there.append(frames[1:])
            if frames[1:] == messages[-1]:
                last.set()

        link = ZmqLink(listening, on_message, is_unwanted=is_unwanted)
        with context.socket(zmq.DEALER) as asking:
            asking.connect(f"ipc://{path}")
            for frames in messages:
                asking.send_multipart(frames)
            await asyncio.wait_for(last.wait(), WAIT_S)
        link.close()
        return there

    with zmq.Context() as context:
        return asyncio.run(run(context))


def test_large_messages_that_are_unwanted_are_not_handed_over(tmp_path: Path) -> None:
    small, large, last = [b"s"], [bytes(LARGE_BYTES + 1)], [b"last"]
    of_many = [bytes(LARGE_BYTES)] * 3
    sent = [small, large, of_many, small, large, last]
    assert taken_in(tmp_path / "a", sent, lambda _route, _user: False) == sent
    assert taken_in(tmp_path / "b", sent, lambda _route, _user: True) == [small, small, last]


def test_who_sends_faster_than_we_read_is_held_up(tmp_path: Path) -> None:
    """Behind him are the kernel's buffer and what he holds himself; libzmq's own bound is 1,000."""
    with zmq.Context() as context, make_socket(context, zmq.ROUTER) as listening:
        listening.bind(f"ipc://{tmp_path / 'a'}")
        with context.socket(zmq.DEALER) as pouring:
            for option, value in ((zmq.SNDHWM, 1), (zmq.SNDTIMEO, HELD_UP_MS), (zmq.LINGER, 0)):
                pouring.setsockopt(option, value)
            pouring.connect(f"ipc://{tmp_path / 'a'}")
            sent = 0
            with suppress(zmq.Again):
                while sent < 1000:
                    pouring.send(bytes(1 << 16))
                    sent += 1
    assert QUEUED_MAX <= sent < 2 * QUEUED_MAX


class CutOff(set[int]):
    """Tells when somebody was found to be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.found = asyncio.Event()

    def __contains__(self, one: object) -> bool:
        is_in = super().__contains__(one)
        if is_in:
            self.found.set()
        return is_in


def test_nothing_more_is_read_of_a_connection_that_was_cut(tmp_path: Path) -> None:
    """Nor answered: libzmq would keep the answers until all questions have been read."""

    async def run(context: "zmq.Context[Any]") -> list[bytes]:
        listening = make_socket(context, zmq.ROUTER)
        listening.bind(f"ipc://{tmp_path / 'a'}")
        there: asyncio.Queue[bytes] = asyncio.Queue()
        cut_off = CutOff()
        link = ZmqLink(listening, lambda frames: there.put_nowait(frames[1]), cut_off=cut_off)
        link.heard = heard = Heard()
        with context.socket(zmq.DEALER) as cut:
            cut.setsockopt(zmq.LINGER, 0)
            cut.connect(f"ipc://{tmp_path / 'a'}")
            cut.send(b"before")
            found = [await asyncio.wait_for(there.get(), WAIT_S)]
            cut_off |= set(heard.senders.values())
            cut.send(b"after")
            await asyncio.wait_for(cut_off.found.wait(), WAIT_S)
            cut_off.clear()  # its number is another one's
            cut.send(b"of another one")
            found.append(await asyncio.wait_for(there.get(), WAIT_S))
        link.close()
        return found

    with zmq.Context() as context:
        assert asyncio.run(run(context)) == [b"before", b"of another one"]


def test_what_is_sent_is_counted_for_who_asked(tmp_path: Path) -> None:
    async def run(context: "zmq.Context[Any]") -> tuple[int, ...]:
        listening = make_socket(context, zmq.ROUTER)
        listening.bind(f"ipc://{tmp_path / 'a'}")
        done = asyncio.Event()

        def on_message(frames: Frames) -> None:
            link.send(frames[0], bytes(100))
            link.send(frames[0], bytes(10))
            done.set()

        link = ZmqLink(listening, on_message)
        link.heard = heard = Heard()
        with context.socket(zmq.DEALER) as asking:
            asking.connect(f"ipc://{tmp_path / 'a'}")
            asking.send(b"question")
            await asyncio.wait_for(done.wait(), WAIT_S)
        link.close()
        return tuple(heard.told_to().values())

    with zmq.Context() as context:
        assert asyncio.run(run(context)) == (110,)
