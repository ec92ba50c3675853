"""What the connector adds to vLLM's own metrics."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

KINDS = ("sent", "received")


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
