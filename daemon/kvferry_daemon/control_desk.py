"""Answers operators: what they read comes from the node's books, what they change is an event."""

import asyncio
import logging
from collections.abc import Callable
from time import thread_time

from kvferry_daemon.access import Users
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.core.deeds import Deed
from kvferry_daemon.core.events import Key
from kvferry_daemon.core.explain import explain, near_ids
from kvferry_daemon.core.node import AnyTransfer, Node
from kvferry_daemon.core.report import live_row, transfers
from kvferry_daemon.inbound import single
from kvferry_proto import control
from kvferry_proto.errors import Code, FerryError, exhausted
from kvferry_proto.fields import ErrorInfo

log = logging.getLogger(__name__)
ASKS_A_S = 1000  # of one process
ASK_S = 0.00025  # of the loop's time: who asks for more has asked more often, so it has a quarter


class ControlDesk:
    """One a daemon; ``status`` is what only the daemon as a whole can tell."""

    def __init__(
        self,
        node: Node,
        feed: Callable[[out.NodeEvent], None],
        status: Callable[[int], control.Status],
        operators: Users,
    ) -> None:
        """``operators``: who may change something; to read is open to whoever may connect."""
        self._node = node
        self._feed = feed
        self._status = status
        self._operators = operators
        self._loop = asyncio.get_running_loop()
        self._allowed = Allowances(ASKS_A_S)
        self.stopping = False  # then nothing brings it back

    def reply(self, frames: list[bytes], user: str) -> bytes:
        """The frame that answers ``user`` (uid:gid:pid), whatever came and whatever goes wrong."""
        try:
            request = control.REQUESTS.decode(single(frames))
        except FerryError as error:
            self._node.counters["bad_messages_control"] += 1
            return _refusal(error)
        try:
            return self._answer(request, user)
        except FerryError as error:
            return _refusal(error, request.call)
        except Exception as error:  # a fault of ours: who asks must not take us for dead
            log.exception("could not answer %s of %s", request.kind, user)
            words = f"{request.kind}: {type(error).__name__}"
            return _refusal(FerryError(Code.INTERNAL, words), request.call)

    def _answer(self, request: control.Request, user: str) -> bytes:
        wait_s = self._allowed.wait_s(user, self._loop.time())
        if wait_s:
            self._node.counters["messages_over_rate_control"] += 1
            words = f"more than {ASKS_A_S} requests a second, or what takes a quarter of our time,"
            raise exhausted(f"{words} from one process", wait_s)
        if isinstance(request, control.CHANGES):
            if not self._operators.has(user):
                self._node.counters["operators_refused"] += 1
                self._note("operator_refused", user, request)
                raise FerryError(Code.CONTROL_DENIED, f"{request.kind}: {user} is no operator here")
            self._note("operator", user, request)
        begun_s = thread_time()
        try:
            return self._frame(request, self._loop.time())
        finally:
            self._allowed.owe(user, (thread_time() - begun_s) / ASK_S)

    def _note(self, what: str, user: str, request: control.Request) -> None:
        match request:
            case control.SetDraining():
                why = "" if request.draining else "no more"
            case control.SetLogLevel():
                why = request.level
            case _:
                why = getattr(request, "reason", "")
        deed = Deed(
            what,
            user,
            asked=request.kind,
            transfer_id=getattr(request, "transfer_id", None) or "",
            attempt=getattr(request, "attempt", None),
            why=why,
        )
        self._node.deeds.append(deed)

    def _frame(self, request: control.Request, now_s: float) -> bytes:
        node = self._node
        match request:
            case control.GetTransfers():
                return control.frame_of(transfers(node, request, now_s))
            case control.GetStatus():
                return control.ANSWERS.encode(self._status(request.call))
            case control.Explain():
                return control.ANSWERS.encode(explain(node, request, now_s))
            case control.SetDraining():
                return control.ANSWERS.encode(self._set_draining(request))
            case control.AbortTransfer():
                return control.ANSWERS.encode(self._abort(request, now_s))
            case control.SetLogLevel():
                return control.ANSWERS.encode(self._set_log_level(request))

    def _set_draining(self, request: control.SetDraining) -> control.Draining:
        node = self._node
        if self.stopping and not request.draining:
            raise FerryError(
                Code.DRAINING, "the daemon was told to end and takes no more transfers"
            )
        self._feed(out.DrainBegun() if request.draining else out.DrainEnded())
        unsettled = node.census.unsettled
        return control.Draining(call=request.call, draining=node.draining, unsettled=unsettled)

    def _abort(self, request: control.AbortTransfer, now_s: float) -> control.Aborted:
        named = self._named(request.transfer_id, request.attempt)
        live = [transfer for transfer in named if not transfer.ended]
        if not live:
            raise FerryError(Code.UNKNOWN_TRANSFER, self._why_not(request, ended=bool(named)))
        reason = " ".join(request.reason.split()) or "no reason given"
        self._feed(out.TransfersAborted(tuple(transfer.key for transfer in live), reason))
        rows = [live_row(self._node, transfer, now_s) for transfer in live]
        return control.Aborted(call=request.call, transfers=rows[: control.TRANSFERS_MAX])

    def _named(self, transfer_id: str, attempt: int | None) -> list[AnyTransfer]:
        def is_meant(key: Key) -> bool:
            return key.transfer_id == transfer_id and attempt in (None, key.attempt)

        return [one for key, one in self._node.transfers.items() if is_meant(key)]

    def _why_not(self, request: control.AbortTransfer, *, ended: bool) -> str:
        which = request.transfer_id
        if request.attempt is not None:
            which += f", attempt {request.attempt},"
        if ended or self._node.tombstones.of(request.transfer_id):
            return f"{which} has ended already"
        near = near_ids(self._node, request.transfer_id)
        return f"no transfer {which}" + (f"; near it are {', '.join(near)}" if near else "")

    def _set_log_level(self, request: control.SetLogLevel) -> control.LogLevelSet:
        before = log_level()
        logging.getLogger().setLevel(request.level.upper())
        return control.LogLevelSet(call=request.call, level=request.level, before=before)


def _refusal(error: FerryError, call: int = 0) -> bytes:
    failure = control.ControlFailure(call=call, error=ErrorInfo.of_error(error))
    return control.ANSWERS.encode(failure)


def log_level() -> str:
    """What is written to the log now, as the config names it."""
    return logging.getLevelName(logging.getLogger().level).lower()
