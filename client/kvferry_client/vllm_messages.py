"""What the connector's scheduler and worker roles tell each other; all of it can be pickled by vLLM."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvferry_client.engine import NO_BLOCK
from kvferry_proto.fields import TRACEPARENT_CHARS_MAX

BlockIds = tuple[list[int], ...]  # a block table for each group of layers
NULL_BLOCK = 0  # vLLM's block that stands where a sliding window has let go of one


class Transfer(NamedTuple):
    """What a router's ``kv_transfer_params`` name."""

    transfer_id: str
    attempt: int
    source: str | None  # the prefill daemon's peer address; the sink needs it
    traceparent: str | None = None  # the router's trace, W3C


class Load(NamedTuple):
    """Tokens [first_token, end_token) are to be fetched into these blocks."""

    transfer: Transfer
    tables: BlockIds
    first_token: int
    end_token: int
    prompt: str  # which, as ``prompt_identity`` says it


class Save(NamedTuple):
    """This step computes tokens [first_token, computed_tokens) of ``total_tokens`` in these blocks."""

    transfer: Transfer
    tables: BlockIds
    first_token: int
    computed_tokens: int
    total_tokens: int
    prompt: str  # as in a ``Load``


@dataclass
class StepMeta(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to the workers, each step; everything by vLLM's request id."""

    loads: dict[str, Load] = field(default_factory=dict)
    saves: dict[str, Save] = field(default_factory=dict)
    aborts: dict[str, str] = field(default_factory=dict)  # the reason
    preempted: set[str] = field(default_factory=set)
    declined: list[Transfer] = field(default_factory=list)  # nobody will fetch these
    withdrawn: list[tuple[Transfer, str]] = field(
        default_factory=list
    )  # nobody will send these: why


@dataclass
class Address(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """From a worker to the scheduler, at the start: where others reach the daemon of this engine."""

    peer_address: str


@dataclass
class News(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From a worker to the scheduler, after a step: what is new at its daemon."""

    peer_address: str | None  # of the daemon, if it is another one
    unsent: set[str]  # requests that will not be sent

    def aggregate(self, other: "News") -> "News":
        """Of the workers of one engine, which all have one daemon."""
        return News(self.peer_address or other.peer_address, self.unsent | other.unsent)


def tables_of(block_ids: Any, groups: tuple[int, ...]) -> BlockIds:
    """Copies of the block tables of the groups that travel, with ours for no block."""
    return tuple(
        [NO_BLOCK if block == NULL_BLOCK else block for block in block_ids[group]]
        for group in groups
    )


def transfer_of(params: dict[str, Any], default_id: str | None = None) -> Transfer:
    """Read a router's params; ValueError names what is wrong with them."""
    transfer_id = params.get("transfer_id", default_id)
    attempt, source = params.get("attempt", 0), params.get("source")
    if not isinstance(transfer_id, str) or not transfer_id:
        raise ValueError(f"transfer_id is a name, not {transfer_id!r}")
    if not isinstance(attempt, int) or isinstance(attempt, bool) or attempt < 0:
        raise ValueError(f"attempt is a number from 0, not {attempt!r}")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"source is the prefill daemon's address, not {source!r}")
    return Transfer(transfer_id, attempt, source, _traceparent(params))


def told(transfer: Transfer) -> dict[str, Any]:
    """What a router carries from prefill to decode."""
    named = {name: value for name, value in transfer._asdict().items() if value is not None}
    return {"do_remote_prefill": True, "do_remote_decode": False, **named}


def _traceparent(params: dict[str, Any]) -> str | None:
    """No request fails for its trace: what cannot be one is left out, as W3C asks for."""
    told = params.get("traceparent")
    return told if isinstance(told, str) and len(told) <= TRACEPARENT_CHARS_MAX else None
