"""What all connections of one worker share: the lock that proves it lives, the session, the pool."""

import fcntl
import itertools
import os
import secrets
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kvferry_client.board import Board
from kvferry_client.device import open_pool
from kvferry_client.views import Pool
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout
from kvferry_proto.runtime_dir import check_runtime_dir

REPEAT_S = 0.5
CALL_S = 10.0
HELLO_S = 60.0  # the first hello with a layout allocates the pool
JOINS_MAX = 3  # of one call: the daemon may be started anew while we join


class Lock:
    """A flock on a file of the runtime directory: held exactly as long as blocks may be touched."""

    def __init__(self, runtime_dir: Path) -> None:
        """Create and lock the file.

        FerryError: daemon_unreachable without a runtime directory, directory_refused if it may be
        somebody else's.
        """
        check_runtime_dir(runtime_dir)
        self.name = secrets.token_hex(16)
        self._path = runtime_dir / "workers" / self.name
        self._pid = os.getpid()
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
            os.fchmod(self._descriptor, 0o640)  # the daemon may be another user, of its group
        except OSError as error:
            raise FerryError(
                Code.DAEMON_UNREACHABLE, f"no daemon's runtime directory at {runtime_dir}: {error}"
            ) from error
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self, *, is_known: bool) -> None:
        """Say that this process touches no block any more.

        ``is_known``: the daemon has seen the file, and removes it itself.
        """
        if self._descriptor < 0 or os.getpid() != self._pid:
            return  # a child's copy of the descriptor is not its to unlock
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # at once, though a child may hold a copy
        os.close(self._descriptor)
        self._descriptor = -1
        if not is_known:
            self._path.unlink(missing_ok=True)


class Member(NamedTuple):
    """What a hello gave: the daemon's words, and its pool and status board mapped here."""

    welcome: worker.Welcome
    pool: Pool
    board: Board


class Session:
    """One worker's standing with its daemon."""

    def __init__(self, runtime_dir: Path, layout: Layout, name: str) -> None:
        self.runtime_dir = runtime_dir
        self.layout = layout
        self.name = name
        self.lock = Lock(runtime_dir)
        self.member: Member | None = None
        self.welcome: worker.Welcome | None = None  # the newest, also while we join anew
        self.joining = threading.Lock()  # one hello at a time, or there would be two sessions
        self._numbers = itertools.count(1)

    @property
    def address(self) -> str:
        """The daemon's worker socket."""
        return f"ipc://{self.runtime_dir / 'worker.sock'}"

    @property
    def board(self) -> Board | None:
        """The status board, once a daemon has said welcome."""
        member = self.member
        return None if member is None else member.board

    def next_number(self) -> int:
        """A call's number, which its answer echoes."""
        return next(self._numbers)

    def hello(self) -> worker.Hello:
        """The first call of a connection; it takes the session up if there is one."""
        member = self.member
        return worker.Hello(
            worker=self.name,
            pid=os.getpid(),
            lock=self.lock.name,
            layout=self.layout,
            session=None if member is None else member.welcome.session,
        )

    def take(self, reply: worker.Welcome | worker.Failure, hello: worker.Hello) -> Member | None:
        """Take the answer to a hello in; None: say another one. Raises FerryError if refused."""
        if isinstance(reply, worker.Welcome):
            return self._join(reply)
        code = reply.error.code
        if code == Code.WORKER_NOT_LOCKED:
            self.lock.release(is_known=True)  # the directory was made anew: so is the file
            self.lock = Lock(self.runtime_dir)
        elif code != Code.UNKNOWN_SESSION or hello.session is None:
            raise reply.error.raised()
        if self.member is not None:  # a device may have no room for the next pool beside this one
            self.member.pool.leave(Code.POOL_LOST)
        self.member = None
        return None

    def refused(self, reply: worker.Failure, hello: worker.Hello) -> None:
        """A connection that makes no calls of the worker's own could not follow the others.

        An idle worker, too, lets go of device memory that its daemon will want to allocate anew.
        """
        if reply.error.code != Code.UNKNOWN_SESSION:
            return
        member = self.member
        if member is not None and member.welcome.session == hello.session:  # not joined anew since
            member.pool.leave(Code.POOL_LOST)

    def close(self) -> None:
        """The worker is gone. Its lock stays held as long as it has a device's memory open."""
        member = self.member
        if member is None:
            self.lock.release(is_known=False)
            return
        member.board.leave()
        member.pool.leave()
        member.pool.when_closed(partial(self.lock.release, is_known=True))

    def unreachable(self, waited_s: float) -> FerryError:
        """Nobody answered."""
        return FerryError(
            Code.DAEMON_UNREACHABLE, f"no answer at {self.address} for {waited_s:g} s"
        )

    def _join(self, welcome: worker.Welcome) -> Member:
        old = self.member
        if old is not None and old.welcome.session == welcome.session:
            pool = old.pool
        else:
            check_runtime_dir(self.runtime_dir)  # it may have been made anew since, by anybody
            pool = open_pool(welcome.pool, self.layout)
        if old is not None and old.board.boot_id == welcome.boot_id:
            board = old.board
        else:
            board = Board(welcome)
            if old is not None:
                old.board.leave()
        self.member, self.welcome = Member(welcome, pool, board), welcome
        return self.member


def check_same_pool(member: Member | None, pool: Pool | None) -> None:
    """FerryError for a transfer of an earlier session: its blocks are gone.

    It is pool_lost where they were in a device's memory, and daemon_restarted else.

    ``pool`` is the one that the transfer was opened on. Without this look a worker would go on
    filling the file of a daemon that is no more.
    """
    if pool is not None and member is not None and member.pool is not pool:
        code = Code.DAEMON_RESTARTED if pool.info.device is None else Code.POOL_LOST
        raise FerryError(code, "the daemon's earlier life, its pool and transfers ended")


def waits(wait_s: float, held_s: float) -> Iterator[float]:
    """How long to wait behind each repeat of a call, ``wait_s + held_s`` in all.

    ``held_s``: what the daemon itself may let a poll wait. A thread that was not let run for long, by an
    engine that holds the GIL or a busy machine, repeats as often as any: that nobody answered while it
    slept says nothing of the daemon.
    """
    left_s = wait_s + held_s
    while left_s > 0:
        yield min(left_s, REPEAT_S + held_s)
        left_s -= REPEAT_S + held_s


def is_refused(
    reply: worker.Welcome | worker.Snapshots | worker.Failure | worker.BatchReply, code: Code
) -> bool:
    """Whether a reply is a refusal with this code."""
    return isinstance(reply, worker.Failure) and reply.error.code == code
