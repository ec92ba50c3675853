"""The shell: an effect that fails takes no other effect along."""

import asyncio
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from kvferry_daemon.config import Config
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.node import Node
from kvferry_daemon.effects import TURN_S, Effects
from kvferry_daemon.ledger import Ledger, rows_of
from kvferry_daemon.life import settings_of
from kvferry_proto import worker
from kvferry_proto.states import Role
from live import LAYOUT

SLOW_S = 0.001
CALLS = 64


class Recorder:
    """The links' side of a daemon: it notes answers, and can open no peer."""

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.answered = asyncio.Event()

    def to_worker(self, route: bytes, reply: out.WorkerReply) -> None:
        self.replies.append(reply)
        self.answered.set()

    def open_peer(self, address: str) -> None:
        raise OSError(f"no socket left for {address}")

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args: None


def test_an_effect_that_fails_does_not_silence_the_others(tmp_path: Path) -> None:
    async def run() -> list[Any]:
        config = Config(runtime_dir=tmp_path, pool_tokens=1024, window_tokens=64)
        node = Node(
            settings_of(config, "tcp://here:1", "d" * 32, 1), lambda: os.urandom(32), 1, 0.0
        )
        links = Recorder()
        effects = Effects(node, links, tmp_path)
        loop = asyncio.get_running_loop()
        effects.use_ledger(Ledger(tmp_path / "ledger.db", loop, effects.on_written, print))
        hello = worker.Hello(call=1, lock="lock", layout=LAYOUT)
        effects.feed(out.WorkerCalled(b"route", hello, lock_held=True))
        await links.answered.wait()
        receive = worker.Receive(call=2, transfer_id="t", source="tcp://there:1")
        links.answered.clear()
        effects.feed(out.WorkerCalled(b"route", receive))
        await links.answered.wait()
        effects.close()
        assert node.counters["effects_failed"] == 1
        return links.replies

    replies = asyncio.run(run())
    assert [reply.call for reply in replies] == [1, 2]


def test_what_threads_tell_behind_the_end_is_not_heard(tmp_path: Path) -> None:
    """Their events and the ledger's word come by callbacks of the loop, which still runs then."""

    async def run() -> tuple[list[Any], int]:
        config = Config(runtime_dir=tmp_path, pool_tokens=1024, window_tokens=64)
        node = Node(
            settings_of(config, "tcp://here:1", "d" * 32, 1), lambda: os.urandom(32), 1, 0.0
        )
        links = Recorder()
        effects = Effects(node, links, tmp_path)
        ledger = Ledger(tmp_path / "l.db", asyncio.get_running_loop(), effects.on_written, print)
        effects.use_ledger(ledger)
        effects.close()
        poll = worker.Poll(call=1, transfers=[worker.Watched(role=Role.SINK, transfer_id="t")])
        effects.feed(out.WorkerCalled(b"route", poll))
        effects.on_written(1 << 30)
        return links.replies, len(effects._unwritten)

    assert asyncio.run(run()) == ([], 0)


class SlowLinks(Recorder):
    """Whatever is said takes a while."""

    def to_worker(self, route: bytes, reply: out.WorkerReply) -> None:
        time.sleep(SLOW_S)
        super().to_worker(route, reply)


def test_what_waited_for_one_commit_leaves_others_their_turns(tmp_path: Path) -> None:
    async def run() -> tuple[list[Any], int, list[Any]]:
        config = Config(runtime_dir=tmp_path, pool_tokens=1024, window_tokens=64)
        settings = settings_of(config, "tcp://here:1", "d" * 32, 1)
        node, links = Node(settings, lambda: os.urandom(32), 1, 0.0), SlowLinks()
        loop = asyncio.get_running_loop()
        effects = Effects(node, links, tmp_path)
        ledger = Ledger(tmp_path / "l.db", loop, effects.on_written, print)
        effects.use_ledger(ledger)
        hello = worker.Hello(call=1, lock="lock", layout=LAYOUT)
        effects.feed(out.WorkerCalled(b"route", hello, lock_held=True))
        await links.answered.wait()
        with ledger._writing:  # so that there is one commit for all
            for call in range(2, CALLS + 1):
                send = worker.Send(call=call, transfer_id=f"t{call}")
                effects.feed(out.WorkerCalled(b"route", send))
        turns = 0
        links.answered.clear()
        await links.answered.wait()
        while len(links.replies) < CALLS // 2:  # a turn each
            turns += 1
            await asyncio.sleep(0)
        late = list(links.replies)
        effects.close()  # with what still waits
        return late, turns, links.replies

    late, turns, replies = asyncio.run(run())
    assert [reply.call for reply in replies] == list(range(1, CALLS + 1))
    assert len(late) < CALLS
    assert turns >= (CALLS // 2 - 1) // (TURN_S / SLOW_S) - 1


class LateQueue(deque[Any]):
    """The ledger's thread finds it empty; just then the last rows come, and the end."""

    def __init__(self) -> None:
        super().__init__()
        self.looked, self.go_on = threading.Event(), threading.Event()

    def __bool__(self) -> bool:
        found = len(self) > 0
        if not found and not self.looked.is_set():
            self.looked.set()
            self.go_on.wait()
        return found


def test_rows_that_come_with_the_end_are_kept(tmp_path: Path) -> None:
    async def run() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        ledger = Ledger(tmp_path / "l.db", loop, lambda _number: None, print)
        queue = ledger._queue = LateQueue()
        ledger.write((("first", b"1"),))
        queue.looked.wait()
        last = ledger.write((("last", b"1"),))
        threading.Timer(0.05, queue.go_on.set).start()
        return last, ledger.close()

    last, kept = asyncio.run(run())
    assert kept == last
    assert dict(rows_of(tmp_path / "l.db")) == {"first": b"1", "last": b"1"}
