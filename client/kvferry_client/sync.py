"""The blocking client, for an engine's scheduler thread."""

from collections.abc import Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from kvferry_client.connection import CALL_S, Connection, Heart, Session
from kvferry_client.logic import ReceiveLogic, SendLogic, restarted
from kvferry_client.views import Pool, WindowView
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout
from kvferry_proto.states import Mode


def connect(runtime_dir: Path | str, layout: Layout, name: str = "") -> "Client":
    """Join the daemon of a runtime directory; FerryError if it refuses or is not there."""
    return Client(Path(runtime_dir), layout, name)


class Client:
    """One worker. Its process holds the pool mapped until ``close``."""

    def __init__(self, runtime_dir: Path, layout: Layout, name: str = "") -> None:
        self._session = Session(runtime_dir, layout, name)
        self._connection = Connection(self._session)
        try:
            self.welcome = self._connection.hello()
            self.pool = Pool(self.welcome.pool, layout)
            self._heart = Heart(self._session, self.welcome.heartbeat_s)
        except (FerryError, OSError):
            self._connection.close()
            self._session.lock.release()
            raise
        self._heart.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave. The daemon takes it as proof that this worker touches no block any more."""
        self._heart.stop()
        self._connection.close()
        self._session.lock.release()

    def another_connection(self) -> Connection:
        """One more connection of the same session; whoever asks for it closes it."""
        return Connection(self._session)

    def call(self, call: Any, wait_s: float = CALL_S) -> Any:
        """Make any call of the worker socket; FerryError if it is refused or unanswered."""
        try:
            return self._connection.call(call, wait_s)
        except FerryError as error:
            self.note(error)
            raise

    def note(self, error: FerryError) -> None:
        """After a restart of the daemon, map the new pool; transfers opened before are gone."""
        if error.code is Code.DAEMON_RESTARTED and self._session.welcome is not None:
            self.welcome = self._session.welcome
            self.pool = Pool(self.welcome.pool, self._session.layout)

    def drive(self, steps: Generator[Any, Any, None]) -> None:
        """Run logic to its end."""
        try:
            call = next(steps)
            while True:
                call = steps.send(self.call(call))
        except StopIteration:
            return

    def poll(self, *transfers: worker.Watched, wait_s: float = 0.0) -> worker.Snapshots:
        """Snapshots of transfers whose number is above ``after``; waits for one if told to."""
        reply = self.call(worker.Poll(transfers=list(transfers), wait_s=wait_s))
        assert isinstance(reply, worker.Snapshots), reply
        return reply

    def send(
        self,
        transfer_id: str,
        *,
        attempt: int = 0,
        start_tokens: int = 0,
        total_tokens: int | None = None,
        aux: dict[str, Any] | None = None,
        window_tokens: int | None = None,
    ) -> "Sending":
        """Open the source side; FerryError if it is refused."""
        call = worker.Send(
            transfer_id=transfer_id,
            attempt=attempt,
            start_tokens=start_tokens,
            total_tokens=total_tokens,
            aux=aux,
            window_tokens=window_tokens,
        )
        sending = Sending(self, SendLogic(self.pool, transfer_id, attempt))
        self.drive(sending.logic.ask(call))
        return sending

    def receive(
        self,
        transfer_id: str,
        *,
        source: str | None = None,
        attempt: int = 0,
        mode: Mode = Mode.CONSUME,
        start_tokens: int = 0,
        window_tokens: int | None = None,
        max_tokens: int | None = None,
    ) -> "Receiving":
        """Open the sink side, pulling from the daemon at ``source`` (None: from this one)."""
        call = worker.Receive(
            transfer_id=transfer_id,
            attempt=attempt,
            source=source,
            mode=mode,
            start_tokens=start_tokens,
            window_tokens=window_tokens,
            max_tokens=max_tokens,
        )
        receiving = Receiving(self, ReceiveLogic(self.pool, transfer_id, attempt))
        receiving.logic.taken_tokens = start_tokens
        self.drive(receiving.logic.ask(call))
        return receiving


class Sending:
    """The source side of one attempt. Leaving its block finishes it; an exception aborts it."""

    def __init__(self, client: Client, logic: SendLogic) -> None:
        self.logic = logic
        self._drive = client.drive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        if kind is None:
            if not self.logic.released:
                self.finish()
            return
        _give_up(self.abort, f"{kind.__name__}: {error}")

    @property
    def snapshot(self) -> worker.Snapshot:
        """The newest snapshot."""
        return self.logic.now

    def windows(self) -> Iterator[WindowView]:
        """Yield the room behind what is ready, again and again, until the payload is complete.

        Fill a part of it and call ``ready``.
        """
        while self.snapshot.available_tokens != self.snapshot.total_tokens:
            self._drive(self.logic.room())
            if self.logic.ended:
                return
            yield self.logic.view(self.snapshot.available_tokens, self.logic.edge_tokens)

    def fill(
        self, first_token: int, arrays: dict[str, NDArray[Any]], aux: dict[str, Any] | None = None
    ) -> None:
        """Copy the next tokens in, (tokens, *shape) a plane, waiting for room; marks them ready.

        ``aux`` is told with the last of them. ValueError if planes or tokens do not fit.
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

    def wait(self, wait_s: float = 60.0) -> None:
        """Wait until the sink has everything; FerryError if it failed, or after ``wait_s``."""
        _wait(self._drive, self.logic, wait_s)

    def abort(self, reason: str = "") -> None:
        """Give it up."""
        self._drive(self.logic.abort(reason))


class Receiving:
    """The sink side of one attempt. Leaving its block gives the blocks back."""

    def __init__(self, client: Client, logic: ReceiveLogic) -> None:
        self.logic = logic
        self._drive = client.drive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        if kind is None:
            self._drive(self.logic.leave())
        else:
            _give_up(self.abort, f"{kind.__name__}: {error}")

    def __iter__(self) -> Iterator[WindowView]:
        return self.windows()

    @property
    def snapshot(self) -> worker.Snapshot:
        """The newest snapshot."""
        return self.logic.now

    @property
    def sent_tokens(self) -> int:
        """Tokens that have arrived."""
        return self.snapshot.sent_tokens

    @property
    def total_tokens(self) -> int | None:
        """Length of the payload, once known."""
        return self.snapshot.total_tokens

    @property
    def aux(self) -> dict[str, Any] | None:
        """The payload's aux values, once known."""
        return self.snapshot.aux

    @property
    def ended(self) -> bool:
        """Whether the transfer is over."""
        return self.logic.ended

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

    def wait(self, wait_s: float = 60.0) -> None:
        """Wait for the end without taking over; FerryError if it failed, or after ``wait_s``."""
        _wait(self._drive, self.logic, wait_s)

    def release(self) -> None:
        """This worker touches no block of it any more."""
        self._drive(self.logic.release())

    def abort(self, reason: str = "") -> None:
        """Give it up."""
        self._drive(self.logic.abort(reason))


def _wait(drive: Any, logic: SendLogic | ReceiveLogic, wait_s: float) -> None:
    from time import monotonic

    until_s = monotonic() + wait_s
    while not logic.ended:
        if monotonic() >= until_s:
            raise FerryError(Code.STALLED, f"not ended after {wait_s:g} s: {logic.now.stall}")
        drive(logic.change())
    logic.raise_if_failed()


def _give_up(abort: Any, reason: str) -> None:
    """Abort behind an exception; if the daemon is gone there is nothing to give up."""
    try:
        abort(reason)
    except FerryError as error:
        if not restarted(error):
            raise
