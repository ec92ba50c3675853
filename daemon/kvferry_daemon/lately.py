"""What moved lately: looks at sums that only grow, and what they grew by a second between two."""

from collections import deque

from kvferry_daemon.core.node import Node
from kvferry_proto.control import RateStatus
from kvferry_proto.states import Role

OVER_S = 10.0
EVERY_S = 0.5  # at most: a heartbeat may be short
Sums = tuple[int, ...]


class Lately:
    """Looked at in every heartbeat; what it costs does not depend on how much there is."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._looks: deque[tuple[float, Sums]] = deque()

    def look(self, now_s: float) -> None:
        """Keep what the sums are now, and of earlier looks those of the last ten seconds."""
        looks = self._looks
        if looks and now_s - looks[-1][0] < EVERY_S:
            return
        looks.append((now_s, self._sums()))
        while len(looks) > 1 and looks[1][0] <= now_s - OVER_S:
            looks.popleft()

    def rates(self, now_s: float) -> RateStatus | None:
        """From the oldest look to now; None if there is no time between them."""
        if not self._looks or now_s <= self._looks[0][0]:
            return None
        began_s, before = self._looks[0]
        seconds = now_s - began_s
        sums = zip(before, self._sums(), strict=True)
        grown = [round(max(0, now - then) / seconds, 3) for then, now in sums]
        return RateStatus(
            seconds=round(seconds, 3),
            tokens_sent=grown[0],
            tokens_received=grown[1],
            bytes_sent=grown[2],
            bytes_received=grown[3],
            bytes_copied=grown[4],
        )

    def _sums(self) -> Sums:
        tokens, counters = self._node.meters.moved_tokens, self._node.counters
        ways = (counters[f"bytes_{way}"] for way in ("sent", "received", "copied"))
        return (tokens[Role.SOURCE], tokens[Role.SINK], *ways)
