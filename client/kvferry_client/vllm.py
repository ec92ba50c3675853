"""vLLM's connector: ``--kv-transfer-config`` names it, and prompts travel through kvferry.

    {"kv_connector": "KvferryConnector", "kv_connector_module_path": "kvferry_client.vllm",
     "kv_role": "kv_both", "kv_connector_extra_config": {"runtime_dir": "/run/kvferry"}}

A request with ``kv_transfer_params`` of ``{"do_remote_decode": true, "transfer_id", "attempt"}`` is
prefill: its prompt is sent while it is computed, and its response carries the params that decode
needs. See docs/engines.md.
"""

from typing import Any

import torch
import vllm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvferry_client.vllm_cache import cache_of, keeps_all_blocks
from kvferry_client.vllm_identity import model_identity
from kvferry_client.vllm_messages import Address, News, StepMeta
from kvferry_client.vllm_scheduler import SchedulerSide
from kvferry_client.vllm_stats import KvferryPromMetrics, KvferryStats
from kvferry_client.vllm_versions import check_version
from kvferry_client.vllm_worker import CONNECT_S, Results, WorkerSide, runtime_dir_of

POOL_BLOCK_TOKENS = 128


class KvferryConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Both roles: vLLM makes one in its scheduler and one in each worker."""

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        check_version(vllm.__version__, self._extra)
        _check_parallel(vllm_config.parallel_config)
        self._groups = tuple(kv_cache_config.transfer_group_ids)
        self._scheduler: SchedulerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            keeps_blocks = keeps_all_blocks(kv_cache_config)
            self._scheduler = SchedulerSide(self._groups, keeps_blocks=keeps_blocks)
        self._worker: WorkerSide | None = None
        self._layers_tell = _runs_layers_once(vllm_config)
        self._told_address: str | None = None
        self._lost_blocks: set[int] = set()

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Look at the cache, and begin to join the daemon."""
        parallel = self._vllm_config.parallel_config
        rank = get_tensor_model_parallel_rank()
        pool_block_tokens = self._extra.get("block_size_tokens", POOL_BLOCK_TOKENS)
        cache = cache_of(kv_caches, self._vllm_config, self._kv_cache_config, pool_block_tokens)
        self._worker = WorkerSide(
            cache,
            runtime_dir_of(self._extra),
            model_identity(self._vllm_config, self._extra),
            name=f"vllm {self._kv_transfer_config.engine_id} rank {rank}",
            rank=rank,
            world_size=parallel.tensor_parallel_size,
        )

    def get_handshake_metadata(self) -> Address | None:
        """Where the daemon is, waiting for it; later ones tell it with a step's results."""
        assert self._worker is not None
        if not self._worker.wait_for_daemon(float(self._extra.get("connect_s", CONNECT_S))):
            return None
        address = self._new_address()
        return None if address is None else Address(address)

    def _new_address(self) -> str | None:
        """Where the daemon is, if that has changed."""
        assert self._worker is not None
        address = self._worker.peer_address
        if address == self._told_address:
            return None
        self._told_address = address
        return address

    def build_connector_worker_meta(self) -> News | None:
        """What the scheduler has to know, if there is anything."""
        assert self._worker is not None
        news = News(self._new_address(), self._worker.unsent())
        return news if news.peer_address or news.unsent else None

    def bind_connector_metadata(self, connector_metadata: StepMeta) -> None:
        """A step begins: its layers tell as they are computed."""
        super().bind_connector_metadata(connector_metadata)
        assert self._worker is not None
        self._worker.begin(connector_metadata)

    def handle_preemptions(self, kv_connector_metadata: StepMeta) -> None:
        """Let go of blocks before others write them."""
        assert self._worker is not None
        self._worker.preempted(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin what the step brought; nothing is waited for."""
        assert self._worker is not None
        self._worker.start(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: requests are scheduled only when all of their layers are here."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """This layer can be copied, while the next ones are computed."""
        if self._layers_tell:
            assert self._worker is not None
            self._worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        """Say what the step computed. What is not copied yet is, beside the next steps."""
        assert self._worker is not None
        self._worker.save(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What has ended since the last step."""
        found = self._results(finished_req_ids)
        several = len(self._groups) > 1  # then blocks have no names of their own
        self._lost_blocks |= set() if several else found.lost_blocks
        failed = found.failed if several else set()
        return KVConnectorTransferResults(found.sent, found.received, failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The same in the older words."""
        found = self.get_transfer_results(finished_req_ids)
        return found.finished_sending or None, found.finished_recving or None

    def _results(self, finished_req_ids: set[str]) -> Results:
        assert self._worker is not None
        return self._worker.results(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of tokens that did not arrive, once."""
        lost, self._lost_blocks = self._lost_blocks, set()
        return lost

    def get_kv_connector_stats(self) -> KvferryStats | None:
        """The worker's, since the last step."""
        return None if self._worker is None else self._worker.stats.taken()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvferryStats:
        """Stats that came from another process."""
        return KvferryStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> KvferryPromMetrics:
        """The same numbers, for Prometheus."""
        return KvferryPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Leave the daemon; no block is touched any more."""
        if self._worker is not None:
            self._worker.close()

    # The scheduler's side.

    @property
    def _told(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Address]) -> None:
        """The daemon's address, if there was one at the start."""
        for address in metadata.values():
            self._told.peer_address = address.peer_address

    def on_new_request(self, request: Any) -> None:
        """Look at a request's params."""
        self._told.new_request(request)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """All groups that travel: a request's own blocks are fetched, not those of a cache."""
        return self._groups

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """The part of the prompt that is missing here, if it was computed elsewhere."""
        return self._told.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Fetch into these blocks."""
        self._told.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMeta:
        """What the workers have to know of this step."""
        return self._told.step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers told."""
        self._told.worked(connector_output)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks are still read from, and what the router is told."""
        return self._told.finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same, of all groups of layers."""
        return self._told.finished(request)


def _runs_layers_once(vllm_config: Any) -> bool:
    """Whether a layer has all tokens of a step when it is first through with some.

    Micro-batches come after each other, and a draft model runs several times.
    """
    parallel = vllm_config.parallel_config
    return vllm_config.speculative_config is None and not parallel.use_ubatching


def _check_parallel(parallel: Any) -> None:
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(f"KvferryConnector does not support a {name} above 1")
