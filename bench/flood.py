"""2,000 live transfers at once between two daemons, and a rate of calls that may lose none.

Both daemons and four workers are processes of their own; the bytes go over tcp on loopback. The
pools hold less than all windows together, so blocks change hands all the time. A call is one
message on a worker socket, a batch too. Every answer is matched to its call, every snapshot to the
one before it, every block that arrives to what was filled. A worker stops sending when 256 of its
calls are under way: then the rate falls short, and latencies are those of a daemon at its limit.

``lag`` is how long a heartbeat from a quiet worker took, ten times a second: what a message waits
for the daemon's loop, and both for a core; ``loop`` is what the daemon says of its loop.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.flood_worker import BLOCK_TOKENS, STEP
from bench.probe import Probe
from bench.served import ROOT, Facts
from bench.watched import WatchedDaemon, wait_until

WINDOW_BLOCKS = 2
POOL_BLOCKS_A_TRANSFER = 1.5
WORKERS_A_SIDE = 2
FINISH_S = 120.0
PROBE_S = 0.1
LOCKS_GO_S = 10.0  # a worker's file goes once the ledger holds that it is gone


@dataclass(frozen=True)
class FloodSize:
    """How much of it."""

    transfers: int = 2000
    calls_a_s: float = 10_200  # those under way at the end are not counted: above the aim
    seconds: float = 60


class FloodProcess:
    """A worker, see `bench.flood_worker`."""

    def __init__(self, daemon: WatchedDaemon, role: str, source: str = "") -> None:
        self.violations: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.flood_worker", str(daemon.directory), role, source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def tell(self, command: str, *args: object) -> None:
        """Let it begin with something."""
        assert self.process.stdin is not None
        print(json.dumps([command, *args]), file=self.process.stdin, flush=True)

    def told(self) -> Any:
        """What came of it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.violations = ["a worker of the flood has died"]
            raise RuntimeError(self.violations[0])
        said = json.loads(line)
        self.violations = said["violations"]
        return said["answer"]


def measure(size: FloodSize) -> dict[str, Any]:
    """Run it; ``violations`` is empty if nothing was lost."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root, ExitStack() as stack:
        pool_tokens = int(size.transfers * POOL_BLOCKS_A_TRANSFER) * BLOCK_TOKENS
        daemons = {
            name: WatchedDaemon(
                Path(root) / name,
                window_tokens=WINDOW_BLOCKS * BLOCK_TOKENS,
                pool_tokens=pool_tokens,
                source_share=share,
                stall_s=600,
                lost_s=30,
            )
            for name, share in (("source", 1), ("sink", 0))
        }
        for daemon in daemons.values():
            stack.callback(daemon.kill)
        return _flood(size, daemons, stack)


def _flood(size: FloodSize, daemons: dict[str, WatchedDaemon], stack: ExitStack) -> dict[str, Any]:
    address = daemons["source"].address
    processes = [
        stack.enter_context(FloodProcess(daemons[role], role, address if role == "sink" else ""))
        for role in ("source", "sink")
        for _ in range(WORKERS_A_SIDE)
    ]
    share = size.transfers // WORKERS_A_SIDE
    all_tell(processes, "open", lambda index: (index % WORKERS_A_SIDE * share, share))
    live = {name: sum(daemon.status().transfers.values()) for name, daemon in daemons.items()}
    probes = {name: Probe(daemon.directory, PROBE_S) for name, daemon in daemons.items()}
    before = {name: daemon.facts() for name, daemon in daemons.items()}
    for probe in probes.values():
        probe.start()
    rate = size.calls_a_s / len(processes)
    ran = all_tell(processes, "run", lambda _: (size.seconds, rate))
    after = {name: daemon.facts() for name, daemon in daemons.items()}
    result = summary(ran)
    for name, probe in probes.items():
        result[name] = {**costs(before[name], after[name], size.seconds), **probe.result()}
        result[name]["live_transfers"] = live[name]
        told = daemons[name].status()
        assert told.loop is not None
        result[name]["loop"] = told.loop.model_dump()
        result[name]["counters"] = {
            k: v for k, v in told.counters.items() if "refused" in k or "bad" in k
        }
    ended = all_tell(processes, "finish", lambda _: (FINISH_S,))
    result["violations"] = [words for process in processes for words in process.violations]
    if sum(ended) != 2 * share * WORKERS_A_SIDE:
        result["violations"].append(f"of {2 * share * WORKERS_A_SIDE} sides {sum(ended)} ended")
    if min(live.values()) != share * WORKERS_A_SIDE:
        result["violations"].append(f"not all were live at once: {live}")
    return result | {"violations": result["violations"] + left_behind(daemons, processes)}


def all_tell(processes: list[FloodProcess], command: str, args: Any) -> list[Any]:
    """Let all do something at once."""
    for index, process in enumerate(processes):
        process.tell(command, *args(index))
    return [process.told() for process in processes]


def costs(before: Facts, after: Facts, seconds: float) -> dict[str, float]:
    """What a daemon took."""
    return {
        "cpu_percent": round((after.cpu_s - before.cpu_s) / seconds * 100, 1),
        "rss_mib": round(after.rss_bytes / 2**20, 1),
        "rss_growth_mib": round((after.rss_bytes - before.rss_bytes) / 2**20, 2),
    }


def summary(ran: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates and latencies of all workers together."""
    latencies: Counter[int] = Counter()
    answered: Counter[str] = Counter()
    for one in ran:
        latencies.update({int(bucket): count for bucket, count in one["latencies"].items()})
        answered.update(one["answered"])
    seconds = max(one["seconds"] for one in ran)
    return {
        "calls_a_s": round(sum(answered.values()) / seconds, 1),
        "calls": dict(answered),
        "p50_us": percentile_us(latencies, 0.5),
        "p99_us": percentile_us(latencies, 0.99),
    }


def percentile_us(latencies: Counter[int], part: float) -> float:
    """From a histogram whose buckets grow by STEP."""
    left = part * latencies.total()
    for bucket in sorted(latencies):
        left -= latencies[bucket]
        if left <= 0:
            return round(math.pow(STEP, bucket + 0.5), 1)
    return 0.0


def left_behind(daemons: dict[str, WatchedDaemon], processes: list[FloodProcess]) -> list[str]:
    """What is not as it was once all workers are gone."""
    found = []
    for process in processes:
        process.process.kill()
    for name, daemon in daemons.items():
        try:
            wait_until(lambda: daemon.status().workers == 0, "workers are gone")  # noqa: B023
        except TimeoutError:
            found.append(f"{name}: workers that died are still there")
        with suppress(TimeoutError):  # what stays is told of below
            wait_until(lambda: not _locks(daemon), "lock files go", LOCKS_GO_S)  # noqa: B023
        status = daemon.status()
        if status.blocks_free != status.blocks_total:
            found.append(f"{name}: {status.blocks_total - status.blocks_free} blocks are not free")
        found += [f"{name}: stray {file}" for file in _locks(daemon)]
        found += [f"{name} logged: {line}" for line in daemon.troubles()]
    return found


def _locks(daemon: WatchedDaemon) -> list[str]:
    return [file for file in daemon.files() if file.startswith("workers/")]


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else FloodSize.seconds
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else FloodSize.calls_a_s
    print(json.dumps(measure(FloodSize(seconds=seconds, calls_a_s=rate)), indent=2))
