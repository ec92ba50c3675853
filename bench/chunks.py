"""What a chunk costs two daemons while so many other transfers between them are live.

One transfer of many small chunks moves, and the CPU of both daemons is counted; in turn with the
same between two more daemons that have nothing else: what a busy machine does to both cancels out.
"""

import itertools
from contextlib import ExitStack
from typing import Any

from bench.figures import absent, ratios, spread
from bench.holding import SIZE, Holding, cpu_s
from bench.payload import Payload, numbered
from bench.probe import LAYOUT
from bench.source_worker import has_succeeded, let_go, offer, wait_all
from kvferry_client import Role
from kvferry_proto.errors import FerryError

CHUNKS = 2000
ROUNDS = 5


class Moving:
    """The one transfer, again and again."""

    def __init__(self, holding: Holding, chunks: int) -> None:
        self.holding, self.chunks = holding, chunks
        self._received = Payload(holding.takes.pool.info, LAYOUT)
        self._ids = (f"moves-{number}" for number in itertools.count())

    def move(self) -> dict[str, float]:
        """CPU of a chunk by daemon, in microseconds."""
        holding, name = self.holding, next(self._ids)
        tokens = self.chunks * SIZE
        ready = offer(holding.sends, holding.payload, LAYOUT, [name], tokens)
        before = {side: cpu_s(one) for side, one in holding.daemons.items()}
        receiving = holding.takes.receive(name, source=holding.source.address, window_tokens=tokens)
        receiving.wait()
        after = {side: cpu_s(one) for side, one in holding.daemons.items()}
        self._check(receiving.snapshot.runs)
        receiving.release()
        wait_all(holding.sends, ready, has_succeeded)
        let_go(holding.sends, Role.SOURCE, [name])
        return {side: (after[side] - before[side]) / self.chunks * 1e6 for side in after}

    def _check(self, runs: Any) -> None:
        found = numbered(runs, 0, LAYOUT)
        assert len(found) == self.chunks
        self._received.check(found)


def measure(live: tuple[int, ...], rounds: int = ROUNDS, chunks: int = CHUNKS) -> dict[str, Any]:
    """Each count of live transfers, in rising order; absent where they do not come to rest."""
    try:
        return _measure(live, rounds, chunks)
    except (FerryError, TimeoutError) as error:
        names = ("source_us", "sink_us", "to_alone")
        keys = [f"live_{count}_chunk_{name}" for count in live for name in names]
        return {key: absent(str(error)) for key in (*keys, "chunk_most_to_fewest")}


def _measure(live: tuple[int, ...], rounds: int, chunks: int) -> dict[str, Any]:
    with ExitStack() as stack:
        crowded = Moving(Holding(stack, max(live), chunks), chunks)
        alone = Moving(Holding(stack, 1, chunks), chunks)
        for one in (crowded, alone):
            one.move()  # connections, pages, and what is made once
        found: dict[str, Any] = {"chunks": chunks, "chunk_rounds": rounds}
        costs: list[list[float]] = []
        for count in live:
            crowded.holding.hold(count - 1)
            ours, bare = [], []
            for _ in range(rounds):
                bare.append(alone.move())
                ours.append(crowded.move())
            for side in ("source", "sink"):
                found[f"live_{count}_chunk_{side}_us"] = spread(one[side] for one in ours)
            pairs = [
                (sum(one.values()), sum(other.values()))
                for one, other in zip(ours, bare, strict=True)
            ]
            found[f"live_{count}_chunk_to_alone"] = ratios(*zip(*pairs, strict=True))
            costs.append([one / other for one, other in pairs])
        found["chunk_most_to_fewest"] = ratios(costs[-1], costs[0])
        return found
