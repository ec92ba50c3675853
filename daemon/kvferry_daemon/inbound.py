"""What comes in on the sockets: held against a rate, read, and handed to the node."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, thread_time
from typing import Protocol

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.deeds import Deed
from kvferry_daemon.core.node import Node
from kvferry_daemon.keys import Keys
from kvferry_daemon.links.liveness import Liveness
from kvferry_daemon.links.zmq_link import is_large
from kvferry_daemon.probe import key_of
from kvferry_proto import peer, worker
from kvferry_proto.errors import Code, FerryError, exhausted
from kvferry_proto.fields import ErrorInfo

TOLD_A_S = 10  # who sends too much is told so often, and is not read in between
LONG_S = 0.02  # of the loop's time: more than all but the fullest frames of a daemon take
LONG_COSTS = 3.0  # what a peer's message takes beyond that, it pays for so many times
WORK_A_S = 1000.0  # thousandths of a second: what a worker's large messages may cost others
WORK_COSTS = 3.0  # so many times what the others waited: a process has a third of the loop
WORK_LONG_S = 0.002  # and of what takes less, all: between two of them others have their turn
ALONE_S = 1.0  # without a word of any other process; then nobody waits
OWED_MAX_S = 1.25  # and a second is had: peers may share a key, and a link that is silent is lost
FLOOD_S = 2.0  # of a source that goes on, whatever we leave unread; then its link is dropped
PAUSE_S = 0.5  # without a message too many: it has stopped
log = logging.getLogger(__name__)


class Answers(Protocol):
    """Where refusals go out, and where a link is dropped."""

    def to_worker(self, route: bytes, reply: out.WorkerReply) -> None: ...
    def to_sink(self, effect: out.ToSink) -> None: ...
    def shun_peer(self, address: str) -> None: ...


class Inbound:
    """Messages of workers and of other daemons. Names of who sends them are not their own words."""

    def __init__(
        self,
        node: Node,
        feed: Callable[[out.NodeEvent], None],
        answers: Answers,
        liveness: Liveness,
        keys: Keys | None,
        messages_a_s: float,
    ) -> None:
        """``messages_a_s``: from one worker's process, one peer, and one source."""
        self._node = node
        self._feed = feed
        self._answers = answers
        self._liveness = liveness
        self._keys = keys
        self._now_s = asyncio.get_running_loop().time
        self._messages_a_s = messages_a_s
        self._workers = Allowances(messages_a_s)
        self._work = Allowances(WORK_A_S)  # of workers, by their large messages
        self._speaker, self._others_until_s = "", 0.0
        self._peers = Allowances(messages_a_s)
        self._sources = Allowances(messages_a_s)
        self._floods: dict[str, tuple[float, float]] = {}  # of sources: first and last seen
        self._told = Allowances(TOLD_A_S)

    # --- workers ---

    def on_worker(self, frames: list[bytes], user: str) -> None:
        """A call, from a process that the kernel says is ``user``."""
        now_s = self._now_s()
        if user != self._speaker:
            self._others_until_s = now_s + ALONE_S if self._speaker else 0.0
            self._speaker = user
        wait_s = self._workers.wait_s(user, now_s)
        if wait_s and not self._is_to_be_told("worker", user):
            return
        if not is_large(frames):  # most are not, and have no time to be measured
            self._read_worker(frames, user, wait_s)
            return
        begun_s, worked_s = monotonic(), thread_time()
        self._read_worker(frames, user, wait_s)
        if thread_time() - worked_s > WORK_LONG_S and now_s < self._others_until_s:
            took_s = monotonic() - begun_s  # so long others waited, whoever had the core
            self._work.wait_s(user, self._now_s())  # so that it is known
            self._work.owe(user, min(WORK_COSTS * took_s, OWED_MAX_S) * WORK_A_S)

    def is_unwanted_of_worker(self, _route: bytes, user: str) -> bool:
        """Whether a large message is dropped unread: its sender is over, and asks again.

        Small ones are read on, heartbeats too: nobody is taken for lost who only asks for much.
        """
        now_s = self._now_s()
        if not (self._work.is_over(user, now_s) or self._workers.is_over(user, now_s)):
            return False
        self._is_to_be_told("worker", user)
        return True

    def _read_worker(self, frames: list[bytes], user: str, wait_s: float) -> None:
        route = frames[0]
        try:
            call = worker.CALLS.decode(single(frames))
        except FerryError as error:
            self._node.counters["bad_messages_worker"] += 1
            self._refuse_worker(route, error)
            return
        if wait_s:
            self._refuse_worker(route, self._over(wait_s), call.call)
            return
        held = False
        if isinstance(call, worker.Hello):
            try:
                held = self._liveness.is_held(call.lock)
            except OSError as error:
                said = exhausted(f"cannot look at {call.lock}: {error}")
                self._refuse_worker(route, said, call.call)
                return
        self._feed(out.WorkerCalled(route, call, held, user))

    def _refuse_worker(self, route: bytes, error: FerryError, call: int = 0) -> None:
        failure = worker.Failure(call=call, error=ErrorInfo.of_error(error))
        self._answers.to_worker(route, failure)

    # --- other daemons ---

    def on_peer(self, frames: list[bytes], key: str) -> None:
        """A daemon that pulls from us; in clear it has no key, and is its connection."""
        name = "" if self._keys is None else self._keys.name_of(key)
        if name is None:  # any more: it was when it connected
            if not self._told.wait_s(("not trusted", key), self._now_s()):
                refusal = self.distrusted("your key is not trusted here", key)
                self._answers.to_sink(out.ToSink(frames[0], refusal))
            return
        who = name or frames[0]
        wait_s = self._peers.wait_s(who, self._now_s())
        if wait_s:
            if self._is_to_be_told("peer", who):
                self._refuse_peer(frames[0], self._over(wait_s))
            return
        with self._paid_by(self._peers, who):
            self._read_peer(frames, name, key)

    def is_unwanted_of_peer(self, route: bytes, key: str) -> bool:
        """The same of a peer."""
        who = route if self._keys is None else self._keys.name_of(key)
        if who is None or not self._peers.is_over(who, self._now_s()):
            return False
        self._is_to_be_told("peer", who)
        return True

    def _read_peer(self, frames: list[bytes], name: str, key: str) -> None:
        try:
            message = peer.MESSAGES.decode(single(frames))
        except FerryError as error:
            self._node.counters["bad_messages_peer"] += 1
            self._refuse_peer(frames[0], error)
            return
        self._feed(out.SinkSaid(frames[0], message, name, key))

    def _refuse_peer(self, route: bytes, error: FerryError) -> None:
        boot_id = self._node.settings.boot_id
        refusal = peer.PeerRefused(boot_id=boot_id, error=ErrorInfo.of_error(error))
        self._answers.to_sink(out.ToSink(route, refusal))

    def distrusted(self, why: str, key: str = "") -> peer.PeerRefused:
        """What a daemon gets whose key is not in the list, or that has none."""
        self._node.counters["peers_not_trusted"] += 1
        code = Code.NOT_TRUSTED.value
        self._node.deeds.append(Deed("peer_refused", key, code=code, why=why))
        info = ErrorInfo.of(Code.NOT_TRUSTED, why)
        return peer.PeerRefused(boot_id=self._node.settings.boot_id, error=info)

    def on_source(self, address: str, frames: list[bytes]) -> None:
        """A daemon that we pull from."""
        if self._sources.wait_s(address, self._now_s()):
            self._on_too_many(address)
            return
        try:
            with self._paid_by(self._sources, address):  # its news go on to sinks of many others
                message = peer.MESSAGES.decode(single([b"", *frames]))
        except FerryError as error:
            self._node.counters["bad_messages_peer"] += 1
            if not self._told.wait_s(("source", address), self._now_s()):
                log.warning("%s sent what we cannot read: %s", address, error)
            return
        self._feed(out.SourceSaid(address, message))

    # --- rates ---

    @contextmanager
    def _paid_by(self, rates: Allowances, who: str | bytes) -> Iterator[None]:
        """Who holds the loop up for long counts as having sent that many more messages."""
        begun_s = thread_time()
        try:
            yield
        finally:
            over_s = thread_time() - begun_s - LONG_S
            if over_s > 0:
                rates.owe(who, min(LONG_COSTS * over_s, OWED_MAX_S) * self._messages_a_s)

    def _on_too_many(self, address: str) -> None:
        """A source is told nothing, since it asks nothing: the log is, and its link goes at last."""
        now_s = self._now_s()
        name = None if self._keys is None else self._keys.name_of(key_of(address))
        if self._is_to_be_told("source", name or address):
            log.warning("%s sends more than %g messages a second", address, self._messages_a_s)
        going_on = {one: at for one, at in self._floods.items() if now_s - at[1] < PAUSE_S}
        since_s, _ = going_on.get(address, (now_s, now_s))
        self._floods = {**going_on, address: (since_s, now_s)}
        if now_s - since_s >= FLOOD_S:
            del self._floods[address]
            self._answers.shun_peer(address)

    def _is_to_be_told(self, kind: str, who: str | bytes) -> bool:
        self._node.counters[f"messages_over_rate_{kind}"] += 1
        if self._told.wait_s((kind, who), self._now_s()):
            return False
        user = who if isinstance(who, str) else "in clear"
        what = "refused" if kind == "worker" else "peer_refused"
        code = Code.RESOURCE_EXHAUSTED.value
        self._node.deeds.append(Deed(what, user, code=code, why="too many messages a second"))
        return True

    def _over(self, wait_s: float) -> FerryError:
        words = (
            f"more than {self._messages_a_s:g} messages a second from one sender, or as much work"
        )
        return exhausted(words, wait_s)


def single(frames: list[bytes]) -> bytes:
    """The one frame of a message behind its route; FerryError."""
    if len(frames) != 2:
        raise FerryError(Code.BAD_MESSAGE, f"a message is one frame, not {len(frames) - 1}")
    return frames[1]
