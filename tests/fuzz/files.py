"""Files that a daemon finds when it starts, and a board that a client maps, changed anywhere.

Whatever a ledger's file holds, the daemon begins, and can keep rows from then on. Whatever a
board's file holds, a client sees what was shown there, or asks the daemon.
"""

import asyncio
import shutil
import tempfile
from pathlib import Path
from random import Random

from fuzz.mutate import changed_bytes
from fuzz.seeds import told
from kvferry_client.board import Board as ReadBoard
from kvferry_daemon.config import Config
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.records import RECORDS, PoolRecord
from kvferry_daemon.ledger import Ledger, rows_of
from kvferry_daemon.life import DAEMON, Life, begin, settings_of
from kvferry_daemon.memory.board import Board
from kvferry_daemon.runtime_dir import RuntimeDir
from kvferry_proto import worker
from kvferry_proto.states import Role, State

BOOT_ID = "ab" * 16
WELCOME = worker.Welcome(
    version=1, boot_id=BOOT_ID, session="0" * 32, heartbeat_s=1, peer_address="",
    pool=worker.PoolInfo(path="/none", blocks=1, block_bytes=1, window_tokens=1),
)  # fmt: skip
SLOT = worker.BoardSlot(index=1, key=77)
WATCHED = worker.Watched(role=Role.SINK, transfer_id="t", attempt=0)
NOTED, SHOWN = (
    worker.Snapshot(
        role=Role.SINK, transfer_id="t", attempt=0, snapshot=number, state=State.TRANSFERRING,
        sent_tokens=number, slot=SLOT,
    )
    for number in (1, 2)
)  # fmt: skip


class Files:
    """A runtime directory whose ledger is that of a daemon which was killed, or stopped."""

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self._root = Path(tempfile.mkdtemp(prefix="kvferry-fuzz-"))
        self._loop = asyncio.new_event_loop()
        self._config = Config(runtime_dir=self._root / "d")
        self._directory = RuntimeDir(self._config.runtime_dir)
        self._ledgers = self._good_ledgers()
        self._board = self._root / "board"
        self._shown = self._good_board()

    def __call__(self) -> bytes:
        if self._dice.random() < 0.5:
            data = changed_bytes(self._shown, self._dice)
            self.check_board(data)
            return data
        data = self._put_changed()
        self.check_ledger()
        return data

    def close(self) -> None:
        """Leave nothing behind."""
        self._directory.close(keep=False)
        self._loop.close()
        shutil.rmtree(self._root)

    def good_ledger(self) -> Life:
        """Begin with a ledger that nobody has changed."""
        self._put(self._ledgers[0])
        return begin(self._directory, self._config, 0.0)

    def changed_ledger(self) -> Life:
        """Begin with one that is not what it was."""
        self._put_changed()
        return begin(self._directory, self._config, 0.0)

    def check_ledger(self) -> None:
        life = begin(self._directory, self._config, 0.0)
        if life.past is not None:
            settings = settings_of(self._config, "", life.daemon_id, life.number)
            node = Node(settings, lambda: b"\0" * 32, 0, 0.0)
            node.handle(out.Restored(life.past), 0.0)
            for now_s in (0.0, 0.3, 5.0, 100.0):
                node.handle(out.TimePassed(), now_s)
                node.check()
        row = RECORDS.encode(life.record(1))
        ledger = self._open()
        ledger.write(((DAEMON, row),))
        assert ledger.close() == 1, f"nothing is kept for the next life: {ledger.failing}"
        assert dict(rows_of(self._directory.ledger))[DAEMON] == row

    def check_board(self, data: bytes) -> None:
        self._board.write_bytes(data)
        pool = WELCOME.pool.model_copy(update={"board": str(self._board)})
        board = ReadBoard(WELCOME.model_copy(update={"pool": pool}))
        board.is_kept()
        board.note(NOTED, 0)
        seen = board.look(WATCHED)
        assert seen is None or seen.snapshot in (NOTED, SHOWN), seen

    def _put_changed(self) -> bytes:
        files = dict(self._dice.choice(self._ledgers))
        which = self._dice.choice([name for name, data in files.items() if data])
        files[which] = changed_bytes(files[which], self._dice)
        self._put(files)
        return files[which]

    def _put(self, files: dict[str, bytes]) -> None:
        for end, data in files.items():
            path = self._directory.ledger.with_name(self._directory.ledger.name + end)
            path.unlink(missing_ok=True)
            if data:
                path.write_bytes(data)
        for path, size in self._pools.items():  # of those that were removed with a ledger
            with path.open("ab") as file:
                file.truncate(size)

    def _open(self) -> Ledger:
        nothing = lambda _: None
        return Ledger(self._directory.ledger, self._loop, nothing, nothing)

    def _good_ledgers(self) -> list[dict[str, bytes]]:
        """Files by how their names end."""
        life = begin(self._directory, self._config, 0.0)
        rows = dict(told().rows) | {DAEMON: RECORDS.encode(life.record(1))}
        pools = [one for one in map(RECORDS.decode, rows.values()) if isinstance(one, PoolRecord)]
        self._pools = {
            self._directory.pools / one.pool_id: one.blocks * one.layout.block_bytes
            for one in pools
        }
        path = self._directory.ledger
        log = path.with_name(f"{path.name}-wal")
        ledger = self._open()
        ledger.write(tuple(rows.items()), at_once=True)
        assert ledger.kept == 1
        killed = {"": path.read_bytes(), "-wal": log.read_bytes()}
        ledger.close()
        return [{"": path.read_bytes(), "-wal": b""}, killed]

    def _good_board(self) -> bytes:
        board = Board.create(self._board, 4, BOOT_ID, 1e9)
        board.show(SHOWN)
        return self._board.read_bytes()
