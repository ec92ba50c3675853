"""Attacks at the worker socket, of a process that is let in there."""

import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import cycle, repeat
from typing import Any

from bench.doors import MIB, Attack, Target, ask, pour, together
from bench.zmtp import MORE, frame
from kvferry_client import Dtype, Layout, Plane
from kvferry_client.connection import Connection, Heart
from kvferry_client.session import Session
from kvferry_proto import worker
from kvferry_proto.errors import FerryError
from kvferry_proto.fields import AUX_BYTES_MAX
from kvferry_proto.states import Role

BEAT_S = 1.0
POURING = 8  # connections
CONNECTIONS = 100  # of the 128 that a process may have
LARGE = Layout(
    planes=(Plane(name="kv", dtype=Dtype.UINT8),), aux=("a", "b", "c", "d"), block_size_tokens=1
)
LARGE_AUX: dict[str, int | float | str | bytes] = {
    name: bytes(AUX_BYTES_MAX // len(LARGE.aux)) for name in LARGE.aux
}
AUX_WORKERS = 5  # four of them have as much as there is for all
AUX_KEPT = AUX_WORKERS * 300  # of which 255 of each worker fit
WATCHED = 4000  # transfers, in each poll that waits
POLL_S = 0.5
NEVER = 1 << 40  # a snapshot that does not come
SESSIONS = 500
FILES = 20_000


class Hog:
    """A worker with a session; whatever it is told does not trouble it."""

    def __init__(self, target: Target, layout: Layout = LARGE) -> None:
        self.session = Session(target.directory, layout, "attacker")
        self._connection = Connection(self.session)
        self._connection.join()
        Heart(self.session, BEAT_S).start()

    @property
    def hello(self) -> bytes:
        """What takes the session up on another connection."""
        return worker.CALLS.encode(self.session.hello())

    def call(self, call: Any) -> None:
        """Make a call, and wait for what comes of it."""
        with suppress(FerryError):
            self._connection.call(call)


def a_send(name: str, aux: dict[str, int | float | str | bytes] | None = None) -> worker.Send:
    """One more transfer, as small as they come but for its aux values."""
    return worker.Send(transfer_id=name, window_tokens=1, aux=aux)


def ends_of(name: str) -> list[worker.Abort | worker.Release]:
    """What gives it up and forgets it."""
    return [
        worker.Abort(transfer_id=name, role=Role.SOURCE),
        worker.Release(transfer_id=name, role=Role.SOURCE),
    ]


def messages(target: Target) -> None:
    """Calls without a pause, from four connections' worth of frames at once."""
    pour(target.worker, repeat(frame(worker.CALLS.encode(worker.Heartbeat()), 0) * 1000))


def full_batch() -> bytes:
    """Calls that fill a message, and take long to read."""
    watched = [worker.Watched(role=Role.SOURCE, transfer_id="t" * 12)] * 60
    return worker.CALLS.encode(worker.Batch(calls=[worker.Poll(transfers=watched)] * 200))


def full_messages(target: Target) -> None:
    """Messages that take long to read, of many connections, each of which takes its answers."""
    hello, batch = Hog(target).hello, full_batch()
    ask(target.worker, repeat(batch), hello, connections=CONNECTIONS, at_once=2, patience_s=30)


def full_messages_poured(target: Target) -> None:
    """The same, on some connections that do not wait for answers."""
    hello, batch = frame(Hog(target).hello, 0), frame(full_batch(), 0)
    job = partial(pour, target.worker, repeat(batch), hello, reads=True)
    together([job] * POURING)


def endless_to_worker(target: Target) -> None:
    """One message that has no end."""
    pour(target.worker, repeat(frame(os.urandom(MIB), MORE)))


def frames(target: Target) -> None:
    """Messages of 300,000 frames."""
    pour(target.worker, repeat(frame(b"x", MORE) * 300_000 + frame(b"x", 0)))


def unread_by_worker(target: Target) -> None:
    """Polls of a worker who never reads an answer, each of which nearly fills a frame."""
    hog = Hog(target)
    names = ("unread-0", "unread-1", "unread-2")
    for name in names:
        hog.call(a_send(name, LARGE_AUX))
    watched = [worker.Watched(role=Role.SOURCE, transfer_id=name) for name in names]
    poll = frame(worker.CALLS.encode(worker.Poll(transfers=watched)), 0)
    job = partial(pour, target.worker, repeat(poll * 100), frame(hog.hello, 0))
    together([job] * POURING)


def huge_answers(target: Target) -> None:
    """Polls that name one large transfer thousands of times, and batches about it."""
    hog = Hog(target)
    hog.call(a_send("huge", LARGE_AUX))
    watched = [worker.Watched(role=Role.SOURCE, transfer_id="huge")] * worker.POLL_MAX
    again: list[worker.Verb] = [worker.Ready(transfer_id="huge", ready_tokens=0)]
    poll = worker.CALLS.encode(worker.Poll(transfers=watched))
    batch = worker.CALLS.encode(worker.Batch(calls=again * worker.BATCH_MAX))
    ask(target.worker, cycle((poll, batch)), hog.hello)


def waiting_polls(target: Target) -> None:
    """Polls that wait, each for thousands of transfers; most are refused, the others run out."""
    hog = Hog(target)
    names = [f"waiting-{number}" for number in range(WATCHED)]
    for first in range(0, WATCHED, worker.BATCH_MAX):
        calls: list[worker.Verb] = [
            a_send(name) for name in names[first : first + worker.BATCH_MAX]
        ]
        hog.call(worker.Batch(calls=calls))
    watched = [worker.Watched(role=Role.SOURCE, transfer_id=name, after=NEVER) for name in names]
    poll = worker.CALLS.encode(worker.Poll(transfers=watched, wait_s=POLL_S))
    pour(target.worker, repeat(frame(poll, 0)), frame(hog.hello, 0), reads=True)


def open_and_abort(target: Target) -> None:
    """Transfers with large aux values, opened and given up."""
    hog = Hog(target)

    def lives() -> Iterator[bytes]:
        for number in itertools.count():
            name = f"short-{number}"
            yield worker.CALLS.encode(a_send(name, LARGE_AUX))
            yield worker.CALLS.encode(worker.Batch(calls=list(ends_of(name))))

    ask(target.worker, lives(), hog.hello)


def aux(target: Target) -> None:
    """Live transfers with large aux values, of several workers, until they are refused and on."""
    hogs = [Hog(target) for _ in range(AUX_WORKERS)]
    for number, hog in enumerate(cycle(hogs)):
        hog.call(a_send(f"aux-{number}", LARGE_AUX))
        if number >= AUX_KEPT:
            for end in ends_of(f"aux-{number - AUX_KEPT}"):
                hog.call(end)


def transfers(target: Target) -> None:
    """Transfers without an end."""
    hog = Hog(target)

    def batches() -> Iterator[bytes]:
        for first in itertools.count(0, worker.BATCH_MAX):
            some = range(first, first + worker.BATCH_MAX)
            calls: list[worker.Verb] = [a_send(f"more-{number}") for number in some]
            yield worker.CALLS.encode(worker.Batch(calls=calls))

    ask(target.worker, batches(), hog.hello)


def sessions(target: Target) -> None:
    """Sessions without an end, of a process that lives."""
    many = [Session(target.directory, LARGE, "attacker") for _ in range(SESSIONS)]
    ask(target.worker, cycle([worker.CALLS.encode(one.hello()) for one in many]))


def sources(target: Target) -> None:
    """Transfers, each from a source of its own that is not there."""
    hog = Hog(target)
    for number in itertools.count(1 << 24):
        there = ".".join(map(str, (127, *number.to_bytes(4, "big")[1:])))
        name, address = f"from-{number}", f"tcp://{there}:9"
        hog.call(worker.Receive(transfer_id=name, source=address, window_tokens=1))


def lock_files(target: Target) -> None:
    """Files in `workers/` that nobody holds; only so many, or they would fill the machine."""
    for number in itertools.cycle(range(FILES)):
        with suppress(OSError):
            (target.directory / "workers" / f"{number:032x}").touch()


ATTACKS: tuple[Attack, ...] = (
    messages,
    full_messages,
    full_messages_poured,
    endless_to_worker,
    frames,
    unread_by_worker,
    huge_answers,
    waiting_polls,
    open_and_abort,
    aux,
    transfers,
    sessions,
    sources,
    lock_files,
)
