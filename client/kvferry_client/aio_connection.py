"""An asyncio connection to the daemon: any number of calls under way on one socket."""

import asyncio
from typing import Any

import zmq
import zmq.asyncio

from kvferry_client.connection import tune
from kvferry_client.session import (
    CALL_S,
    HELLO_S,
    JOINS_MAX,
    Member,
    Session,
    check_same_pool,
    is_refused,
    waits,
)
from kvferry_client.views import Pool
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError


class AsyncConnection:
    """A DEALER socket of one session; answers find their calls by number."""

    def __init__(self, session: Session) -> None:
        """Needs a running event loop."""
        self._session = session
        self._member: Member | None = None
        self._joining = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        tune(self._socket)
        self._socket.connect(session.address)
        self._reader = asyncio.get_running_loop().create_task(self._read())
        self._closed = False

    async def close(self) -> None:
        """Drop the connection; calls under way end with FerryError(client_closed)."""
        self._closed = True
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._fail_all(_closed())
        self._socket.close(linger=0)
        self._context.term()

    async def call(self, call: Any, wait_s: float = CALL_S, pool: Pool | None = None) -> Any:
        """As ``Connection.call``; cancelling it leaves the call made or not made."""
        reply, _ = await self.call_in_pool(call, wait_s, pool)
        return reply

    async def call_in_pool(
        self, call: Any, wait_s: float = CALL_S, pool: Pool | None = None
    ) -> tuple[Any, Pool]:
        """The same, and the pool of the session in which it was answered."""
        for _ in range(JOINS_MAX):
            member = self._member
            check_same_pool(member, pool)
            reply = await self._exchange(call, wait_s)
            if not is_refused(reply, Code.HELLO_FIRST):
                break
            await self.join(member)
        if isinstance(reply, worker.Failure):
            raise reply.error.raised()
        assert self._member is not None, "no call is answered before a hello"
        return reply, self._member.pool

    async def join(self, before: Member | None = None) -> Member:
        """Join the daemon, or take the session up again, unless another call just did."""
        async with self._joining:
            if self._member is not None and self._member is not before:
                return self._member
            for _ in range(JOINS_MAX):
                hello = self._session.hello()
                reply = await self._exchange(hello, HELLO_S if hello.session is None else CALL_S)
                self._member = self._session.take(reply, hello)
                if self._member is not None:
                    return self._member
            raise reply.error.raised()

    async def _exchange(self, call: Any, wait_s: float) -> Any:
        if self._closed:
            raise _closed()
        number = self._session.next_number()
        frame = worker.CALLS.encode(call, number)
        held_s = getattr(call, "wait_s", 0.0)  # the daemon itself lets a poll wait
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            for patience_s in waits(wait_s, held_s):
                await self._send(frame)
                await asyncio.wait((future,), timeout=patience_s)
                if future.done():
                    return future.result()
        finally:
            del self._waiting[number]
        raise self._session.unreachable(wait_s)

    async def _send(self, frame: bytes) -> None:
        try:
            await self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return  # the queue is full: the daemon is away; the next repeat may fare better

    def _fail_all(self, error: FerryError) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    async def _read(self) -> None:
        while True:
            try:
                reply = worker.REPLIES.decode(await self._socket.recv())
            except FerryError as error:  # whose it was, nobody can tell; the next one may be fine
                self._fail_all(error)
                continue
            future = self._waiting.get(reply.call)
            if future is not None and not future.done():
                future.set_result(reply)  # others are late answers to calls that were repeated


def _closed() -> FerryError:
    return FerryError(Code.CLIENT_CLOSED, "the client is closed")
