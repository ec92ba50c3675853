"""The watch of memory looks at sockets of its own process, and must leave all else as it is."""

import asyncio
import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq

from kvferry_daemon.links import pressure as watch
from kvferry_daemon.links.pressure import (
    AGAIN_BYTES,
    HOARD_BYTES,
    LOOKS,
    RELIEF_LOOKS,
    RELIEF_S,
    Pressure,
    Seen,
    connections_to,
    hoarding,
)
from kvferry_daemon.links.zmq_link import ZmqLink, make_socket

WAIT_S = 5.0

TAKE = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_a_lock_on_a_file_lasts(tmp_path: Path) -> None:
    """A process loses its locks on a file with any descriptor of it that it closes: the ledger's."""
    path = tmp_path / "ledger"
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        source: Any = SimpleNamespace(endpoint="tcp://127.0.0.1:1")
        assert connections_to([source]) == []
        took = subprocess.run(
            [sys.executable, "-c", TAKE, str(path)], capture_output=True, check=False
        )
    assert b"BlockingIOError" in took.stderr


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), limits[1]))
        with suppress(OSError):
            while True:
                spare.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for one in spare:
            os.close(one)


def test_the_watch_outlives_a_time_without_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    def until_told() -> None:
        until_s = monotonic() + WAIT_S
        while not caplog.records and monotonic() < until_s:
            sleep(0.01)

    async def watched() -> bool:
        pressure = Pressure([], list, print)
        with no_descriptor_left():
            until_told()
        is_alive = pressure._thread.is_alive()
        pressure.close()
        return is_alive

    assert asyncio.run(watched())
    assert [one.getMessage() for one in caplog.records] == ["could not watch memory"]


def test_a_watch_that_fails_leaves_no_link_noting_what_it_sends() -> None:
    async def watched() -> object:
        with zmq.Context() as context:
            link = ZmqLink(make_socket(context, zmq.DEALER), print)
            source: Any = SimpleNamespace(endpoint="tcp://127.0.0.1:1", link=link)
            pressure = Pressure([], lambda: [source], print)
            with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
                pressure._watch()
            pressure.close()
            link.close()
            return link.heard

    assert asyncio.run(watched()) is None


def looks(monkeypatch: pytest.MonkeyPatch, memory: Iterator[int]) -> int:
    """How often it looks at memory, after some was cut, before it may cut again."""
    waited: list[float] = []
    stopping = SimpleNamespace(wait=waited.append)
    monkeypatch.setattr(watch, "own_bytes", partial(next, memory))
    Pressure._rest(cast(Any, SimpleNamespace(_stopping=stopping)))
    assert sum(waited) <= RELIEF_S + 1e-6
    return len(waited)


def test_it_looks_again_at_once_while_memory_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had 16 addresses poured from the next one while the watch slept."""
    assert looks(monkeypatch, repeat(AGAIN_BYTES)) == RELIEF_LOOKS
    assert looks(monkeypatch, count(100 * AGAIN_BYTES, -AGAIN_BYTES)) == RELIEF_LOOKS
    assert looks(monkeypatch, count(0, AGAIN_BYTES)) == 1
    falls_and_rises = chain([9 * AGAIN_BYTES, 2 * AGAIN_BYTES], count(3 * AGAIN_BYTES, AGAIN_BYTES))
    assert looks(monkeypatch, falls_and_rises) == 2


def test_it_sees_that_memory_grows_where_what_was_freed_hides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next address fills first what the C library kept of the one before."""
    kept = [100 * AGAIN_BYTES]  # until it is given back
    monkeypatch.setattr(watch, "give_back", kept.clear)
    used = count(0, AGAIN_BYTES)
    assert looks(monkeypatch, (max([*kept, now]) for now in used)) == 2


def a_seen(source: str, unread: int, told_bytes: int) -> Seen:
    """A connection of which nothing else is known."""

    def cut(_descriptor: int, _source: str) -> None: ...

    return Seen(0, source, cut, cut, unread=unread, told_bytes=told_bytes)


def test_who_goes_on_asking_and_takes_none_is_told_from_who_stands_still() -> None:
    half = HOARD_BYTES // 2
    hog, hogs_other, hogs_heart = (
        a_seen("pid 1 of uid 0", unread, told)
        for unread, told in ((LOOKS, half), (LOOKS, half), (0, 0))
    )
    stopped = a_seen("pid 2 of uid 0", LOOKS, half)
    slow = a_seen("pid 3 of uid 0", LOOKS - 1, HOARD_BYTES)
    far = a_seen("10.0.0.7", LOOKS, HOARD_BYTES)
    seen = [hog, hogs_other, hogs_heart, stopped, slow, far]
    assert hoarding(seen) == [hog, hogs_other]
    assert hoarding([hog, stopped, slow, far]) == []
