"""The worker role of the encoder connector: sends what the encoder puts out."""

from collections.abc import Callable

import torch
from vllm.logger import init_logger

from kvferry_client.engine_embeddings import EmbeddingFerry, OutgoingTensor
from kvferry_client.vllm_encoder_messages import EncoderMeta, Kind, Parcel

logger = init_logger("vllm.kvferry.encoder")
WAITING_TOKENS_MAX = 1 << 17  # encoded and not yet copied: they keep the encoder's memory


class Ferries:
    """A ferry for each kind of tensor, made when it is first needed."""

    def __init__(self, make: Callable[[Kind], EmbeddingFerry]) -> None:
        self._make = make
        self._made: dict[Kind, EmbeddingFerry] = {}

    def of(self, kind: Kind) -> EmbeddingFerry:
        """The one for a kind."""
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        return self._made[kind]

    @property
    def peer_address(self) -> str | None:
        """Where others reach the daemon, as far as it is known."""
        return next((one.peer_address for one in self._made.values() if one.peer_address), None)

    def close(self) -> None:
        """Leave the daemon."""
        for ferry in self._made.values():
            ferry.close()


class EncoderWorker:
    """One rank's; of a group the first one's, since all have the same embeddings."""

    def __init__(self, ferries: Ferries) -> None:
        self._ferries = ferries
        self._wanted: dict[str, list[Parcel]] = {}
        self._sides: list[tuple[OutgoingTensor, int]] = []

    def step(self, meta: EncoderMeta, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Note what a step's requests want; what the cache has goes at once."""
        for mm_hash, parcel in meta.sends:
            self._wanted.setdefault(mm_hash, []).append(parcel)
        for mm_hash in self._wanted.keys() & encoder_cache.keys():
            self.encoded(mm_hash, encoder_cache[mm_hash])
        for mm_hash, parcel in meta.over:
            if parcel in self._wanted.get(mm_hash, ()):
                self._wanted[mm_hash].remove(parcel)
                self._send(parcel, None)

    def encoded(self, mm_hash: str, tensor: torch.Tensor) -> None:
        """An item is encoded, or is about to be on the GPU."""
        for parcel in self._wanted.pop(mm_hash, ()):
            self._send(parcel, tensor)

    def _send(self, parcel: Parcel, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            found = Kind(str(tensor.dtype).removeprefix("torch."), tensor.shape[-1])
            if tensor.ndim != 2 or found != parcel.kind:
                logger.error("%s: %s of %s was expected", parcel, tuple(tensor.shape), tensor.dtype)
                tensor = None
        self._sides = [(side, tokens) for side, tokens in self._sides if not side.ended]
        waiting_tokens = sum(tokens for _, tokens in self._sides)
        if tensor is not None and waiting_tokens > WAITING_TOKENS_MAX:
            logger.error("%s is not sent: %d tokens wait for the daemon", parcel, waiting_tokens)
            tensor = None
        side = self._ferries.of(parcel.kind).send(parcel.transfer_id, parcel.attempt, tensor)
        self._sides.append((side, 0 if tensor is None else len(tensor)))
