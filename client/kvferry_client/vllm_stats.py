"""What the connector adds to vLLM's own metrics: its log, and Prometheus."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

SHOWN = {
    "sent_transfers": "Prompts sent to a decode engine, failed ones included.",
    "sent_failures": "Prompts that could not be copied into the daemon's windows.",
    "sent_tokens": "Tokens copied into the daemon's windows.",
    "sent_seconds": "Seconds from a prompt's first step until all of it was copied.",
    "sent_planes_early": "Planes copied before the forward pass that computed them was over.",
    "received_transfers": "Prompts fetched from a prefill engine, failed ones included.",
    "received_failures": "Prompts that did not arrive whole.",
    "received_tokens": "Tokens that arrived from a prefill engine.",
    "received_seconds": "Seconds from asking for a prompt until it had arrived.",
}


class KvferryStats(KVConnectorStats):  # type: ignore[misc]
    """Counts and sums of an interval: transfers, failures, tokens and seconds of either direction."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=dict(data or {}))

    def record(self, kind: str, tokens: int, took_s: float, *, is_failure: bool) -> None:
        """One transfer that has ended."""
        for name, value in (
            (f"{kind}_transfers", 1),
            (f"{kind}_failures", int(is_failure)),
            (f"{kind}_tokens", tokens),
            (f"{kind}_seconds", took_s),
        ):
            self.add(name, value)

    def add(self, name: str, value: float) -> None:
        """Count on."""
        self.data[name] = self.data.get(name, 0) + value

    def reset(self) -> None:
        """Begin a new interval."""
        self.data: dict[str, Any] = {}

    def taken(self) -> "KvferryStats | None":
        """This interval's, if there is anything to tell; a new one begins."""
        if self.is_empty():
            return None
        taken = KvferryStats(self.data)
        self.reset()
        return taken

    def aggregate(self, other: Any) -> "KvferryStats":
        """Add another worker's or interval's."""
        names = self.data.keys() | other.data.keys()
        return KvferryStats(
            {name: self.data.get(name, 0) + other.data.get(name, 0) for name in sorted(names)}
        )

    def reduce(self) -> dict[str, int | float]:
        """What vLLM logs."""
        return {f"kvferry {name.replace('_', ' ')}": value for name, value in self.data.items()}

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


class KvferryPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """A counter for each number of ``KvferryStats``: ``vllm:kvferry_sent_tokens_total`` ..."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(
                    name=f"vllm:kvferry_{name}", documentation=words, labelnames=labelnames
                ),
                per_engine_labelvalues,
            )
            for name, words in SHOWN.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count an interval in."""
        for name, value in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(value)
