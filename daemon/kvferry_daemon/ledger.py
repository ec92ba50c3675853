"""What survives the daemon: rows in one SQLite file on tmpfs, written by a thread of its own.

Whatever stands in the queue when the thread looks goes into one commit, so a burst costs little
more than a single row. The file is a process's death away from us, not the machine's: nothing is
synced to a disk.
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

GATHER_S = 0.002  # where writes come faster than commits: fewer of those, each takes the GIL
RETRY_S = 0.1
GIVE_UP_S = 30.0  # of a full tmpfs; then nothing that we say could be kept
log = logging.getLogger(__name__)


class Ledger:
    """One writer; ``on_written(number)`` comes on the loop once all rows up to it are kept."""

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
        self._number = 0
        self._written = 0
        self._kept = 0  # rows up to this number
        self.commits = 0
        self._db = _open(path)
        self._thread = threading.Thread(target=self._run, name="kvferry-ledger", daemon=True)
        self._thread.start()

    def write(self, rows: tuple[Row, ...]) -> int:
        """Put rows down; return the number under which ``on_written`` will tell of them."""
        self._number += 1
        self._queue.append(rows)
        self._wake.set()
        return self._number

    def close(self) -> int:
        """Write what is left, then let go of the file; return up to which number rows are kept."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        return self._kept

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing  # looked at first: all that was written before it is there
            while self._queue:
                rows: dict[str, bytes | None] = {}
                writes = len(self._queue)
                for _ in range(writes):
                    rows.update(self._queue.popleft())
                    self._written += 1
                if not self._keep(rows):
                    return
                self._kept = self._written
                self._tell(self._on_written, self._kept)
                if writes > 1:
                    time.sleep(GATHER_S)
            if closing:
                self._db.close()
                return

    def _keep(self, rows: dict[str, bytes | None]) -> bool:
        start_s = time.monotonic()
        while True:
            try:
                self._commit(rows)
                self.commits += 1
                return True
            except sqlite3.Error as error:
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
    db.execute("CREATE TABLE IF NOT EXISTS rows (name TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID")
    db.commit()
    return db


def rows_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every row of a ledger that nobody has open; sqlite3.Error or ValueError if it is damaged."""
    db = sqlite3.connect(path)
    try:
        for name, body in db.execute("SELECT name, body FROM rows"):
            if not isinstance(name, str) or not isinstance(body, bytes):
                raise ValueError(f"a row is no row: {name!r}")
            yield name, body
    finally:
        db.close()
