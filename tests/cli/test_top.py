"""`kvferry top` against a live daemon: its keys, what it shows, and one real terminal."""

import asyncio
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Self

import pyte
import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from cli.processes import kvferry
from cli.test_verbs import half_way
from kvferry_client import connect
from kvferry_daemon.output import Exit
from kvferry_daemon.top.app import Top
from kvferry_daemon.top.rates import Rates, Side, side_of
from kvferry_proto import worker
from kvferry_proto.states import Role, State
from live import BLOCK, LAYOUT, WAIT_S, LiveDaemon, RawWorker

LOST = "tcp://127.0.0.1:1"
STRANGE = "x[red]y[/red]"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LiveDaemon]:
    """A daemon of its own for each test: they abort, and end it."""
    with LiveDaemon(tmp_path / "a", lost_s=60) as live:  # raw workers do not beat
        yield live
        assert "Traceback" not in live.log()


def driven(daemon: LiveDaemon, drive: Callable[[Pilot[None]], Awaitable[None]]) -> None:
    """Run it without a terminal, and let ``drive`` press its keys."""

    async def run() -> None:
        async with Top(daemon.directory).run_test(size=(140, 40)) as pilot:
            await drive(pilot)

    asyncio.run(run())


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Look until it is so."""
    by = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < by, shown(pilot)
        await pilot.pause(0.02)


def column(pilot: Pilot[None], number: int) -> list[str]:
    """What a column of the table shows."""
    table = pilot.app.query_one("#transfers", DataTable)
    return [str(table.get_row_at(row)[number]) for row in range(table.row_count)]


def said(pilot: Pilot[None], name: str) -> str:
    return str(pilot.app.screen.query_one(name, Static).content)


def shown(pilot: Pilot[None]) -> str:
    return "\n".join([said(pilot, "#head"), said(pilot, "#order"), *column(pilot, 0)])


def test_it_shows_the_daemon_its_pools_peers_and_transfers(daemon: LiveDaemon) -> None:
    async def drive(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: len(column(pilot, 0)) == 4)
        assert f"pid {daemon.process.pid}" in said(pilot, "#head")
        assert "largest free run" in said(pilot, "#pools")
        assert f"peer {LOST} connecting" in said(pilot, "#peers")
        assert sorted(column(pilot, 0)) == ["far", "moved", "moved", STRANGE]
        assert "waiting for source" in column(pilot, 4)
        assert str(BLOCK) in column(pilot, 5)

    with RawWorker(daemon.directory) as one, connect(daemon.directory, LAYOUT, "other") as other:
        half_way(one, "moved")
        one.snapshot(worker.Receive(transfer_id=STRANGE))
        other.receive("far", source=LOST)
        driven(daemon, drive)


def test_words_filter_and_an_order_sorts(daemon: LiveDaemon) -> None:
    async def drive(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: len(column(pilot, 0)) == 3)
        await pilot.press("f", *"moved sink", "enter")
        await until(pilot, lambda: len(column(pilot, 0)) == 1)
        assert (column(pilot, 0), column(pilot, 1)) == (["moved"], ["sink"])
        assert "1 of 3 transfers, most idle first; with 'moved sink'" in said(pilot, "#order")
        await pilot.press("escape")
        await until(pilot, lambda: len(column(pilot, 0)) == 3)
        await pilot.press("s")
        await until(pilot, lambda: "most age first" in said(pilot, "#order"))
        assert column(pilot, 0)[-1] == "early", "the youngest is last"
        await pilot.press("s")
        await until(pilot, lambda: column(pilot, 0)[-1] == "early" and column(pilot, 5)[0] != "0")

    with RawWorker(daemon.directory) as one:
        half_way(one, "moved")
        one.snapshot(worker.Receive(transfer_id="early"))
        driven(daemon, drive)


def test_the_marked_transfer_is_explained(daemon: LiveDaemon) -> None:
    async def drive(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: column(pilot, 0) == ["slow", "slow"])
        await pilot.press("e")
        await until(pilot, lambda: bool(pilot.app.screen.query("#story")))
        told = said(pilot, "#story")
        assert "slow, sink, attempt 0: Transferring, 16 of 100 tokens" in told
        assert "what usually helps: " in told
        await pilot.press("escape")
        await until(pilot, lambda: not pilot.app.screen.query("#story"))

    with RawWorker(daemon.directory) as one:
        half_way(one, "slow")
        driven(daemon, drive)


@pytest.mark.parametrize(("key", "states"), [("y", {State.FAILED}), ("n", {State.BOOTSTRAPPING})])
def test_an_abort_asks_first(daemon: LiveDaemon, key: str, states: set[State]) -> None:
    async def drive(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: column(pilot, 0) == ["stuck"])
        await pilot.press("a")
        await until(pilot, lambda: bool(pilot.app.screen.query("#question")))
        assert said(pilot, "#question") == "Abort stuck, attempt 2?  (y/n)"
        await pilot.press(key)
        await until(pilot, lambda: not pilot.app.screen.query("#question"))
        await pilot.app.workers.wait_for_complete()
        assert {row.snapshot.state for row in daemon.transfers("stuck")} == states

    with RawWorker(daemon.directory) as one:
        one.snapshot(worker.Receive(transfer_id="stuck", attempt=2))
        driven(daemon, drive)


def test_rows_of_a_daemon_that_is_gone_are_marked_as_old(daemon: LiveDaemon) -> None:
    async def drive(pilot: Pilot[None]) -> None:
        table = pilot.app.query_one("#transfers", DataTable)
        await until(pilot, lambda: column(pilot, 0) == ["waits"])
        assert not table.has_class("old")
        daemon.pause()
        await until(pilot, lambda: "daemon_unreachable" in said(pilot, "#head"))
        first, second = said(pilot, "#head").splitlines()
        assert "daemon_unreachable" in first
        assert second == "looking again every second"
        assert table.has_class("old")
        assert "as it was" in said(pilot, "#order")
        daemon.resume()
        await until(pilot, lambda: "pid " in said(pilot, "#head"))
        assert not table.has_class("old")
        assert "as it was" not in said(pilot, "#order")

    with RawWorker(daemon.directory) as one:
        one.snapshot(worker.Receive(transfer_id="waits"))
        driven(daemon, drive)


def test_it_goes_on_when_the_daemon_comes_back(daemon: LiveDaemon) -> None:
    async def drive(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "pid " in said(pilot, "#head"))
        daemon.process.send_signal(signal.SIGTERM)
        await until(pilot, lambda: "daemon_unreachable" in said(pilot, "#head"))
        with daemon.again() as next_life:
            await until(pilot, lambda: f"pid {next_life.process.pid}" in said(pilot, "#head"))

    driven(daemon, drive)


def test_rates_are_per_second_and_begin_anew_with_a_life(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        half_way(one, "moved")
        status, rows = daemon.status(), daemon.transfers("moved")
    sink = Side(Role.SINK, "moved", 0)
    assert sink in map(side_of, rows)
    rates = Rates()
    none_yet = status.model_copy(update={"counters": {}})
    rates.look(10.0, none_yet, [])
    rates.look(12.0, status, rows)
    assert rates.of("sink_opened", "source_opened") == 1.0, "two in two seconds"
    assert rates.tokens_of(sink) == 0.0, "it was not there before"
    rates.look(13.0, status.model_copy(update={"boot_id": "cd" * 16}), rows)
    assert rates.of("sink_opened") == 0.0


def test_a_real_terminal_gets_a_screen_and_its_own_back(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one, Terminal(daemon.directory) as terminal:
        half_way(one, "on-a-tty")
        terminal.until(r"on-a-tty +sink +0 +Transferring +waiting for input +16 +100")
        terminal.until(r"pool host")
        terminal.type("e")
        terminal.until(r"what usually helps")
        terminal.type("q")
        terminal.until(r"transfers, most idle first")
        terminal.type("q")
        assert terminal.process.wait(WAIT_S) == 0
        terminal.read()
        assert terminal.said.endswith(b"\x1b[?25h") or b"\x1b[?1049l" in terminal.said


class Terminal:
    """A pseudo terminal with a program in it, and what its screen shows."""

    def __init__(self, directory: Path) -> None:
        self.screen = pyte.Screen(140, 40)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
        command = [sys.executable, "-m", "kvferry_daemon", "top", "--runtime-dir", str(directory)]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(slave)
        self.said = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read(self) -> None:
        """Take in what is there."""
        while select.select([self._master], [], [], 0.05)[0]:
            try:
                said = os.read(self._master, 1 << 16)
            except OSError:  # how a terminal says that nobody writes any more
                return
            self.said += said
            self._stream.feed(said)

    def until(self, pattern: str) -> None:
        """Look until the screen shows it."""
        by = time.monotonic() + WAIT_S
        while not any(re.search(pattern, line) for line in self.screen.display):
            assert time.monotonic() < by, "\n".join(self.screen.display)
            self.read()


def test_without_a_terminal_it_says_what_to_use(daemon: LiveDaemon) -> None:
    done = kvferry("top", "--runtime-dir", daemon.directory)
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    assert "`kvferry transfers --watch`" in done.stderr


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [("missing", 2, "pip install 'kvferry[top]'"), ("none", 4, "daemon_unreachable")],
)
def test_it_says_in_a_line_why_it_cannot(
    daemon: LiveDaemon, given: str, code: int, words: str
) -> None:
    begin = "import sys, importlib.util as u\n"
    if given == "missing":
        begin += "find = u.find_spec; u.find_spec = lambda n: None if n == 'textual' else find(n)\n"
    where = daemon.directory if given == "missing" else daemon.directory / "not"
    run = f"from kvferry_daemon.cli import main; main(['top', '--runtime-dir', {str(where)!r}])"
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", begin + run],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    os.close(slave)
    os.close(master)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert words in line
