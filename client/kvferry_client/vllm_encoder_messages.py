"""What the encoder connector's roles tell each other, and what engines tell a router."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata

from kvferry_client.vllm_messages import transfer_of
from kvferry_proto.layout import Dtype

NAME_CHARS_MAX = 100  # of what a router or vLLM calls a request; the item's name comes behind
WIDTH_MAX = 1 << 16  # of a token's embedding


class Kind(NamedTuple):
    """Of a tensor: what has to be known of it before it is there."""

    dtype: str
    width: int


class Parcel(NamedTuple):
    """One item's embedding on its way: for one consumer of one request, and one attempt of it."""

    transfer_id: str
    attempt: int
    source: str | None
    kind: Kind


@dataclass
class EncoderMeta(ECConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to the workers, each step; all by the item's hash."""

    sends: list[tuple[str, Parcel]] = field(default_factory=list)
    over: list[tuple[str, Parcel]] = field(default_factory=list)  # not sent by now: never
    loads: dict[str, torch.Tensor] = field(default_factory=dict)


def parcel_for(params: dict[str, Any], request_id: str, mm_hash: str, kind: Kind) -> Parcel:
    """The transfer of an item of one request; ValueError for params that cannot be read.

    A hash alone names many encodes. A request is of one consumer, so that an item which several of
    them want, or which is still in the encoder's cache, has a transfer for each.
    """
    named = transfer_of(params, request_id)
    item = hashlib.sha256(mm_hash.encode()).hexdigest()[:16]
    return Parcel(f"{named.transfer_id[:NAME_CHARS_MAX]}.{item}", named.attempt, None, kind)


def told(parcel: Parcel, source: str) -> dict[str, Any]:
    """What a router carries from the encoder to the consumer."""
    return {
        "transfer_id": parcel.transfer_id,
        "attempt": parcel.attempt,
        "source": source,
        "dtype": parcel.kind.dtype,
        "width": parcel.kind.width,
    }


def parcel_of(announced: Any) -> Parcel | None:
    """Read that; None if there is no transfer in it. ValueError names what is wrong."""
    if not isinstance(announced, dict) or "transfer_id" not in announced:
        return None
    named = transfer_of(announced)
    kind = Kind(announced.get("dtype", ""), announced.get("width", 0))
    if (
        kind.dtype not in [*Dtype]
        or type(kind.width) is not int
        or not 1 <= kind.width <= WIDTH_MAX
    ):
        raise ValueError(
            f"dtype and width are of an embedding, not {kind.dtype!r} and {kind.width!r}"
        )
    return Parcel(named.transfer_id, named.attempt, named.source, kind)
