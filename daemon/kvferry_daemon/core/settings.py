"""What the operator decides, as far as the node has to know it."""

from dataclasses import dataclass

from kvferry_daemon.core.events import Timing
from kvferry_daemon.core.records import HOST
from kvferry_daemon.core.tenants import Tenancy


@dataclass(frozen=True, slots=True)
class Settings:
    """For one life of a daemon."""

    boot_id: str
    daemon_id: str
    life: int
    pools_dir: str
    peer_address: str
    timing: Timing
    window_tokens: int
    budget_bytes: int
    pool_tokens: int | None
    source_share: float
    streams: int
    chunk_bytes: int
    transfers_max: int
    workers_max: int
    worker_transfers_max: int = 1 << 30
    deadline_max_s: float = 3600.0
    device: str = HOST  # where new pools lie
    tenancy: Tenancy = "off"
    tenant_budget_bytes: int | None = None  # of one; None: no less than the whole budget
    traced: bool = False  # the shell makes traces

    def pool_path(self, pool_id: str) -> str:
        """Where a pool's file lies."""
        return f"{self.pools_dir}/{pool_id}"
