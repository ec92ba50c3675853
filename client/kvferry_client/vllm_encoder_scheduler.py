"""The scheduler role of the encoder connector: names transfers, and fetches what a request needs.

A consumer fetches in the scheduler's process. vLLM's workers do nothing while no request can be
scheduled, so that what one waits for must not need them; and every rank wants the same bytes.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from kvferry_client.engine_embeddings import IncomingTensor
from kvferry_client.vllm_encoder_messages import (
    EncoderMeta,
    Kind,
    Parcel,
    parcel_for,
    parcel_of,
    told,
)
from kvferry_client.vllm_encoder_worker import Ferries
from kvferry_client.vllm_scheduler import COMPLETE, FirstOnes

logger = init_logger("vllm.kvferry.encoder")
HELD_TOKENS_MAX = 1 << 17  # fetched for requests that have not ended; one request may have more


class Producing:
    """What requests of an encoder engine send."""

    def __init__(
        self, kind_of: Callable[[str], Kind], items_of: Callable[[Any], dict[str, Any]]
    ) -> None:
        """``kind_of`` a modality; ``items_of`` a request: what vLLM itself tells of its items."""
        self._kind_of, self._items_of = kind_of, items_of
        self._first = FirstOnes()
        self._promised: dict[str, dict[str, Parcel]] = {}

    def seen(self, request: Any, meta: EncoderMeta) -> None:
        """Have the items of a request sent as they are encoded; once."""
        if request.request_id in self._promised:
            return
        found = self._promised[request.request_id] = {}
        params = _params(request)
        for feature in request.mm_features:
            kind = self._kind_of(feature.modality)
            try:
                parcel = parcel_for(params, request.request_id, feature.identifier, kind)
            except ValueError as error:
                logger.warning("request %s is not sent: %s", request.request_id, error)
                return
            if feature.identifier in found:
                continue
            found[feature.identifier] = parcel
            if self._first.first(*parcel[:2], request.request_id) == request.request_id:
                meta.sends.append((feature.identifier, parcel))

    def finished(
        self, request: Any, meta: EncoderMeta, source: str | None
    ) -> dict[str, Any] | None:
        """What the router is told. What the encoder did not put out by now it never will."""
        promised = self._promised.pop(request.request_id, {})
        meta.over += promised.items()
        if request.status not in COMPLETE:
            return None
        items = self._items_of(request)
        if source is None:
            logger.warning("request %s is sent to nobody: no daemon was met", request.request_id)
            return items or None
        for mm_hash, parcel in promised.items():
            items.setdefault(mm_hash, {}).update(told(parcel, source))
        return items or None


class Fetch:
    """One item that is fetched, for the requests that named this transfer."""

    def __init__(self, mm_hash: str, side: IncomingTensor, tokens: int) -> None:
        self.mm_hash = mm_hash
        self.side = side
        self.tokens = tokens
        self.requests: set[str] = set()

    @property
    def tensor(self) -> torch.Tensor | None:
        """The embedding, once it is here."""
        return self.side.tensor if self.side.ended and self.side.error is None else None


class Consuming:
    """What requests of an engine need, and what of it is here."""

    def __init__(self, ferries: Ferries, has_media: Callable[[Any], bool]) -> None:
        """``has_media`` of a feature: whether this engine could encode it itself."""
        self._ferries, self._has_media = ferries, has_media
        self._announced: dict[str, dict[str, Parcel]] = {}  # by request and item: to be fetched
        self._fetches: dict[Parcel, Fetch] = {}
        self._held_tokens = 0
        self._doomed: set[str] = set()  # requests without an item, until they have ended
        self.unavailable: set[str] = set()  # those of which vLLM does not know yet

    def tensor(self, mm_hash: str) -> torch.Tensor | None:
        """An item that is here; it stays until the requests that fetched it have ended."""
        found = (one.tensor for one in self._fetches.values() if one.mm_hash == mm_hash)
        return next((tensor for tensor in found if tensor is not None), None)

    def are_here(self, request: Any, computed_tokens: int) -> bool:
        """Whether all items behind ``computed_tokens`` are here, or will be encoded here."""
        announced = self._announced_to(request)
        needed: dict[Parcel, Any] = {}
        for feature in request.mm_features:
            parcel = announced.get(feature.identifier)
            position = feature.mm_position
            is_needed = position.offset + position.length > computed_tokens
            if parcel is None:
                if is_needed and not self._can_do_without(request, feature):
                    self._fail(request, "nobody sends it")
            elif is_needed:
                needed[parcel] = feature
        if request.request_id in self._doomed:
            return False
        held = self._fetches.keys() & announced.values()
        for parcel in held:  # also what it does not need now: it may be preempted
            self._fetches[parcel].requests.add(request.request_id)
        missing = [_tokens(needed[one]) for one in needed.keys() - held]
        if not held and not self._have_room_for(missing):  # who holds some may have all
            return False
        here = [self._is_here(request, *one) for one in needed.items()]  # all of them are asked for
        return all(here)

    def finished(self, request: Any) -> None:
        """A request holds nothing any more. The sources of what nobody fetched or will are told so."""
        announced = self._announced_to(request)
        del self._announced[request.request_id]
        others = (one.values() for one in self._announced.values())
        for parcel in set(announced.values()).difference(self._fetches, *others):
            ferry = self._ferries.of(parcel.kind)
            ferry.receive(parcel.transfer_id, parcel.attempt, parcel.source, 0)
        self._doomed.discard(request.request_id)
        self.unavailable.discard(request.request_id)
        for parcel, fetch in list(self._fetches.items()):
            fetch.requests.discard(request.request_id)
            if not fetch.requests:
                del self._fetches[parcel]
                self._held_tokens -= fetch.tokens
                if not fetch.side.ended:
                    fetch.side.abort(f"request {request.request_id} is over")

    def _announced_to(self, request: Any) -> dict[str, Parcel]:
        """What a router told of a request's items, without those that are encoded here."""
        known = self._announced.get(request.request_id)
        if known is not None:
            return known
        found = self._announced[request.request_id] = {}
        for feature in request.mm_features:
            try:
                parcel = parcel_of(_params(request).get(feature.identifier))
            except ValueError as error:
                words = "request %s has an item that is not fetched: %s"
                logger.warning(words, request.request_id, error)
                continue
            if parcel is not None:
                found[feature.identifier] = parcel
        return found

    def _have_room_for(self, tokens: list[int]) -> bool:
        """Whether so much more may be held: all of a request's items, or two wait for each other."""
        return (
            not tokens
            or not self._held_tokens
            or self._held_tokens + sum(tokens) <= HELD_TOKENS_MAX
        )

    def _is_here(self, request: Any, parcel: Parcel, feature: Any) -> bool:
        fetch = self._fetches.get(parcel)
        if fetch is None:
            tokens = _tokens(feature)
            ferry = self._ferries.of(parcel.kind)
            side = ferry.receive(parcel.transfer_id, parcel.attempt, parcel.source, tokens)
            fetch = self._fetches[parcel] = Fetch(feature.identifier, side, tokens)
            self._held_tokens += tokens
            fetch.requests.add(request.request_id)
        if not fetch.side.ended:
            return False
        if fetch.side.error is None:
            return True
        return self._without(request, feature, str(fetch.side.error))

    def _without(self, request: Any, feature: Any, why: str) -> bool:
        """Encode an item here that cannot be fetched, or fail its request; whether the former."""
        self._announced[request.request_id].pop(feature.identifier, None)
        if self._has_media(feature):
            logger.warning("request %s encodes an item itself: %s", request.request_id, why)
            return True
        self._fail(request, why)
        return False

    def _can_do_without(self, request: Any, feature: Any) -> bool:
        """Whether an item that is not fetched can be encoded here, or is here for another request.

        vLLM lets in no request that has neither media nor params.
        """
        return (
            not _params(request)
            or self._has_media(feature)
            or self._shares(request, feature.identifier)
        )

    def _shares(self, request: Any, mm_hash: str) -> bool:
        """Whether an item is here for another request; it stays for this one, too, then."""
        found = [
            one
            for one in self._fetches.values()
            if one.mm_hash == mm_hash and one.tensor is not None
        ]
        for one in found:
            one.requests.add(request.request_id)
        return bool(found)

    def _fail(self, request: Any, why: str) -> None:
        """Have vLLM fail a request. It asks for those after a step, and schedules others meanwhile."""
        if request.request_id not in self._doomed:
            logger.error("request %s fails without an item: %s", request.request_id, why)
            self._doomed.add(request.request_id)
            self.unavailable.add(request.request_id)


def _tokens(feature: Any) -> int:
    return int(feature.mm_position.get_num_embeds())


def _params(request: Any) -> dict[str, Any]:
    """What a router told, if it can be read at all: clients may write anything there."""
    told = request.ec_transfer_params
    return told if isinstance(told, dict) else {}
