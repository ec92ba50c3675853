"""The scheduler role of the vLLM connector: decides what is sent, fetched and given up."""

from collections import OrderedDict
from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from kvferry_client.vllm_identity import prompt_identity
from kvferry_client.vllm_messages import (
    Load,
    Save,
    StepMeta,
    Transfer,
    tables_of,
    told,
    transfer_of,
)

logger = init_logger("vllm.kvferry.scheduler")
REMEMBERED = 1 << 16
COMPLETE = (
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
    RequestStatus.FINISHED_STOPPED,
)


class Outbound:
    """A request whose prompt is sent."""

    def __init__(self, transfer: Transfer, total_tokens: int, prompt: str) -> None:
        self.transfer = transfer
        self.total_tokens = total_tokens
        self.prompt = prompt
        self.told_tokens = 0  # of which the workers know, in the blocks that they know
        self.is_known = False  # whether the workers have heard of it at all
        self.is_twin = False  # of a request that sends the same transfer: only told, not sent


class FirstOnes:
    """Which request was the first to name a transfer; of the newest ones."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, int], str] = OrderedDict()

    def first(self, transfer_id: str, attempt: int, request_id: str) -> str:
        """This request, unless another one was before it."""
        first = self._found.setdefault((transfer_id, attempt), request_id)
        if len(self._found) > REMEMBERED:
            self._found.popitem(last=False)
        return first


class SchedulerSide:
    """One engine's. All blocks and tokens are vLLM's; nothing here touches a daemon."""

    def __init__(self, groups: tuple[int, ...], *, keeps_blocks: bool = True) -> None:
        """``groups``: of layers, those that travel. ``keeps_blocks``: see ``keeps_all_blocks``."""
        self.peer_address: str | None = None
        self._keeps_blocks = keeps_blocks
        self._groups = groups
        self._outbound: dict[str, Outbound] = {}
        self._inbound: dict[str, Transfer] = {}  # of requests that have not begun to fetch
        self._loading: set[str] = set()
        self._unsent: set[str] = set()  # requests whose prompt could not be sent
        self._senders, self._fetchers = FirstOnes(), FirstOnes()
        self._twins: dict[str, str] = {}  # of requests that fetch: who was the first
        self._next = StepMeta()

    def new_request(self, request: Any) -> None:
        """Note a request whose prompt is to be sent, and one that shall fetch what another does.

        A request for several samples comes as several with the same params. A transfer has one
        source and one sink, so only the first of them moves anything.
        """
        params = request.kv_transfer_params or {}
        if params.get("do_remote_decode"):
            transfer = self._to_send(request)
            if transfer is not None:
                self._outbound[request.request_id] = outbound = Outbound(
                    transfer, request.num_prompt_tokens, prompt_identity(request)
                )
                first = self._senders.first(*transfer[:2], request.request_id)
                outbound.is_twin = first != request.request_id
        if params.get("do_remote_prefill"):
            transfer = _read(request)
            if transfer is None:
                return
            first = self._fetchers.first(*transfer[:2], request.request_id)
            if first == request.request_id:
                self._inbound[request.request_id] = transfer
            else:
                self._twins[request.request_id] = first

    def _to_send(self, request: Any) -> Transfer | None:
        """The transfer of a request whose prompt can be sent.

        A sliding window moves on while a request generates: vLLM gives blocks of the prompt to others,
        which may not be copied yet.
        """
        if self._keeps_blocks or request.max_tokens == 1:
            return _read(request, request.request_id)
        words = "request %s goes on alone: with a sliding window max_tokens has to be 1, not %s"
        logger.warning(words, request.request_id, request.max_tokens)
        transfer = _read(request, request.request_id)
        if transfer is not None:
            why = f"request {request.request_id}: not sent, its max_tokens is {request.max_tokens}"
            self._next.withdrawn.append((transfer, why))
        return None

    def matched(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """How many more tokens than ``computed_tokens`` can be fetched, and that it takes a while.

        None: not known yet; a request waits for its twin's tokens, which will be in the prefix cache.
        """
        if self._twins.get(request.request_id) in self._loading:
            return None, False
        if request.request_id not in self._inbound:
            return 0, False
        missing = request.num_prompt_tokens - computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """Fetch into blocks that a request was given; once only, whatever becomes of it."""
        transfer = self._inbound.pop(request.request_id, None)
        if transfer is None:
            return
        if not external_tokens:
            self._next.declined.append(transfer)
            return
        end = request.num_prompt_tokens
        tables = tables_of(blocks.get_block_ids(), self._groups)
        self._next.loads[request.request_id] = Load(
            transfer, tables, end - external_tokens, end, prompt_identity(request)
        )
        self._loading.add(request.request_id)

    def step(self, output: Any) -> StepMeta:
        """What the workers have to know of the step that was just scheduled."""
        meta, self._next = self._next, StepMeta()
        computed = {one.req_id: one.num_computed_tokens for one in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for request_id in output.preempted_req_ids or ():
            if request_id in self._outbound and self._outbound[request_id].is_known:
                meta.preempted.add(request_id)
                self._outbound[request_id].told_tokens = 0
        for request_id, scheduled_tokens in output.num_scheduled_tokens.items():
            outbound = self._outbound.get(request_id)
            if outbound is None or outbound.is_twin:
                continue
            if outbound.told_tokens == outbound.total_tokens:
                continue
            end = min(computed[request_id] + scheduled_tokens, outbound.total_tokens)
            block_ids = output.kv_connector_block_state.get_block_ids(request_id)
            tables = tables_of(block_ids, self._groups)
            # Not all that vLLM counts as computed: its prefix cache has blocks already which another
            # request writes in this very step.
            first = min(outbound.told_tokens, computed[request_id])
            meta.saves[request_id] = Save(
                outbound.transfer, tables, first, end, outbound.total_tokens, outbound.prompt
            )
            outbound.told_tokens, outbound.is_known = end, True
        return meta

    def worked(self, output: Any) -> None:
        """What the workers told after a step."""
        self._loading -= output.finished_recving or set()
        news = output.kv_connector_worker_meta
        if news is not None:
            self.peer_address = news.peer_address or self.peer_address
            self._unsent |= self._all_that_send(news.unsent)

    def _all_that_send(self, requests: set[str]) -> set[str]:
        """Those of the same transfers, too: several samples are one."""
        found = {self._outbound[one].transfer[:2] for one in requests & self._outbound.keys()}
        return {one for one, side in self._outbound.items() if side.transfer[:2] in found}

    def finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks are needed a while longer, and what the router is told."""
        request_id = request.request_id
        self._twins.pop(request_id, None)
        outbound = self._outbound.pop(request_id, None)
        inbound = self._inbound.pop(request_id, None)
        if request_id in self._loading:  # the scheduler itself waits for the workers' word
            self._loading.discard(request_id)
            self._next.aborts[request_id] = _reason(request)
        elif inbound is not None:
            self._next.declined.append(inbound)
        if outbound is None:
            return False, None
        return outbound.is_known, self._answer(request, outbound)

    def _answer(self, request: Any, outbound: Outbound) -> dict[str, Any] | None:
        """What the router carries to decode; None if there is nothing to be had."""
        request_id = request.request_id
        is_unsent = request_id in self._unsent
        self._unsent.discard(request_id)
        if request.status not in COMPLETE:
            if outbound.is_known:
                self._next.aborts[request_id] = _reason(request)
            elif not outbound.is_twin:
                self._next.withdrawn.append((outbound.transfer, _reason(request)))
            return None
        if self.peer_address is None:
            logger.warning("request %s is sent to nobody: no daemon was met", request_id)
            return None
        if is_unsent:
            logger.warning("request %s was not sent: decode is not told of it", request_id)
            return None
        return told(outbound.transfer._replace(source=self.peer_address))


def _read(request: Any, default_id: str | None = None) -> Transfer | None:
    """The transfer that a request's params name; with a warning, None if they do not."""
    params = request.kv_transfer_params
    if "traceparent" not in params:  # where vLLM makes traces itself, it has the request's header
        params = {**params, "traceparent": (request.trace_headers or {}).get("traceparent")}
    try:
        return transfer_of(params, default_id)
    except ValueError as error:
        logger.warning("request %s goes on alone: %s", request.request_id, error)
        return None


def _reason(request: Any) -> str:
    return f"request {request.request_id}: {RequestStatus(request.status).name.lower()}"
