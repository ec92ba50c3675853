"""Pulls that came before their source: who asked, and which sinks are told when it comes."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvferry_daemon.core import events as ev
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.peer import Progress
from kvferry_proto.states import Role, State

if TYPE_CHECKING:
    from kvferry_daemon.core.node import Node

UNMET_MAX = 1 << 13  # 2 KiB each; those beyond are not promised anything, and ask again
KEPT_LEASES = 2


class Unmet:
    """One pull of an attempt that is not open here, the oldest first."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._pulls: OrderedDict[ev.Key, tuple[ev.Pulled, float]] = OrderedDict()
        self.most = UNMET_MAX

    def __len__(self) -> int:
        return len(self._pulls)

    def answer(self, key: ev.Key, event: ev.Pulled) -> Progress:
        """Keep who asked, not what for, and say whether we do: then it is told of its source."""
        progress = answer_without_transfer(self._node, key, event.pull.number)
        kept = not progress.known and (key in self._pulls or len(self._pulls) < self.most)
        if kept and key in self._pulls and self._pulls[key][0].daemon != event.daemon:
            self._take_back(key)  # only one of them can have it; the other must not rest on it
        if kept:
            pull = event.pull.model_copy(update={"want": [], "layout": None})
            self._pulls[key] = (ev.Pulled(event.sink, event.daemon, pull), self._node.now_s)
            self._pulls.move_to_end(key)
        return progress.model_copy(update={"will_tell": kept})

    def replay(self, key: ev.Key) -> None:
        """The source was opened: answer what came before it now, not at its next repeat."""
        if key.attempt:
            self._take_back_older(key)
        event, _ = self._pulls.pop(key, (None, 0.0))
        if event is None:
            return
        node = self._node
        if event.sink == node.settings.boot_id:
            node.here.pull(event)
        elif event.sink in node.sources.daemons:  # one that was forgotten says hello, and asks anew
            node.sources.on_pull(event)

    def drop(self, key: ev.Key) -> None:
        """Its sink has ended."""
        self._pulls.pop(key, None)

    def expire(self, at_most: int) -> int:
        """Forget pulls that no source has come for: those who still wait ask once a lease.

        So many of them; return how many.
        """
        keep_s = KEPT_LEASES * self._node.settings.timing.lease_s
        for taken_back in range(at_most):
            if not self._pulls:
                return taken_back
            key, (_, at_s) = next(iter(self._pulls.items()))
            if self._node.now_s - at_s < keep_s:
                return taken_back
            self._take_back(key)
        return at_most

    def _take_back_older(self, key: ev.Key) -> None:
        """Earlier attempts will not come any more."""
        for old in [old for old in self._pulls if old.transfer_id == key.transfer_id]:
            if old.attempt < key.attempt:
                self._take_back(old)

    def _take_back(self, key: ev.Key) -> None:
        """A promise is kept no longer: tell its sink how things are, so that it asks again."""
        event, _ = self._pulls.pop(key)
        progress = answer_without_transfer(self._node, key, event.pull.number)
        if event.sink == self._node.settings.boot_id:
            self._node.post(key._replace(role=Role.SINK), ev.Heard(progress))
        else:
            self._node.sources.say_progress(event.sink, progress)


def answer_without_transfer(node: Node, key: ev.Key, number: int) -> Progress:
    """What a pull gets when no such attempt is open here."""
    stone = node.tombstones.get(key)
    newest = node.current.get((Role.SOURCE, key.transfer_id), -1)
    state, error = State.BOOTSTRAPPING, None
    if stone is not None:
        state, error = stone.snapshot.state, stone.snapshot.error
    elif newest > key.attempt:
        state = State.FAILED
        error = ErrorInfo.of(Code.STALE_ATTEMPT, f"the source is at attempt {newest}")
    return Progress(
        transfer_id=key.transfer_id,
        attempt=key.attempt,
        number=number,
        known=state is not State.BOOTSTRAPPING,
        state=state,
        error=error,
    )
