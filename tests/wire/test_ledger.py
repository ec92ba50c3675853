"""The ledger: what is kept on the spot, what its thread keeps, and what nobody keeps any more."""

import asyncio
from pathlib import Path

import pytest
import uvloop

from kvferry_daemon import ledger as module
from kvferry_daemon.core.records import Row
from kvferry_daemon.ledger import CHECKPOINT_ROWS, ROWS_AT_ONCE, Ledger, rows_of

WAIT_S = 20.0


class Told:
    """What the ledger says on the loop."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.failed = ""
        self.said, self.gave_up = asyncio.Event(), asyncio.Event()

    def on_written(self, number: int) -> None:
        self.written.append(number)
        self.said.set()

    def on_failed(self, why: str) -> None:
        self.failed = why
        self.gave_up.set()

    async def until(self, number: int) -> None:
        """Wait for the thread's word on these rows."""
        async with asyncio.timeout(WAIT_S):
            while number not in self.written:
                self.said.clear()
                await self.said.wait()

    def ledger(self, path: Path) -> Ledger:
        return Ledger(path, asyncio.get_running_loop(), self.on_written, self.on_failed)


def row(name: str) -> tuple[Row, ...]:
    return ((name, b"1"),)


def test_a_lonely_write_is_kept_on_the_spot_and_one_that_follows_by_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONELY_S", 3600.0)

    async def run() -> list[int]:
        told = Told()
        ledger = told.ledger(tmp_path / "l.db")
        assert ledger.write(row("lonely"), at_once=True) == ledger.kept == 1
        assert ledger.write(row("next"), at_once=True) == 2
        await told.until(2)
        ledger.close()
        return told.written

    assert uvloop.run(run()) == [2]
    assert dict(rows_of(tmp_path / "l.db")) == {"lonely": b"1", "next": b"1"}


def test_what_nobody_waits_for_is_the_threads(tmp_path: Path) -> None:
    async def run() -> list[int]:
        told = Told()
        ledger = told.ledger(tmp_path / "l.db")
        await told.until(ledger.write(row("a chunk's")))
        ledger.close()
        return told.written

    assert uvloop.run(run()) == [1]
    assert dict(rows_of(tmp_path / "l.db")) == {"a chunk's": b"1"}


def test_many_rows_do_not_hold_the_loop_up(tmp_path: Path) -> None:
    async def run() -> list[int]:
        told = Told()
        ledger = told.ledger(tmp_path / "l.db")
        rows = tuple((str(name), b"1") for name in range(ROWS_AT_ONCE + 1))
        number = ledger.write(rows, at_once=True)
        await told.until(number)
        ledger.close()
        return told.written

    assert uvloop.run(run()) == [1]
    assert len(list(rows_of(tmp_path / "l.db"))) == ROWS_AT_ONCE + 1


def test_no_row_is_kept_behind_one_that_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop itself finds room again, but a row of before is lost: what is kept has no holes."""
    monkeypatch.setattr(module, "LONELY_S", 0.0)
    monkeypatch.setattr(module, "GIVE_UP_S", 0.05)
    monkeypatch.setattr(module, "RETRY_S", 0.01)

    async def run() -> tuple[str, int]:
        told = Told()
        ledger = told.ledger(tmp_path / "l.db")
        ledger._db.execute("PRAGMA query_only=ON")
        ledger.write(row("lost"), at_once=True)
        async with asyncio.timeout(WAIT_S):
            await told.gave_up.wait()
        ledger._db.execute("PRAGMA query_only=OFF")
        ledger.write(row("behind it"), at_once=True)
        ledger.close()
        ledger._db.close()
        return told.failed, ledger.kept

    failed, kept = uvloop.run(run())
    assert "readonly" in failed
    assert kept == 0
    assert list(rows_of(tmp_path / "l.db")) == []


def test_what_the_loop_cannot_write_the_thread_writes_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)

    async def run() -> tuple[int, list[int]]:
        told, tried = Told(), asyncio.Event()
        say = asyncio.get_running_loop().call_soon_threadsafe
        monkeypatch.setattr(module.log, "warning", lambda *_words: say(tried.set))
        ledger = told.ledger(tmp_path / "l.db")
        ledger._db.execute("PRAGMA query_only=ON")
        number = ledger.write(row("late"), at_once=True)
        assert ledger.kept < number
        async with asyncio.timeout(WAIT_S):
            await tried.wait()
        assert "readonly" in ledger.failing
        ledger._db.execute("PRAGMA query_only=OFF")
        await told.until(number)
        assert not ledger.failing
        ledger.close()
        return number, told.written

    number, written = uvloop.run(run())
    assert written == [number]
    assert dict(rows_of(tmp_path / "l.db")) == {"late": b"1"}


def test_its_log_does_not_grow_though_every_write_is_the_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONELY_S", 0.0)

    async def run() -> int:
        told = Told()
        ledger = told.ledger(tmp_path / "l.db")
        for number in range(1, 20 * CHECKPOINT_ROWS // ROWS_AT_ONCE):
            body = number.to_bytes(100)  # SQLite does not write what is the same
            rows = tuple((str(name), body) for name in range(ROWS_AT_ONCE))
            ledger.write(rows, at_once=True)
            if ledger.kept < number:
                await told.until(number)
        largest = (tmp_path / "l.db-wal").stat().st_size
        ledger.close()
        return largest

    assert uvloop.run(run()) < 1 << 20
    assert len(list(rows_of(tmp_path / "l.db"))) == ROWS_AT_ONCE
