"""What a daemon takes: to start, when it is empty, and for transfers that only wait or hold.

Sinks at one daemon wait for sources that the other one has not heard of yet; so the one asks again
by timer, and the other answers that it does not know. Others hold a window, see `bench.holding`.
"""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.figures import spread
from bench.holding import Holding
from bench.payload import llama
from bench.probe import LAYOUT
from bench.served import ServedDaemon
from bench.source_worker import batched
from bench.watched import wait_until
from kvferry_client import connect
from kvferry_proto import worker

START_ROUNDS = 7
POOL_BYTES = 256 << 20
WINDOW_TOKENS = 1024
POOL_TOKENS = 1 << 15
SETTLE_S = 5.0  # re-sending has slowed down to its longest interval by then
WATCH_S = 10.0


def measure_start(rounds: int = START_ROUNDS) -> dict[str, Any]:
    """Until it says that it is ready; and until its first worker has a pool, whose pages are new."""
    layout = llama()
    flags = {"budget_bytes": POOL_BYTES, "window_tokens": WINDOW_TOKENS}
    found: dict[str, list[float]] = {"ready_seconds": [], "pool_seconds": [], "rss_empty_mib": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
            begun = time.monotonic()
            with ServedDaemon(Path(root) / "daemon", **flags) as daemon:
                ready = time.monotonic()
                found["rss_empty_mib"].append(daemon.facts().rss_bytes / 2**20)
                with connect(daemon.directory, layout, "bench"):
                    joined = time.monotonic()
        found["ready_seconds"].append(ready - begun)
        found["pool_seconds"].append(joined - begun)
    return {
        "rounds": rounds,
        "pool_bytes": POOL_BYTES,
        **{name: spread(values) for name, values in found.items()},
    }


def measure(
    watched: int = 1000, live: int = 2000, settle_s: float = SETTLE_S, watch_s: float = WATCH_S
) -> dict[str, Any]:
    """CPU of both daemons while ``watched`` wait, and memory of each of ``live`` that wait."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        source, sink = (
            stack.enter_context(ServedDaemon(root / name, stall_s=600, pool_tokens=POOL_TOKENS))
            for name in ("source", "sink")
        )
        client = stack.enter_context(connect(sink.directory, LAYOUT, "bench"))

        def wait_for_sources(first: int, end: int) -> None:
            batched(
                client,
                [
                    worker.Receive(transfer_id=f"wait-{i}", source=source.address)
                    for i in range(first, end)
                ],
            )
            time.sleep(settle_s)
            wait_until(lambda: sink.status().stalls == {"waiting_for_source": end}, "all wait")

        wait_for_sources(0, 1)  # so that the two daemons know each other
        empty = {"source": source.facts(), "sink": sink.facts()}
        wait_for_sources(1, watched)
        before = {"source": source.facts(), "sink": sink.facts()}
        time.sleep(watch_s)
        after = {"source": source.facts(), "sink": sink.facts()}
        wait_for_sources(watched, live)
        rss_bytes = sink.facts().rss_bytes - empty["sink"].rss_bytes
        found: dict[str, Any] = {
            f"{name}_core_percent": round(
                (after[name].cpu_s - before[name].cpu_s) / watch_s * 100, 2
            )
            for name in ("source", "sink")
        }
    return {
        "waiting": watched,
        "watched_seconds": watch_s,
        **found,
        "live": live,
        "rss_kib_per_transfer": round(rss_bytes / (live - 1) / 1024, 2),
        **_measure_holding(live),
    }


def _measure_holding(live: int) -> dict[str, float]:
    """Memory of a transfer that holds a window, at either daemon; its blocks, of 128 bytes, too."""
    with ExitStack() as stack:
        holding = Holding(stack, live)
        holding.hold(1)
        before = {side: one.facts().rss_bytes for side, one in holding.daemons.items()}
        holding.hold(live)
        return {
            f"rss_kib_per_holding_{side}": round(
                (one.facts().rss_bytes - before[side]) / (live - 1) / 1024, 2
            )
            for side, one in holding.daemons.items()
        }
