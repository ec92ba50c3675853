"""Traffic with kills for minutes: every payload exact, and nothing left behind.

A daemon that was killed begins with fresh memory, so growth cannot be seen where daemons die.
Therefore two phases:

1. ``restarts``: workers and both daemons are killed again and again, and daemons go on with their
   ledgers. At its end all workers leave, and nothing may be left.
2. ``steady``: the daemons' last lives, which are killed no more; workers still are. First comes a
   warm-up, at whose end all workers leave and everything is counted (``quiet``). Then the same
   traffic goes on for the most part of the time, and everything is counted again.

From quiet to quiet nothing may be more: descriptors, threads, asyncio tasks, files of the runtime
directory, entries of any book, objects of any type of ours. RSS is looked at under traffic, its
median in the first and in the last fifth of the time after the warm-up.

What is remembered grows by design up to its bound: ended transfers for ``tombstone_s`` (10 minutes
by default), pulls that came before their source for ``stall_s``. Both are small here, so that the
bound is met in the warm-up; and what is more than before gets that long to go away. An ended transfer
must be remembered until its worker has asked again, though: a client repeats a poll whose answer
died with its daemon after 5.5 s.
"""

import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.soak_traffic import Traffic
from bench.soak_worker import BLOCK_TOKENS, WINDOW_TOKENS
from bench.watched import WatchedDaemon
from kvferry_daemon.core import shape, timers
from kvferry_daemon.ledger import rows_of

GROWTH_BYTES_MAX = 2 << 20
SAMPLE_S = 0.5
LOOK_S = 0.25
SPARE_S = 3.0
POOL_BLOCKS = 160
# What is bounded by itself: wake-ups that are swept out, and layouts that were found to be good ones.
SPARE = {"node.timers._heap": timers.SPARE, "Side": shape.SIDES_MAX}


@dataclass(frozen=True)
class SoakSize:
    """How much of it. ``growth_bytes_max`` None: too short to say anything of RSS."""

    restarts_s: float
    warm_up_s: float
    steady_s: float
    at_once: int = 16
    worker_kill_s: float = 6.0
    daemon_kill_s: float = 8.0
    tombstone_s: float = 10.0
    stall_s: float = 10.0
    growth_bytes_max: int | None = GROWTH_BYTES_MAX
    seed: int = 1

    @classmethod
    def of_minutes(cls, minutes: float) -> "SoakSize":
        """Three tenths with restarts, two of warm-up."""
        return cls(minutes * 18, minutes * 12, minutes * 30)


class Sampler(threading.Thread):
    """Notes the RSS of a daemon, until stopped."""

    def __init__(self, daemons: dict[str, WatchedDaemon]) -> None:
        super().__init__(daemon=True)
        self.rss_bytes: dict[str, list[int]] = {name: [] for name in daemons}
        self._daemons = daemons
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(SAMPLE_S):
            for name, daemon in self._daemons.items():
                self.rss_bytes[name].append(daemon.facts().rss_bytes)

    def growth_bytes(self, name: str) -> int:
        """From the first fifth to the last."""
        seen = self.rss_bytes[name]
        fifth = max(1, len(seen) // 5)
        return int(statistics.median(seen[-fifth:]) - statistics.median(seen[:fifth]))

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
        self.join()


def measure(size: SoakSize, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it; ``violations`` is empty if all is well."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root, ExitStack() as stack:
        daemons = {
            name: WatchedDaemon(
                Path(root) / name,
                window_tokens=WINDOW_TOKENS,
                pool_tokens=POOL_BLOCKS * BLOCK_TOKENS,
                heartbeat_s=0.2,
                tombstone_s=size.tombstone_s,
                stall_s=size.stall_s,
                lost_s=15,  # the locks tell who is dead; a starved worker is none
                hold_s=10,
                lease_s=10,
                log_level="warning",
            )
            for name in ("a", "b")
        }
        for daemon in daemons.values():
            stack.callback(daemon.kill)
        return _Soak(size, daemons, say).run()


class _Soak:
    """The phases, one after the other, and what was wrong in them."""

    def __init__(
        self, size: SoakSize, daemons: dict[str, WatchedDaemon], say: Callable[[str], None]
    ) -> None:
        self.size = size
        self.daemons = daemons
        self.violations: list[str] = []
        self._say = say

    def run(self) -> dict[str, Any]:
        size, daemons = self.size, self.daemons
        restarts = self._traffic("restarts", size.restarts_s, size.daemon_kill_s)
        for name, daemon in daemons.items():
            told = _quiet(daemon, size, {})
            self.violations += [f"{name} after restarts: {words}" for words in stray(told)]
        warm = self._traffic("warm-up", size.warm_up_s, None)
        before = {name: _quiet(daemon, size, {}) for name, daemon in daemons.items()}
        sampler = Sampler(daemons)
        steady = self._traffic("steady", size.steady_s, None, sampler)
        after = {name: _quiet(daemon, size, before[name]) for name, daemon in daemons.items()}
        result: dict[str, Any] = {"restarts": restarts, "warm_up": warm, "steady": steady}
        for name, daemon in daemons.items():
            daemon.kill()  # a ledger can be read by one process only
            self.violations += [f"{name}: {words}" for words in remembered(daemon)]
            result[name] = _told(sampler, name, before[name], after[name])
            self._judge(name, before[name], after[name], sampler.growth_bytes(name))
        return result | {"violations": self.violations}

    def _traffic(
        self,
        phase: str,
        seconds: float,
        daemon_kill_s: float | None,
        sampler: Sampler | None = None,
    ) -> dict[str, int]:
        begun_s = time.monotonic()
        traffic = Traffic(phase, self.daemons, self.size.at_once, self.size.seed)
        traffic.open()
        if sampler is not None:
            sampler.start()
        try:
            traffic.run(seconds, self.size.worker_kill_s, daemon_kill_s)
            if sampler is not None:
                sampler.stop()  # under traffic only
            traffic.close()
        except BaseException:
            traffic.abandon()
            raise
        self.violations += traffic.violations
        counters = dict(sorted(traffic.counters.items()))
        self._say(f"soak, {phase}, {time.monotonic() - begun_s:.0f} s: {counters}")
        return counters

    def _judge(
        self, name: str, before: dict[str, Any], after: dict[str, Any], growth_bytes: int
    ) -> None:
        found = grown(before, after) + stray(after)
        found += [f"logged: {line}" for line in self.daemons[name].troubles()]
        most_bytes = self.size.growth_bytes_max
        if most_bytes is not None and growth_bytes >= most_bytes:
            found.append(f"RSS grew by {growth_bytes} bytes after the warm-up")
        self.violations += [f"{name}: {words}" for words in found]


def _quiet(daemon: WatchedDaemon, size: SoakSize, before: dict[str, Any]) -> dict[str, Any]:
    """What a daemon holds once everybody has left; things get ``stall_s`` to go away."""
    until_s = time.monotonic() + size.stall_s + size.tombstone_s + SPARE_S
    while True:
        told = _look(daemon)
        if not stray(told) and (not before or not grown(before, told)):
            return told
        if time.monotonic() >= until_s:
            return told
        time.sleep(LOOK_S)


def _look(daemon: WatchedDaemon) -> dict[str, Any]:
    facts, report = daemon.facts(), daemon.report()
    status = daemon.status()
    return {
        **report,
        "counts": {
            "tasks": report["tasks"],
            "fds": facts.fds,
            "threads": facts.threads - report["pooled_threads"],
        },
        "files": daemon.files(),
        "rss_bytes": facts.rss_bytes,
        "blocks_held": status.blocks_total - status.blocks_free,
    }


def stray(told: dict[str, Any]) -> list[str]:
    """What a daemon without workers has no reason to hold."""
    found = [f"stray file {file}" for file in told["files"] if file.startswith("workers/")]
    if told["blocks_held"]:
        found.append(f"{told['blocks_held']} blocks are not free")
    for kind in ("Session", "SinkTransfer", "SourceTransfer", "Tombstone"):
        if told["objects"].get(kind):
            found.append(f"{told['objects'][kind]} objects of type {kind} are left")
    return found


def remembered(daemon: WatchedDaemon) -> list[str]:
    """What the ledger of a daemon without workers still speaks of."""
    kinds = Counter(name.partition(":")[0] for name, _ in rows_of(daemon.directory / "ledger.db"))
    del kinds["daemon"], kinds["pool"]
    return [f"{count} rows of kind {kind} are left in the ledger" for kind, count in kinds.items()]


def grown(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is more than it was."""
    found = [f"new file {file}" for file in after["files"] if file not in before["files"]]
    for what in ("counts", "books", "objects"):
        for name, count in after[what].items():
            most = before[what].get(name, 0) + SPARE.get(name, 0)
            if count > most:
                found.append(f"{what}: {name} grew from {before[what].get(name, 0)} to {count}")
    return found


def _told(
    sampler: Sampler, name: str, before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    seen = sampler.rss_bytes[name]
    return {
        "rss_mib": round(seen[-1] / 2**20, 1),
        "rss_growth_mib": round(sampler.growth_bytes(name) / 2**20, 2),
        "quiet_rss_growth_mib": round((after["rss_bytes"] - before["rss_bytes"]) / 2**20, 2),
        "quiet": after["counts"],
        "objects": sum(after["objects"].values()),
        **({"memory": after["memory"]} if "memory" in after else {}),
    }
