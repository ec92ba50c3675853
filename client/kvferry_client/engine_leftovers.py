"""What a daemon that did not answer may still keep for an engine: it is told so once it is back."""

import asyncio
import logging
from collections import deque
from typing import Any, NamedTuple

from kvferry_client.aio import AsyncClient
from kvferry_client.calls import reason_of
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import Role

AGAIN_S = 1.0
KEPT = 1 << 14  # a daemon lets one worker have about as many
logger = logging.getLogger(__name__)


class Leftover(NamedTuple):
    """One side of a transfer; ``reason``: why it is given up, None if it came to its end.

    ``opening``: what opens it, if the daemon may not have heard of it, but who waits for it shall.
    """

    role: Role
    transfer_id: str
    attempt: int
    rank: int
    reason: str | None
    opening: worker.Send | None = None

    def calls(self) -> list[Any]:
        """What lets go of it, behind a call that may have opened it and was not answered.

        That it is opened here once more tells the other side of its end, also by a daemon's next life.
        """
        name: dict[str, Any] = {
            "transfer_id": self.transfer_id,
            "attempt": self.attempt,
            "rank": self.rank,
        }
        release = worker.Release(role=self.role, **name)
        if self.reason is None:
            return [release]
        abort = worker.Abort(role=self.role, reason=reason_of(self.reason), **name)
        return [abort, release] if self.opening is None else [self.opening, abort, release]


class Leftovers:
    """By name, so that nothing of an engine's memory waits for the daemon; the oldest go first."""

    def __init__(self) -> None:
        self._left: deque[Leftover] = deque(maxlen=KEPT)
        self._news = asyncio.Event()

    def add(self, left: Leftover) -> None:
        """The daemon is told of it, in the order of coming."""
        self._left.append(left)
        self._news.set()

    async def tell(self, client: AsyncClient) -> None:
        """Tell it of all that there is and that comes, one call after the other, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._left:
                left = self._left.popleft()
                try:
                    for call in left.calls():
                        await _tell(client, call)
                except Exception:  # a fault of ours: the others are to be told all the same
                    logger.exception("could not let go of %s", left)


async def _tell(client: AsyncClient, call: Any) -> None:
    """Say it until it was heard, also by a daemon that knows of no such transfer."""
    while True:
        try:
            await client.call(call)
        except FerryError as error:
            if error.code not in (Code.DAEMON_UNREACHABLE, Code.RESOURCE_EXHAUSTED):
                return
            await asyncio.sleep(error.retry_after_s or AGAIN_S)
        else:
            return
