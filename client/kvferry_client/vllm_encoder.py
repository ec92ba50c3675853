"""vLLM's connector for encoders on engines of their own: ``--ec-transfer-config`` names it.

    {"ec_connector": "KvferryEncoderConnector",
     "ec_connector_module_path": "kvferry_client.vllm_encoder",
     "ec_role": "ec_producer", "ec_connector_extra_config": {"runtime_dir": "/run/kvferry"}}

A request to the encoder's engine answers with ``ec_transfer_params``, which the consumer's request
carries. See docs/engines.md.
"""

import time
from typing import Any

import torch
import vllm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.encoder_output_width import get_encoder_output_width
from vllm.distributed.ec_transfer.ec_connector.utils import (
    PlaceholderMetadataResolver,
    collect_ec_item_metadata,
)
from vllm.logger import init_logger

from kvferry_client.engine_embeddings import EmbeddingFerry
from kvferry_client.vllm_encoder_messages import EncoderMeta, Kind
from kvferry_client.vllm_encoder_scheduler import Consuming, Producing
from kvferry_client.vllm_encoder_worker import EncoderWorker, Ferries
from kvferry_client.vllm_identity import CACHE_DTYPE, model_identity
from kvferry_client.vllm_versions import check_version
from kvferry_client.vllm_worker import CONNECT_S, runtime_dir_of

logger = init_logger("vllm.kvferry.encoder")


class KvferryEncoderConnector(ECConnectorBase):  # type: ignore[misc]
    """Both roles: vLLM makes one in its scheduler and one in each worker."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        super().__init__(vllm_config, role)
        self._extra = vllm_config.ec_transfer_config.ec_connector_extra_config
        check_version(vllm.__version__, self._extra)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("KvferryEncoderConnector supports no pipeline_parallel_size above 1")
        identity = model_identity(vllm_config, self._extra)
        identity.pop(CACHE_DTYPE)  # an encoder has no KV cache
        self._identity = identity
        self._ferries = Ferries(self._ferry)
        self._worker: EncoderWorker | None = None
        self._next = EncoderMeta()
        self._resolver = PlaceholderMetadataResolver(vllm_config.model_config)
        if role is ECConnectorRole.SCHEDULER:
            self._producing = Producing(self._kind_of, self._items_of)
            self._consuming = Consuming(self._ferries, self._has_media)
            if self.is_producer:
                self._meet_daemon()
        elif self.is_producer and get_tensor_model_parallel_rank() == 0:
            self._worker = EncoderWorker(self._ferries)

    def shutdown(self) -> None:
        """Leave the daemon."""
        self._ferries.close()

    # The worker's side.

    def start_save_caches(self, **kwargs: Any) -> None:
        """Note what the step's requests want sent, and send what is encoded already."""
        if self._worker is not None:
            self._worker.step(self._get_connector_metadata(), kwargs["encoder_cache"])

    def save_caches(
        self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any
    ) -> None:
        """Send what was just encoded, to all who want it."""
        if self._worker is not None:
            self._worker.encoded(mm_hash, encoder_cache[mm_hash])

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Put what the scheduler has fetched where the model looks."""
        device = self._vllm_config.device_config.device
        for mm_hash, tensor in self._get_connector_metadata().loads.items():
            if mm_hash not in encoder_cache:
                encoder_cache[mm_hash] = tensor.to(device)

    # The scheduler's side.

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item is here and need not be encoded."""
        return self.is_consumer and self._consuming.tensor(identifier) is not None

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """Fetch what a request needs; whether it is here. Nothing is waited for."""
        if self.is_producer:
            self._producing.seen(request, self._next)
        return not self.is_consumer or self._consuming.are_here(request, num_computed_tokens)

    def take_unavailable_requests(self) -> set[str]:
        """Requests that need an item which cannot be had."""
        found, self._consuming.unavailable = self._consuming.unavailable, set()
        return found

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """An item has a place in the encoder's cache: let it be put there, if it was fetched."""
        mm_hash = request.mm_features[index].identifier
        tensor = self._consuming.tensor(mm_hash) if self.is_consumer else None
        if tensor is not None:
            self._next.loads[mm_hash] = tensor

    def build_connector_meta(self, scheduler_output: Any) -> EncoderMeta:
        """What the workers have to know. They hear of no step that schedules nothing."""
        if not scheduler_output.total_num_scheduled_tokens and self.is_consumer:
            return EncoderMeta()
        meta, self._next = self._next, EncoderMeta()
        return meta

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """Let go of what a request has fetched; what the router is told of what it encoded."""
        if self.is_consumer:
            self._consuming.finished(request)
        if not self.is_producer or not request.mm_features:
            return False, None
        return False, self._producing.finished(request, self._next, self._ferries.peer_address)

    def _ferry(self, kind: Kind) -> EmbeddingFerry:
        device = torch.device(self._vllm_config.device_config.device)
        if self.role is ECConnectorRole.SCHEDULER:
            device = torch.device("cpu")
        engine = self._vllm_config.ec_transfer_config.engine_id
        name = f"vllm encoder {engine}"
        directory = runtime_dir_of(self._extra)
        return EmbeddingFerry(directory, kind.dtype, kind.width, self._identity, device, name)

    def _meet_daemon(self) -> None:
        """Learn the daemon's address, which the first answer has to have."""
        wait_s = float(self._extra.get("connect_s", CONNECT_S))
        until_s = time.monotonic() + wait_s
        for modality in self._vllm_config.ec_transfer_config.mm_encoder_output_widths:
            ferry = self._ferries.of(self._kind_of(modality))
            if not ferry.wait_until_joined(max(0.0, until_s - time.monotonic())):
                logger.error("no daemon: nothing is sent until there is one: %s", ferry.refusal)

    def _kind_of(self, modality: str) -> Kind:
        dtype = str(self._vllm_config.model_config.dtype).removeprefix("torch.")
        return Kind(dtype, get_encoder_output_width(self._vllm_config, modality))

    def _items_of(self, request: Any) -> dict[str, Any]:
        return dict(collect_ec_item_metadata(request.mm_features, self._resolver))

    def _has_media(self, feature: Any) -> bool:
        """Whether there is more of an item than what says how long it is."""
        said = self._resolver.fields_for(feature.modality)
        return bool(feature.data) and any(
            value.data is not None for name, value in feature.data.items() if name not in said
        )
