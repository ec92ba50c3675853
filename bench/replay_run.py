"""One run of a replay: two daemons with given pools, their workers, and what was seen."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from bench.replay_plan import Job, Model
from bench.replay_worker import LAYOUT
from bench.served import ROOT
from bench.watched import WatchedDaemon
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import Mode

BEGIN_AFTER_S = 0.5
SAMPLE_S = 0.05
FAILURES_MAX = 20
# No deadline may end what only waits for memory; and who starves on a busy machine is not dead.
PATIENCE: dict[str, object] = {
    "stall_s": 1800,
    "lease_s": 1800,
    "lost_s": 30,
    "tombstone_s": 30,
    "log_level": "warning",
}


class ReplayProcess:
    """A worker, see `bench.replay_worker`."""

    def __init__(self, daemon: WatchedDaemon, told: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.replay_worker", str(daemon.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.tell(told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def tell(self, told: Any) -> None:
        """Write a line."""
        assert self.process.stdin is not None
        print(json.dumps(told), file=self.process.stdin, flush=True)

    def said(self) -> Any:
        """Read a line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker of the replay has died")
        return json.loads(line)


class PoolSampler(threading.Thread):
    """Notes how many tokens' blocks of a daemon's pool are not free, until stopped."""

    def __init__(self, daemon: WatchedDaemon) -> None:
        super().__init__(daemon=True)
        self.used_tokens: list[int] = []
        self._daemon = daemon
        self._stopping = threading.Event()
        self._error: FerryError | None = None

    def run(self) -> None:
        while not self._stopping.wait(SAMPLE_S):
            try:
                status = self._daemon.status()
            except FerryError as error:
                if error.code is Code.RESOURCE_EXHAUSTED:  # the next one will do
                    continue
                self._error = error
                return
            used = status.blocks_total - status.blocks_free
            self.used_tokens.append(used * LAYOUT.block_size_tokens)

    def result(self) -> dict[str, int]:
        """Peak and mean of what was seen."""
        self._stopping.set()
        self.join()
        if self._error is not None:
            raise self._error
        seen = self.used_tokens or [0]
        return {"peak_tokens": max(seen), "mean_tokens": round(sum(seen) / len(seen))}


def run(
    jobs: list[Job], model: Model, mode: Mode, source_tokens: int, sink_tokens: int
) -> dict[str, Any]:
    """Play all jobs once."""
    pools = {"source": source_tokens, "sink": sink_tokens}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root, ExitStack() as stack:
        daemons = {
            name: WatchedDaemon(
                Path(root) / name,
                pool_tokens=tokens,
                budget_bytes=(tokens // LAYOUT.block_size_tokens + 1) * LAYOUT.block_bytes,
                source_share=float(name == "source"),
                window_tokens=model.window_tokens,
                **PATIENCE,
            )
            for name, tokens in pools.items()
        }
        for daemon in daemons.values():
            stack.callback(daemon.kill)
        workers = {
            role: [stack.enter_context(one) for one in _workers(daemons, jobs, model, mode, role)]
            for role in ("prefill", "decode")
        }
        told, costs, seconds = _play(daemons, workers, len(jobs))
        result: dict[str, Any] = {"mode": mode.value, "sink_tokens": sink_tokens}
        result |= {"seconds": round(seconds, 1), **_summary(told)}
        for name, tokens in pools.items():
            result[name] = {"pool_tokens": tokens, **costs[name]}
            result["failures"] += [f"{name} logged: {line}" for line in daemons[name].troubles()]
        return result


def _workers(
    daemons: dict[str, WatchedDaemon], jobs: list[Job], model: Model, mode: Mode, role: str
) -> list[ReplayProcess]:
    daemon = daemons["source" if role == "prefill" else "sink"]
    count = model.prefill_workers if role == "prefill" else model.decode_workers
    told = {
        "role": role,
        "model": asdict(model),
        "source": daemons["source"].address,
        "mode": mode.value,
    }
    return [ReplayProcess(daemon, told | {"jobs": jobs[number::count]}) for number in range(count)]


def _play(
    daemons: dict[str, WatchedDaemon], workers: dict[str, list[ReplayProcess]], requests: int
) -> tuple[dict[str, list[Any]], dict[str, dict[str, float]], float]:
    everyone = [one for group in workers.values() for one in group]
    for one in everyone:
        assert one.said() == "ready"
    samplers = {name: PoolSampler(daemon) for name, daemon in daemons.items()}
    before = {name: daemon.facts().cpu_s for name, daemon in daemons.items()}
    begun_s = time.monotonic() + BEGIN_AFTER_S
    for one in everyone:
        one.tell(begun_s)
    time.sleep(max(0.0, begun_s - time.monotonic()))
    for sampler in samplers.values():
        sampler.start()
    told = {"prefill": [one.said() for one in workers["prefill"]], "decode": []}
    if not any(one["failures"] for one in told["prefill"]):  # or decode would wait for nobody
        told["decode"] = [one.said() for one in workers["decode"]]
    seconds = time.monotonic() - begun_s
    costs: dict[str, dict[str, float]] = {}
    for name, daemon in daemons.items():
        taken_s = daemon.facts().cpu_s - before[name]
        costs[name] = {
            **samplers[name].result(),
            "cpu_ms_a_request": round(taken_s / requests * 1e3, 2),
        }
    return told, costs, seconds


def _summary(told: dict[str, list[Any]]) -> dict[str, Any]:
    computed = _moments(told["prefill"], "computed_s")
    ended, taken = (_moments(told["decode"], what) for what in ("ended_s", "taken_s"))
    stall_s: defaultdict[str, float] = defaultdict(float)
    for one in told["decode"]:
        for reason, seconds in one["stall_s"].items():
            stall_s[reason] += seconds
    failures = [words for group in told.values() for one in group for words in one["failures"]]
    return {
        "finished": len(taken),
        "verified_tokens": sum(one["verified_tokens"] for one in told["decode"]),
        "lag_ms": percentiles_ms([ended[n] - computed[n] for n in ended.keys() & computed.keys()]),
        "taken_ms": percentiles_ms([taken[n] - ended[n] for n in taken]),
        "stall_s": {reason: round(seconds, 2) for reason, seconds in sorted(stall_s.items())},
        "failures": failures[:FAILURES_MAX],
    }


def _moments(told: list[Any], what: str) -> dict[str, float]:
    """By the job's number."""
    return {
        number: seen[what] for one in told for number, seen in one["seen"].items() if what in seen
    }


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    """Of seconds, in milliseconds."""
    ordered = sorted(seconds) or [0.0]
    return {
        "p50": round(ordered[len(ordered) // 2] * 1e3, 1),
        "p99": round(ordered[len(ordered) * 99 // 100] * 1e3, 1),
        "max": round(ordered[-1] * 1e3, 1),
    }
