"""What survives the daemon: rows in one SQLite file on tmpfs.

A lonely write that somebody waits for is committed on the loop: that takes less time than to wake a
thread for it and be woken by it. All others are a thread's: whatever stands in its queue when it
looks goes into one commit, so a burst costs little more than a single row. The file is a process's
death away from us, not the machine's: nothing is synced to a disk.
"""

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from kvferry_daemon.core.records import Row

LONELY_S = 0.001  # since the loop's last commit: of 50 to 100 us, so a tenth of its time at most
ROWS_AT_ONCE = 64  # on the loop: they take 0.2 ms
CHECKPOINT_ROWS = 1000  # then SQLite's log is moved into its file: 2 ms, so never on the loop
CHECKPOINT_BYTES = 1 << 22
GATHER_S = 0.002  # where writes come faster than commits: fewer of those, each takes the GIL
RETRY_S = 0.1
GIVE_UP_S = 30.0  # of a full tmpfs; then nothing that we say could be kept
log = logging.getLogger(__name__)


class Ledger:
    """``on_written(number)`` comes on the loop once the thread has kept all rows up to it."""

    def __init__(
        self,
        path: Path,
        loop: asyncio.AbstractEventLoop,
        on_written: Callable[[int], None],
        on_failed: Callable[[str], None],
    ) -> None:
        """Open or make the file; raises sqlite3.Error."""
        self._loop = loop
        self._on_written = on_written
        self._on_failed = on_failed
        self._queue: deque[tuple[Row, ...]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._lonely_at_s = 0.0  # then the loop may commit again
        self._number = 0
        self._written = 0
        self.kept = 0  # rows up to this number
        self.failing = ""  # why rows cannot be written at the moment, or any more
        self.commits = 0
        self._rows = self._bytes = 0  # since the last checkpoint
        self._writing = threading.Lock()
        self._db = _open(path)
        self._thread = threading.Thread(target=self._run, name="kvferry-ledger", daemon=True)
        self._thread.start()

    def write(self, rows: tuple[Row, ...], *, at_once: bool = False) -> int:
        """Put rows down, on the loop if they are alone and wanted ``at_once``; return their number.

        If ``kept`` has reached it they are kept already, and else ``on_written`` will tell.
        """
        self._number += 1
        if not (at_once and self._write_now(rows)):
            self._queue.append(rows)
            self._wake.set()
        return self._number

    def _write_now(self, rows: tuple[Row, ...]) -> bool:
        """Commit on the loop; False if it is the thread's to do."""
        if time.monotonic() < self._lonely_at_s or self._closing or len(rows) > ROWS_AT_ONCE:
            return False
        if not self._writing.acquire(blocking=False):
            return False
        try:
            if self.kept + 1 < self._number or self._is_checkpoint_due:
                return False  # rows before these are still to be kept, or never will be
            self._commit(dict(rows))
            self._written = self.kept = self._number
        except sqlite3.Error as error:
            log.debug("left to the thread, which finds out whether it lasts: %s", error)
            return False
        finally:
            self._writing.release()
            self._lonely_at_s = time.monotonic() + LONELY_S
        return True

    def close(self) -> int:
        """Write what is left, then let go of the file; return up to which number rows are kept."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        return self.kept

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing  # looked at first: all that was written before it is there
            with self._writing:
                while self._queue:
                    if not self._write_queued():
                        return
            if closing:
                self._db.close()
                return

    def _write_queued(self) -> bool:
        rows: dict[str, bytes | None] = {}
        writes = len(self._queue)
        for _ in range(writes):
            rows.update(self._queue.popleft())
            self._written += 1
        if not self._keep(rows):
            return False
        self.kept = self._written
        self._tell(self._on_written, self.kept)
        if self._is_checkpoint_due:
            self._checkpoint()
        if writes > 1:
            time.sleep(GATHER_S)
        return True

    def _keep(self, rows: dict[str, bytes | None]) -> bool:
        start_s = time.monotonic()
        while True:
            try:
                self._commit(rows)
                self.failing = ""
                return True
            except sqlite3.Error as error:
                self.failing = str(error)
                if self._closing or time.monotonic() - start_s >= GIVE_UP_S:
                    self._tell(self._on_failed, str(error))
                    return False
                log.warning("the ledger cannot be written, trying again: %s", error)
                time.sleep(RETRY_S)

    def _commit(self, rows: dict[str, bytes | None]) -> None:
        with self._db:
            self._db.executemany(
                "INSERT INTO rows VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET body = excluded.body",
                [(name, body) for name, body in rows.items() if body is not None],
            )
            self._db.executemany(
                "DELETE FROM rows WHERE name = ?",
                [(name,) for name, body in rows.items() if body is None],
            )
        self.commits += 1
        self._rows += len(rows)
        self._bytes += sum([len(body) for body in rows.values() if body is not None])

    @property
    def _is_checkpoint_due(self) -> bool:
        return self._rows >= CHECKPOINT_ROWS or self._bytes >= CHECKPOINT_BYTES

    def _checkpoint(self) -> None:
        """Let SQLite's log begin anew; one that finds no room goes on growing, and tries again."""
        self._rows = self._bytes = 0
        try:
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            log.warning("the ledger's log cannot be moved into its file yet: %s", error)

    def _tell(self, what: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *args)
        except RuntimeError:
            log.debug("the loop is closed: nobody waits for it")


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False)
    db.execute("PRAGMA locking_mode=EXCLUSIVE")  # also: no shared-memory file beside it
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=OFF")
    db.execute("PRAGMA wal_autocheckpoint=0")  # we say when
    db.execute("CREATE TABLE IF NOT EXISTS rows (name TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID")
    db.commit()
    return db


def rows_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every row of a ledger that nobody has open; sqlite3.Error or ValueError if it is damaged.

    One that can be read but not written is, too: its daemon would end with the first row to keep.
    """
    db = sqlite3.connect(path)
    try:
        (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()  # 60 ms for 60 MB
        if found != "ok":
            raise ValueError(f"SQLite says: {found}")
        db.execute("DELETE FROM rows WHERE false")  # begins to write, and is taken back
        for name, body in db.execute("SELECT name, body FROM rows"):
            if not isinstance(name, str) or not isinstance(body, bytes):
                raise ValueError(f"a row is no row: {name!r}")
            yield name, body
    finally:
        db.close()
