"""What is counted for metrics: sums that only grow, and how long things took."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvferry_daemon.core.events import StreamKey
from kvferry_proto.errors import Code
from kvferry_proto.states import Role, StallReason

if TYPE_CHECKING:
    from kvferry_daemon.core.transfer import Transfer

CHUNK_EDGES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
TRANSFER_EDGES_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
Stall = tuple[Role, StallReason]


class Times:
    """How long something took: a count for each bucket, and the last one that fell into it."""

    def __init__(self, edges_s: Sequence[float]) -> None:
        self.edges_s = edges_s
        self.counts = [0] * (len(edges_s) + 1)
        self.last: list[tuple[str, float] | None] = [None] * (len(edges_s) + 1)
        self.sum_s = 0.0

    def add(self, took_s: float, transfer_id: str) -> None:
        """One more."""
        bucket = bisect_left(self.edges_s, took_s)
        self.counts[bucket] += 1
        self.last[bucket] = (transfer_id, took_s)
        self.sum_s += took_s


class Meters:
    """One a node. What a live transfer has so far is added when somebody asks."""

    def __init__(self) -> None:
        self.stalls: Counter[Stall] = Counter()  # how often one began
        # Of those that are over. All are there from the first: what grows would be taken for a leak.
        self.stalled_s: dict[Stall, float] = {
            (role, why): 0.0 for role in Role for why in StallReason
        }
        self.failed: Counter[tuple[Role, str]] = Counter(
            {(role, code.value): 0 for role in Role for code in Code}
        )
        self.tokens: Counter[Role] = Counter()  # of transfers that have ended
        self.moved_tokens: Counter[Role] = Counter()  # of all, in this life of the daemon
        self.chunk_s = Times(CHUNK_EDGES_S)
        self.transfer_s = {role: Times(TRANSFER_EDGES_S) for role in Role}
        self._claimed: dict[StreamKey, dict[tuple[int, int], float]] = {}

    def moved(self, transfer: Transfer) -> None:
        """A transfer's numbers are different."""
        history, stall = transfer.history, transfer.stall
        if stall is not history.stall:
            role, now_s = transfer.key.role, transfer.now_s
            if history.stall is not None:
                self.stalled_s[role, history.stall] += now_s - history.stall_since_s
            if stall is not None:
                self.stalls[role, stall] += 1
            history.stall, history.stall_since_s = stall, now_s
        if (sent := transfer.sent_tokens) != history.counted_tokens:
            if history.counted_tokens >= 0:
                self.moved_tokens[transfer.key.role] += sent - history.counted_tokens
            history.counted_tokens = sent
        history.note(transfer)

    def ended(self, transfer: Transfer) -> None:
        """A transfer has come to its end."""
        key = transfer.key
        if transfer.error is not None:
            self.failed[key.role, transfer.error.code] += 1
        self.tokens[key.role] += transfer.sent_tokens - transfer.opening.start_tokens
        self.transfer_s[key.role].add(transfer.now_s - transfer.opened_s, key.transfer_id)

    # --- chunks: a claim ends in place, for nothing, or with its connection ---

    def claimed(self, key: StreamKey, handle: int, first_token: int, now_s: float) -> None:
        """A chunk is asked for."""
        self._claimed.setdefault(key, {})[handle, first_token] = now_s

    def received(
        self, key: StreamKey, handle: int, first_token: int, now_s: float, transfer_id: str
    ) -> None:
        """It is in place."""
        began_s = self._unclaimed(key, handle, first_token)
        if began_s is not None:
            self.chunk_s.add(now_s - began_s, transfer_id)

    def missed(self, key: StreamKey, handle: int, first_token: int) -> None:
        """It will not come."""
        self._unclaimed(key, handle, first_token)

    def stream_down(self, key: StreamKey) -> None:
        """Nothing more comes on this connection."""
        self._claimed.pop(key, None)

    def _unclaimed(self, key: StreamKey, handle: int, first_token: int) -> float | None:
        claims = self._claimed.get(key)
        if claims is None:
            return None
        began_s = claims.pop((handle, first_token), None)
        if not claims:
            del self._claimed[key]
        return began_s
