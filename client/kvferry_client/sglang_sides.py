"""One request as SGLang's schedulers see it: a sender in prefill, a receiver in decode.

``poll`` is called for every request in every step of a scheduler: it looks at what the ferry's
thread has left, and says nothing to anybody. ``Success`` and ``Failed`` mean that no page of the
engine is touched any more, so its blocks may be released at once.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sglang.srt.disaggregation.base.conn import (
    BaseKVReceiver,
    BaseKVSender,
    KVTransferDestination,
    KVTransferMetric,
)
from sglang.srt.disaggregation.common.conn import KVTransferError

from kvferry_client.engine import NO_BLOCK, Incoming, Outgoing, Side
from kvferry_client.engine_thread import JOIN_WAIT_S
from kvferry_client.sglang_asking import Ticket
from kvferry_client.sglang_aux import aux_values, take_aux
from kvferry_client.sglang_identity import prompt_identity
from kvferry_client.sglang_manager import KvferryManager
from kvferry_proto.states import State

Pages = NDArray[np.int32]
ABORTED = "aborted by its engine"
STOP_S = (
    60.0  # what stops a side is a copy of its ferry's; so long takes only a ferry that is stuck
)


class _Transfer:
    """What both sides have in common."""

    def __init__(self, mgr: KvferryManager, bootstrap_addr: str, bootstrap_room: int) -> None:
        self.kv_mgr = mgr
        self.bootstrap_room = bootstrap_room
        self.conclude_state: State | None = None
        self._bootstrap_addr = bootstrap_addr
        self._begun_s = time.monotonic()
        self._ticket: Ticket | None = None
        self._side: Side | None = None
        self._failure: str | None = None
        self._aux_index = -1
        self._request = ""
        self._identity: dict[str, str] = {}

    def is_of(self, request: Any) -> None:
        """Which request of SGLang's it is, which its arguments do not tell."""
        self._request = request.rid
        self._identity = {**self.kv_mgr.identity, **prompt_identity(request)}

    def poll(self) -> State:
        """Where it stands, as one of SGLang's five numbers, which are also ours."""
        if self.conclude_state is None:
            state = self._look()
            if state not in (State.SUCCESS, State.FAILED):
                return state
            self.conclude_state = state
        return self.conclude_state

    def _look(self) -> State:
        side = self._side
        if side is not None and side.ended:
            if side.error is None:
                return self._arrived()
            self._failure = str(side.error)
        if self._failure is not None:
            return State.FAILED
        if side is not None:
            return State.TRANSFERRING
        return self._look_for_room()

    def _look_for_room(self) -> State:
        raise NotImplementedError

    def _ask_for_room(self, *, wanted: bool = True) -> Ticket:
        ask = self.kv_mgr.rooms.ask
        address, room = self._bootstrap_addr, self.bootstrap_room
        self._ticket = ask(address, room, self._request, self._identity, wanted=wanted)
        return self._ticket

    def _look_for_daemon(self) -> State:
        """Whether it is there: a while is waited for it."""
        ferry = self.kv_mgr.ferry
        if not self._request:
            return self._fail("SGLang did not tell which request this is: its hooks are others")
        if ferry.peer_address is not None:
            self.kv_mgr.rooms.source = ferry.peer_address
            return State.WAITING_FOR_INPUT
        if time.monotonic() - self._begun_s > JOIN_WAIT_S:
            return self._fail(str(ferry.refusal or "kvferry's daemon has not answered"))
        return State.BOOTSTRAPPING

    def _arrived(self) -> State:
        return State.SUCCESS

    def _fail(self, reason: str) -> State:
        self._failure = reason
        return State.FAILED

    def abort(self) -> None:
        """Give it up. No page is touched once this returns."""
        if self.conclude_state is None:
            self._failure = self._failure or ABORTED
            self.conclude_state = State.FAILED
        self._stop()

    def clear(self) -> None:
        """Forget it; a side that still moves, because another rank failed, is stopped."""
        self._stop()

    def failure_exception(self) -> None:
        """Raise why it failed; no reason of its own means that another rank's did."""
        self.conclude_state = State.FAILED
        self._stop()
        raise KVTransferError(
            self.bootstrap_room,
            self._failure or "failed at another rank",
            is_from_another_rank=self._failure is None,
        )

    def _stop(self) -> None:
        side = self._side
        if side is not None and not side.ended:
            side.abort(self._failure or ABORTED)
            if not side.wait(STOP_S):
                raise RuntimeError(f"{side.transfer_id} does not let go of its pages")


class KvferrySender(_Transfer, BaseKVSender):  # type: ignore[misc]
    """Prefill's: ``Success`` once its daemon has every token, whether decode has come or not."""

    def __init__(
        self,
        mgr: KvferryManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self._early_send_wait_event: Any = None  # SGLang's, before a send: of the step that writes
        self._chunks: list[Pages] = []
        self._pages = self._tokens = self._pages_total = 0
        self._has_sent_all = False
        self._is_withdrawn = False
        self._told: Callable[[Outgoing], object] | None = None  # what the ferry does not know yet

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        """Prefill is about to begin, of so many pages."""
        self._pages_total = num_kv_indices
        self._aux_index = -1 if aux_index is None else aux_index

    def _look(self) -> State:
        self._go_on()
        state = super()._look()
        is_waiting = state == State.TRANSFERRING and not self._has_sent_all
        return State.WAITING_FOR_INPUT if is_waiting else state

    def _look_for_room(self) -> State:
        if self._ticket is None:
            return self._look_for_daemon()
        if self._ticket.error is not None:
            return self._fail(self._ticket.error)
        return State.TRANSFERRING

    def _go_on(self) -> None:
        """Open the room with the first tokens, and no earlier: decode holds nothing until then."""
        told, ticket = self._told, self._ticket
        if told is None or self._failure is not None:
            return
        if ticket is None:
            self._ask_for_room()
        elif ticket.transfer_id is not None:
            if self._side is None:
                self._side = self.kv_mgr.ferry.send(ticket.transfer_id, total_tokens=None)
            assert isinstance(self._side, Outgoing)
            told(self._side)
            self._told = None

    def send(
        self,
        kv_indices: Pages,
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
    ) -> None:
        """The next pages, of so many tokens, are computed. The last brings what goes beside them."""
        if self.conclude_state is not None:
            return
        assert num_kv_tokens is not None
        self._chunks.append(np.asarray(kv_indices))
        self._pages += len(kv_indices)
        self._tokens += num_kv_tokens
        self._has_sent_all = self._pages == self._pages_total
        after, self._early_send_wait_event = self._early_send_wait_event, None
        tables = [np.concatenate(self._chunks)]
        tokens, aux, are_all = self._tokens, None, self._has_sent_all
        if are_all:
            tables += _window_tables(state_indices, self._pages)
            aux = aux_values(self.kv_mgr.aux, self._aux_index)
        elif len(self.kv_mgr.cache.groups) > 1:
            tables.append(np.full(self._pages, NO_BLOCK))
            tokens = min(tokens, self._tokens_before_window())
        if tokens > 0:
            self._told = lambda side: side.computed(
                tables, tokens, are_all=are_all, aux=aux, after=after
            )
            self._go_on()

    def _tokens_before_window(self) -> int:
        """Tokens that no layer with a window needs: where its pages are is told with the last."""
        size = self.kv_mgr.cache.page_tokens
        end = (self._pages_total - 1) * size - self.kv_mgr.window_tokens
        return max(0, end // size * size)

    def _stop(self) -> None:
        """A decode that waits for what will not come is told so."""
        super()._stop()
        if self.conclude_state is State.FAILED and not self._is_withdrawn:
            self._is_withdrawn = True
            ticket = self._ticket or Ticket(self.bootstrap_room, self._request, self._identity, 0)
            reason = self._failure or "failed at another rank"
            self.kv_mgr.rooms.withdraw(self._bootstrap_addr, ticket, reason)
            if self._side is None and ticket.give_up():
                self.kv_mgr.decline(ticket)  # decode may have its name, and look for it there

    def get_transfer_metric(self) -> KVTransferMetric:
        """How many bytes there were."""
        bytes_total = self._pages * self.kv_mgr.kv_item_lens_sum
        return KVTransferMetric(transfer_total_bytes=bytes_total)


class KvferryReceiver(_Transfer, BaseKVReceiver):  # type: ignore[misc]
    """Decode's: ``WaitingForInput`` once prefill has the request, ``Success`` with the last token."""

    # SGLang asks every receiver for these. Its own backends count acknowledgements of ranks that
    # may still write; nobody but our own ferry writes here, and it is stopped before we return.
    abort_notified = False
    require_staging = False
    bootstrap_infos: tuple[Any, ...] = ()
    _is_given_up = False

    def init(self, prefill_dp_rank: int) -> None:
        """Nothing: ``poll`` looks for the room, whatever rank of prefill's opens it."""

    def _look_for_room(self) -> State:
        ticket = self._ticket
        if ticket is None:
            state = self._look_for_daemon()
            if state == State.WAITING_FOR_INPUT:
                self._ask_for_room()
                return State.BOOTSTRAPPING
            return state
        if ticket.error is not None:
            return self._fail(ticket.error)
        return State.BOOTSTRAPPING if ticket.transfer_id is None else State.WAITING_FOR_INPUT

    def send_metadata(
        self,
        kv_indices: Pages,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        destination: KVTransferDestination = KVTransferDestination.DEVICE,
    ) -> None:
        """Fetch into these pages what comes behind the first ``decode_prefix_len`` tokens."""
        if destination != KVTransferDestination.DEVICE:
            raise NotImplementedError("kvferry fetches into the device's pool only")
        size = self.kv_mgr.cache.page_tokens
        first = decode_prefix_len or 0
        pages = first // size + len(kv_indices)
        table = np.concatenate([np.full(first // size, NO_BLOCK), kv_indices])
        self._aux_index = -1 if aux_index is None else aux_index
        tables = [table, *_window_tables(state_indices, pages)]
        assert self._ticket is not None
        self._side = self.kv_mgr.receive(self._ticket, tables, first, pages * size)

    def _arrived(self) -> State:
        assert isinstance(self._side, Incoming)
        assert self._side.aux is not None
        try:
            take_aux(self.kv_mgr.aux, self._aux_index, self._side.aux)
        except ValueError as error:
            return self._fail(str(error))
        return State.SUCCESS

    def _stop(self) -> None:
        """One that fails before it has asked asks as well: prefill's daemon holds what it opens."""
        super()._stop()
        if self._side is None and not self._is_given_up:
            self._is_given_up = True
            if self._ticket is None:
                self._ask_for_room(wanted=False)
            elif self._ticket.give_up():
                self.kv_mgr.decline(self._ticket)

    def ensure_abort_notified(self, *, force_arm: bool = False) -> None:
        """Nothing: see ``abort_notified``."""


def _window_tables(state_indices: list[Any] | None, pages: int) -> list[NDArray[Any]]:
    """The table of layers with a window, if there are any: their pages lie at the prompt's end."""
    if not state_indices:
        return []
    (kept,) = state_indices
    return [np.concatenate([np.full(pages - len(kept), NO_BLOCK), kept])]
