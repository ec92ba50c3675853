"""The worker role of the vLLM connector: one rank's cache, and its ferry."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from kvferry_client.engine import NO_BLOCK, Ferry, ForwardPass, Incoming, Outgoing, Side
from kvferry_client.model_identity import PROMPT
from kvferry_client.vllm_cache import Cache
from kvferry_client.vllm_messages import BlockIds, Load, Save, StepMeta, Transfer
from kvferry_client.vllm_stats import KvferryStats
from kvferry_proto.runtime_dir import default_runtime_dir

logger = init_logger("vllm.kvferry.worker")
CONNECT_S = 30.0  # how long an engine's start waits for its daemon
SAY_AGAIN_S = 5.0


def runtime_dir_of(extra: Mapping[str, Any]) -> Path:
    """Where the daemon is: the connector's own setting, the environment's, or the daemon's default."""
    told = extra.get("runtime_dir") or os.environ.get("KVFERRY_RUNTIME_DIR")
    return Path(told) if told else default_runtime_dir()


def padded(tables: BlockIds, sizes: list[int], held_tokens: int, tokens: int) -> BlockIds:
    """Tables that hold ``held_tokens`` reach ``tokens``, their end rounded up; others stay as they are.

    Of groups with smaller blocks there may be nothing behind the end.
    """
    return tuple(
        [*table, *[NO_BLOCK] * (-(-tokens // size) - len(table))]
        if len(table) * size >= held_tokens
        else table
        for table, size in zip(tables, sizes, strict=True)
    )


class Results:
    """What became of requests since the last step."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self.lost_blocks: set[int] = set()


class WorkerSide:
    """One rank's. Nothing here waits for a daemon once the engine has started."""

    def __init__(
        self,
        cache: Cache,
        runtime_dir: Path,
        model: dict[str, str],
        *,
        name: str,
        rank: int,
        world_size: int,
    ) -> None:
        """``model``: as ``model_identity`` says it."""
        self._runtime_dir = runtime_dir
        self._cache = cache
        self._model = model
        self._tells = rank == 0  # the others have the same to tell
        self._block_sizes = [group.block_size_tokens for group in cache.groups]
        self._ferry = Ferry(
            runtime_dir, cache.layout, cache.groups, name=name, rank=rank, world_size=world_size
        )
        self._outgoing: dict[str, Outgoing] = {}
        self._finished: set[str] = set()  # requests that are over, and whose blocks we may hold
        self._unsent: set[str] = set()  # those that the scheduler knows of
        self._incoming: dict[str, tuple[Incoming, Load]] = {}
        self._started_s: dict[Side, float] = {}
        self._pass: ForwardPass | None = None
        self.stats = KvferryStats()

    @property
    def peer_address(self) -> str | None:
        """Where others reach this engine's daemon, as far as it is known."""
        return self._ferry.peer_address

    def wait_for_daemon(self, wait_s: float) -> bool:
        """Wait for the daemon, saying so; without it the engine starts all the same."""
        until_s = time.monotonic() + wait_s
        while (left_s := until_s - time.monotonic()) > 0:
            if self._ferry.wait_until_joined(min(SAY_AGAIN_S, left_s)):
                return True
            logger.warning(
                "waiting for kvferry's daemon in %s: %s",
                self._runtime_dir,
                self._ferry.refusal or "it has not answered yet",
            )
        logger.error("no daemon: transfers fail until there is one in %s", self._runtime_dir)
        return False

    def preempted(self, meta: StepMeta) -> None:
        """Let go of blocks that this step gives to others."""
        for request_id in meta.preempted:
            if request_id in self._outgoing:
                self._outgoing[request_id].forget()

    def start(self, meta: StepMeta) -> None:
        """Begin what is to be fetched, and give up what is not wanted any more."""
        for request_id, told in meta.loads.items():
            end_token = self._cache.rounded(told.end_token)
            tables = padded(told.tables, self._block_sizes, told.end_token, end_token)
            load = told._replace(end_token=end_token, tables=tables)
            incoming = self._receive(load.transfer, load)
            self._incoming[request_id] = incoming, load
            self._started_s[incoming] = time.monotonic()
        for transfer in meta.declined:
            self._receive(transfer, None)
        for transfer, reason in meta.withdrawn:
            self._ferry.withdraw(transfer.transfer_id, reason, attempt=transfer.attempt)
        for request_id, reason in meta.aborts.items():
            if request_id in self._incoming:
                self._incoming[request_id][0].abort(reason)
            if request_id in self._outgoing:
                self._outgoing[request_id].abort(reason)

    def _receive(self, transfer: Transfer, load: Load | None) -> Incoming:
        return self._ferry.receive(
            transfer.transfer_id,
            attempt=transfer.attempt,
            source=transfer.source,
            tables=load.tables if load else [],
            first_token=load.first_token if load else 0,
            end_token=load.end_token if load else 0,
            identity={**self._model, PROMPT: load.prompt} if load else self._model,
            traceparent=transfer.traceparent,
        )

    def begin(self, meta: StepMeta) -> None:
        """A step's pass through the layers begins: see ``layer_computed``."""
        self._pass = self._ferry.forward_pass()
        for request_id, save in meta.saves.items():
            outgoing = self._outgoing.get(request_id)
            if outgoing is None:
                outgoing = self._outgoing[request_id] = self._send(save)
            first = self._cache.whole(save.first_token, save.total_tokens)
            tokens = self._cache.whole(save.computed_tokens, save.total_tokens)
            outgoing.computing(self._tables(save, tokens), first, tokens, self._pass)

    def layer_computed(self, layer: str) -> None:
        """A layer has written all tokens of the step, or the GPU is about to."""
        plane = self._cache.planes.get(layer)
        if plane is not None and self._pass is not None:
            self._pass.plane_computed(plane)

    def save(self, meta: StepMeta) -> None:
        """The step is computed, or queued on the GPU: also layers that nothing was said of."""
        self._pass = None
        for request_id, save in meta.saves.items():
            tokens = self._cache.whole(save.computed_tokens, save.total_tokens)
            self._outgoing[request_id].computed(self._tables(save, tokens), tokens)

    def _tables(self, save: Save, tokens: int) -> BlockIds:
        return padded(save.tables, self._block_sizes, save.computed_tokens, tokens)

    def _send(self, save: Save) -> Outgoing:
        outgoing = self._ferry.send(
            save.transfer.transfer_id,
            attempt=save.transfer.attempt,
            total_tokens=self._cache.rounded(save.total_tokens),
            identity={**self._model, PROMPT: save.prompt},
            traceparent=save.transfer.traceparent,
        )
        self._started_s[outgoing] = time.monotonic()
        return outgoing

    def unsent(self) -> set[str]:
        """Requests that cannot be sent, and were not told yet."""
        failed = {one for one, side in self._outgoing.items() if side.error is not None}
        new, self._unsent = failed - self._unsent, failed
        return new

    def results(self, finished: set[str]) -> Results:
        """What has ended. Blocks of ``finished`` requests are kept until we say that they are sent."""
        found = Results()
        self._finished |= finished & self._outgoing.keys()
        for request_id in [one for one in self._finished if self._outgoing[one].ended]:
            self._finished.discard(request_id)
            outgoing = self._outgoing.pop(request_id)
            self._count(request_id, outgoing, "sent", outgoing.copied_tokens)
            if self._tells:
                self.stats.add("sent_planes_early", outgoing.early_planes)
            found.sent.add(request_id)
        for request_id in [one for one, (side, _) in self._incoming.items() if side.ended]:
            incoming, load = self._incoming.pop(request_id)
            taken_tokens = incoming.taken_tokens - load.first_token
            self._count(request_id, incoming, "received", taken_tokens)
            found.received.add(request_id)
            if incoming.error is not None:
                found.failed.add(request_id)
                found.lost_blocks |= self._lost(incoming, load)
        return found

    def _lost(self, incoming: Incoming, load: Load) -> set[int]:
        """The blocks that hold tokens which did not arrive."""
        taken_tokens = min(incoming.taken_tokens, load.end_token - 1)
        return {
            block
            for table, size in zip(load.tables, self._block_sizes, strict=True)
            for block in table[taken_tokens // size : -(-load.end_token // size)]
            if block != NO_BLOCK
        }

    def _count(self, request_id: str, side: Side, kind: str, tokens: int) -> None:
        took_s = time.monotonic() - self._started_s.pop(side)
        if self._tells:
            self.stats.record(kind, tokens, took_s, is_failure=side.error is not None)
        if side.error is not None:
            words = "request %s, transfer %s, attempt %d, was not %s: %s"
            logger.warning(words, request_id, side.transfer_id, side.attempt, kind, side.error)

    def close(self) -> None:
        """Leave the daemon."""
        self._ferry.close()
