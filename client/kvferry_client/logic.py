"""What sending and receiving do, as generators that yield calls and are sent replies.

Both clients drive them: one blocks on each call, the other awaits it. Nothing here waits itself.
What they yield may also be a GpuWork, which is to be waited for.
"""

from collections.abc import Generator
from typing import Any

from kvferry_client.calls import made, reason_of
from kvferry_client.views import Pool, WindowView, runs_of
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import TERMINAL, Role, StallReason, State

WAIT_S = 5.0  # of one poll; an answer comes as soon as something changes
MUST_TAKE = (StallReason.WAITING_FOR_RESUME, StallReason.WAITING_FOR_BLOCKS)
Steps = Generator[Any, Any, None]


class TransferLogic:
    """One side of a transfer as its worker sees it."""

    def __init__(self, pool: Pool, role: Role, call: worker.Send | worker.Receive) -> None:
        self.pool = pool
        self.role = role
        self.name: dict[str, Any] = {
            "transfer_id": call.transfer_id,
            "attempt": call.attempt,
            "rank": call.rank,
        }
        self.snapshot: worker.Snapshot | None = None
        self.released = False

    @property
    def now(self) -> worker.Snapshot:
        """The newest snapshot."""
        assert self.snapshot is not None, "not opened yet"
        return self.snapshot

    @property
    def ended(self) -> bool:
        """Whether the newest snapshot is terminal."""
        return self.now.state in TERMINAL

    def note(self, reply: worker.Snapshots) -> None:
        """Take a reply's snapshot in; older ones that were overtaken are dropped.

        Behind a release the daemon has no aux values any more; we keep them.
        """
        for refused in reply.refused:
            raise refused.error.raised()
        for seen in reply.transfers:
            before = self.snapshot
            if before is None or seen.snapshot >= before.snapshot:
                self.snapshot = seen
                if before is not None and before.aux is not None and seen.aux is None:
                    self.snapshot = seen.model_copy(update={"aux": before.aux})

    def ask(self, call: Any) -> Steps:
        """Make a call and note what it answers."""
        self.note((yield call))

    def settled(self) -> Steps:
        """Let the GPU come to an end with what this thread's current stream has been given."""
        work = self.pool.settle()
        if work is not None:
            yield work

    def change(self, wait_s: float = WAIT_S) -> Steps:
        """Wait for a change, or a few seconds."""
        watched = worker.Watched(role=self.role, after=self.now.snapshot, **self.name)
        wait_s = min(wait_s, WAIT_S)
        yield from self.ask(worker.Poll(transfers=[watched], wait_s=wait_s))

    def end(self) -> Steps:
        """Wait for a terminal state; raise its error if it failed."""
        while not self.ended:
            yield from self.change()
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """FerryError if the transfer has failed."""
        if self.now.state is State.FAILED and self.now.error is not None:
            raise self.now.error.raised()

    def release(self) -> Steps:
        """Say that no block is touched any more."""
        if not self.released:
            yield from self.settled()
            yield from self.ask(worker.Release(role=self.role, **self.name))
            self.released = True  # only now: a call that was cut short is made again

    def abort(self, reason: str) -> Steps:
        """Give it up and let the blocks go."""
        if not self.ended:
            call = worker.Abort(role=self.role, reason=reason_of(reason), **self.name)
            yield from self.ask(call)
        yield from self.release()

    def view(self, first_token: int, end_token: int) -> WindowView:
        """The part [first_token, end_token) of the window."""
        runs = runs_of(self.now.base_tokens, self.pool.layout.block_size_tokens, self.now.runs)
        size = self.pool.layout.block_size_tokens
        inside = [
            run
            for run in runs
            if run.first_token < end_token and run.first_token + run.blocks * size > first_token
        ]
        return WindowView(self.pool, first_token, end_token - first_token, inside)


class SendLogic(TransferLogic):
    """The source worker: fill, mark ready, finish."""

    def __init__(self, pool: Pool, call: worker.Send) -> None:
        super().__init__(pool, Role.SOURCE, call)
        self.told_total = call.total_tokens is not None  # by this rank: each has to

    @property
    def edge_tokens(self) -> int:
        """The window reaches up to here."""
        return self.now.base_tokens + self.now.allocated_tokens

    def free_window(self) -> WindowView:
        """The room behind what is ready."""
        return self.view(self.now.available_tokens, self.edge_tokens)

    def room(self) -> Steps:
        """Wait until there is room behind what is ready; raise the error if it failed."""
        while self.edge_tokens <= self.now.available_tokens and not self.ended:
            yield from self.change()
        self.raise_if_failed()

    def ready(self, ready: int, total: int | None, aux: dict[str, Any] | None) -> Steps:
        """Mark tokens ready."""
        yield from self.settled()
        told = {"ready_tokens": ready, "total_tokens": total, "aux": aux}
        yield from self.ask(made(worker.Ready, {**told, **self.name}))
        self.told_total |= total is not None

    def fill(self, first: int, arrays: dict[str, Any], aux: dict[str, Any] | None) -> Steps:
        """Copy (tokens, *shape) arrays in as room comes, marking each part ready."""
        end = first + self._tokens_of(arrays)
        if first != self.now.available_tokens:
            raise FerryError(
                Code.BAD_ARRAY, f"token {self.now.available_tokens} is next, not {first}"
            )
        at = first
        while at < end:
            yield from self.room()
            stop = min(end, self.edge_tokens)
            window = self.view(at, stop)
            for name, array in arrays.items():
                window.scatter(name, at, array[at - first : stop - first])
            at = stop
            yield from self.ready(at, None, aux if at == end else None)

    def _tokens_of(self, arrays: dict[str, Any]) -> int:
        """How many tokens every plane has; FerryError(bad_array) before a byte is written."""
        planes = {plane.name: plane for plane in self.pool.layout.planes}
        if set(arrays) != set(planes):
            raise FerryError(
                Code.BAD_ARRAY, f"arrays for {sorted(arrays)}, but the planes are {sorted(planes)}"
            )
        tokens = None
        for name, plane in planes.items():
            tokens = len(self.pool.checked(arrays[name], plane, tokens))
        assert tokens is not None  # a layout has a plane
        return tokens

    def finish(self, aux: dict[str, Any] | None) -> Steps:
        """The payload ends with what is ready; the worker is done with it."""
        now = self.now
        if not self.ended and (not self.told_total or aux is not None):
            total = now.total_tokens if self.told_total else now.available_tokens
            yield from self.ready(now.available_tokens, total, aux)
        yield from self.release()


class ReceiveLogic(TransferLogic):
    """The sink worker: take windows over, resume, release."""

    def __init__(self, pool: Pool, call: worker.Receive) -> None:
        super().__init__(pool, Role.SINK, call)
        self.taken_tokens = call.start_tokens
        self.window: WindowView | None = None

    def next_window(self, min_tokens: int | None) -> Steps:
        """Set ``window`` to the next one to take over, or to None after the last.

        The one before it has been taken over by now, and is resumed behind.
        """
        if self.window is not None:
            end = self.window.end_token
            if not self.ended:
                yield from self.resume(end)
            self.taken_tokens = end  # only now: a resume that was cut short is made again
            self.window = None
        while not self._is_due(min_tokens):
            yield from self.change()
        self.raise_if_failed()
        if self.now.sent_tokens > self.taken_tokens:
            self.window = self.view(self.taken_tokens, self.now.sent_tokens)

    def _is_due(self, min_tokens: int | None) -> bool:
        fresh = self.now.sent_tokens - self.taken_tokens
        must = self.now.stall in MUST_TAKE or (min_tokens is not None and fresh >= min_tokens)
        return self.ended or (fresh > 0 and must)

    def resume(self, sent_tokens: int) -> Steps:
        """Tokens below are taken over."""
        yield from self.settled()
        yield from self.ask(made(worker.Resume, {"sent_tokens": sent_tokens, **self.name}))

    def leave(self) -> Steps:
        """Give the blocks back; a transfer that has not ended is given up."""
        if self.ended:
            yield from self.release()
        else:
            yield from self.abort("its worker left before the end")


class Progress:
    """What both clients show of a transfer."""

    logic: SendLogic | ReceiveLogic

    @property
    def snapshot(self) -> worker.Snapshot:
        """The newest snapshot."""
        return self.logic.now

    @property
    def sent_tokens(self) -> int:
        """Tokens that have arrived; on the source, those that the sink has acknowledged."""
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


def nothing_left(error: FerryError) -> bool:
    """Whether an abort was refused because there is nothing to give up any more."""
    return error.code in (
        Code.DAEMON_RESTARTED,
        Code.DAEMON_UNREACHABLE,
        Code.POOL_LOST,
        Code.UNKNOWN_TRANSFER,
    )
