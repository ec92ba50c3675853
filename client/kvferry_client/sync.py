"""The blocking client, for an engine's scheduler thread."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self, Unpack

from kvferry_client.board import NOTHING_NEW, BoardTrouble, Poll
from kvferry_client.calls import ReceiveOptions, SendOptions, receive_call, send_call
from kvferry_client.connection import Connection, Heart
from kvferry_client.logic import Progress, ReceiveLogic, SendLogic, nothing_left
from kvferry_client.session import CALL_S, Session
from kvferry_client.turns import Turns
from kvferry_client.views import GpuWork, Pool, WindowView
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout

CONNECTIONS_MAX = 32  # calls under way at once, polls that wait included; more wait their turn


def connect(runtime_dir: Path | str, layout: Layout, name: str = "") -> "Client":
    """Join the daemon of a runtime directory; FerryError if it refuses or is not there."""
    return Client(Path(runtime_dir), layout, name)


class Client:
    """One worker. Threads may share it; its process holds the pool mapped until ``close``."""

    def __init__(self, runtime_dir: Path, layout: Layout, name: str = "") -> None:
        self._session = Session(runtime_dir, layout, name[:128])
        self._idle: deque[Connection] = deque()
        self._room = Turns(CONNECTIONS_MAX)
        self._closed = False
        try:
            with self._connection() as connection:
                welcome = connection.join().welcome
            self._heart = Heart(self._session, welcome.heartbeat_s)
            self._heart.start()
        except BaseException:  # an interrupt's, too: the lock must not outlive this object
            self._close_connections()
            self._session.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave. The daemon takes it as proof that this worker touches no block any more."""
        if not self._closed:
            self._heart.stop()
            self._close_connections()
            self._session.close()

    @property
    def welcome(self) -> worker.Welcome:
        """What the daemon said to the newest hello."""
        assert self._session.welcome is not None
        return self._session.welcome

    @property
    def pool(self) -> Pool:
        """The daemon's pool, as new transfers will have it."""
        assert self._session.member is not None
        return self._session.member.pool

    @property
    def board_trouble(self) -> BoardTrouble | None:
        """Why polls go by message; None if the status board is used."""
        board = self._session.board
        return None if board is None else board.trouble

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection of one's own: a poll that waits then holds up nobody else."""
        with self._room:
            if self._closed:
                raise FerryError(Code.CLIENT_CLOSED, "the client is closed")
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = Connection(self._session)
            try:
                yield connection
            finally:
                self._idle.append(connection)
                if self._closed:
                    self._close_connections()

    def _close_connections(self) -> None:
        self._closed = True
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                return  # another thread closes them

    def call(self, call: Any, wait_s: float = CALL_S, pool: Pool | None = None) -> Any:
        """Make any call of the worker socket; FerryError if it is refused or unanswered.

        ``pool``: the one that the call's transfer was opened on, if it is about a transfer.
        """
        with self._connection() as connection:
            return connection.call(call, wait_s, pool)

    def drive(self, steps: Generator[Any, Any, None], pool: Pool) -> None:
        """Run logic to its end."""
        try:
            call = next(steps)
            while True:
                if isinstance(call, GpuWork):
                    call.wait()
                    call = next(steps)
                else:
                    call = steps.send(self.call(call, pool=pool))
        except StopIteration:
            return

    def poll(self, *transfers: worker.Watched, wait_s: float = 0.0) -> worker.Snapshots:
        """Snapshots of transfers whose number is above ``after``; waits for one if told to.

        They come from the daemon's status board, where they can: what has not changed is the same
        object as before, so change none.
        """
        board = self._session.board
        if not wait_s and len(transfers) == 1 and board is not None:
            seen = board.look(transfers[0])
            if seen is not None:
                return seen.reply if seen.number > transfers[0].after else NOTHING_NEW
        poll = Poll(board, transfers, wait_s)
        reply = None if poll.call is None else self.call(poll.call)
        return poll.answer(self._session.board, reply)

    def _open(self, call: worker.Send | worker.Receive) -> tuple[worker.Snapshots, Pool]:
        with self._connection() as connection:
            return connection.call(call), connection.pool

    def send(self, transfer_id: str, **options: Unpack[SendOptions]) -> "Sending":
        """Open the source side; FerryError if it is refused."""
        call = send_call(transfer_id, options)
        reply, pool = self._open(call)
        return Sending(self, SendLogic(pool, call), reply)

    def receive(self, transfer_id: str, **options: Unpack[ReceiveOptions]) -> "Receiving":
        """Open the sink side, pulling from the daemon at ``source`` (None: from this one)."""
        call = receive_call(transfer_id, options)
        reply, pool = self._open(call)
        logic = ReceiveLogic(pool, call)
        return Receiving(self, logic, reply)


class _Transfer(Progress):
    """What both sides have in common."""

    def __init__(
        self, client: Client, logic: SendLogic | ReceiveLogic, reply: worker.Snapshots
    ) -> None:
        self.logic = logic
        self._client = client
        logic.note(reply)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        if kind is None:
            self._leave()
        else:
            self._give_up(lambda: self.abort(f"{kind.__name__}: {error}"))

    def _leave(self) -> None:
        raise NotImplementedError

    @staticmethod
    def _give_up(abort: Callable[[], None]) -> None:
        """Abort behind an exception; if the daemon is gone there is nothing to give up."""
        try:
            abort()
        except FerryError as refused:
            if not nothing_left(refused):
                raise

    def _drive(self, steps: Generator[Any, Any, None]) -> None:
        self._client.drive(steps, self.logic.pool)

    def wait(self, wait_s: float = 60.0) -> None:
        """Wait for the end without doing anything; FerryError if it failed, or after ``wait_s``."""
        until_s = monotonic() + wait_s
        while not self.logic.ended:
            left_s = until_s - monotonic()
            if left_s <= 0:
                raise FerryError(
                    Code.STALLED, f"not ended after {wait_s:g} s: {self.logic.now.stall}"
                )
            self._drive(self.logic.change(left_s))
        self.logic.raise_if_failed()

    def release(self) -> None:
        """This worker touches no block of it any more."""
        self._drive(self.logic.release())

    def abort(self, reason: str = "") -> None:
        """Give it up."""
        self._drive(self.logic.abort(reason))


class Sending(_Transfer):
    """The source side of one attempt. Leaving its block finishes it; an exception aborts it."""

    logic: SendLogic

    def _leave(self) -> None:
        if not self.logic.released:
            self.finish()

    def windows(self) -> Iterator[WindowView]:
        """Yield the room behind what is ready, again and again, until the payload is complete.

        Fill a part of it and call ``ready``.
        """
        while self.snapshot.available_tokens != self.snapshot.total_tokens:
            self._drive(self.logic.room())
            if self.logic.ended:
                return
            yield self.logic.free_window()

    def fill(
        self, first_token: int, arrays: dict[str, Any], aux: dict[str, Any] | None = None
    ) -> None:
        """Copy the next tokens in, (tokens, *shape) a plane, waiting for room; marks them ready.

        Arrays are numpy's or torch's (of a GPU, if the pool is in one). ``aux`` is told with the
        last token. Raises FerryError(bad_array) if planes, dtypes, shapes or tokens do not fit; nothing is written.
        """
        self._drive(self.logic.fill(first_token, arrays, aux))

    def ready(
        self,
        ready_tokens: int,
        total_tokens: int | None = None,
        aux: dict[str, Any] | None = None,
    ) -> None:
        """Tokens below ``ready_tokens`` are filled, and written no more."""
        self._drive(self.logic.ready(ready_tokens, total_tokens, aux))

    def finish(self, aux: dict[str, Any] | None = None) -> None:
        """The payload ends with what is ready; this worker touches its blocks no more."""
        self._drive(self.logic.finish(aux))


class Receiving(_Transfer):
    """The sink side of one attempt. Leaving its block gives the blocks back."""

    logic: ReceiveLogic

    def _leave(self) -> None:
        self._drive(self.logic.leave())

    def __iter__(self) -> Iterator[WindowView]:
        return self.windows()

    def windows(self, min_tokens: int | None = None) -> Iterator[WindowView]:
        """Yield windows to take over: full ones, or from ``min_tokens`` new tokens on.

        When the next one is asked for, the one before counts as taken over and its blocks go.
        """
        while True:
            self._drive(self.logic.next_window(min_tokens))
            if self.logic.window is None:
                return
            yield self.logic.window

    def resume(self, sent_tokens: int) -> None:
        """Tokens below ``sent_tokens`` are taken over."""
        self._drive(self.logic.resume(sent_tokens))
