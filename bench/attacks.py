"""What floods cost: the daemon's memory, and how long an honest worker waits for an answer.

`python -m bench.attacks [SECONDS] [NAME ...]` prints a table, and to stderr what the daemon counted. The
attacker is a process of its own that is let in (the daemon's user, or clear text on loopback); all of
them share the machine's cores, so latencies are also the attacker's hunger for them. Memory is what is
no pool's.
"""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from bench.attackers import ATTACKS
from bench.attackers_data import TLS
from bench.probe import LAYOUT, Probe
from bench.served import PAGE_BYTES, ROOT, ServedDaemon
from kvferry_client import connect

SECONDS = 10.0
EVERY_S = 0.01
TRANSFERS = 500  # of a bystander: what operators ask for has to be worth something
BEFORE_S = 1.0
POOL_TOKENS = 1 << 15  # attackers have layouts of their own, and pools
BUDGET_BYTES = 1 << 28


class Cost(NamedTuple):
    """Of one attack."""

    name: str
    base_mib: float
    peak_mib: float
    after_mib: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu_s: float  # of the daemon, meanwhile
    turn_ms: float  # CPU of its loop's longest turn
    counted: dict[str, int]  # by it: what it refused, and what it did


def own_mib(pid: int) -> float:
    """Memory of a process without what it shares."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (resident - shared) * PAGE_BYTES / 2**20


def free_port() -> int:
    """One that nobody has just now."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


class Attacked:
    """A daemon that can be attacked."""

    def __init__(self, daemon: ServedDaemon, data_port: int, http_port: int) -> None:
        self.daemon = daemon
        self._where = [str(daemon.directory), daemon.address, str(data_port), str(http_port)]

    @contextmanager
    def by(self, name: str) -> Iterator[None]:
        """Somebody attacks meanwhile; RuntimeError if he stopped by himself, or found a fault."""
        command = [sys.executable, "-m", "bench.attackers", name, *self._where]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as attacker:
            assert attacker.stdout is not None
            try:
                has_begun = attacker.stdout.readline()  # a slow machine takes seconds to start it
                if has_begun:
                    yield
                ended = attacker.poll() if has_begun else attacker.wait()
            finally:
                attacker.kill()
        if ended is not None:
            raise RuntimeError(f"the attacker of {name} ended by itself: exit code {ended}")
        log = self.daemon.log_path.read_text()
        if "Traceback" in log:
            raise RuntimeError(f"{name} led to an exception in the daemon:\n{log}")


@contextmanager
def attackable(name: str) -> Iterator[Attacked]:
    """A daemon for this attack, with a bystander who has some transfers."""
    data_port, http_port = free_port(), free_port()
    flags = {
        "budget_bytes": BUDGET_BYTES,
        "pool_tokens": POOL_TOKENS,
        "window_tokens": LAYOUT.block_size_tokens,
        "payload_encryption": "tls" if name in TLS else "off",
    }
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as root,
        ServedDaemon(Path(root) / "a", data_port=data_port, http_port=http_port, **flags) as daemon,
        connect(daemon.directory, LAYOUT, "bystander") as bystander,
    ):
        for number in range(TRANSFERS):
            bystander.send(f"bystander-{number}", window_tokens=LAYOUT.block_size_tokens)
        yield Attacked(daemon, data_port, http_port)


def measure(name: str, seconds: float) -> Cost:
    """Run one attack; an empty name: none."""
    with attackable(name) as attacked:
        daemon = attacked.daemon
        probe = Probe(daemon.directory, EVERY_S)
        probe.start()
        time.sleep(BEFORE_S)
        pid = daemon.process.pid
        base = peak = own_mib(pid)
        counters, cpu_s = daemon.status().counters, daemon.facts().cpu_s
        probe.seconds.clear()
        try:
            with attacked.by(name) if name else nullcontext():
                until_s = time.monotonic() + seconds
                while time.monotonic() < until_s:
                    peak = max(peak, own_mib(pid))
                    time.sleep(EVERY_S)
        finally:  # it ends with that
            waited = probe.result()
        cpu_s = daemon.facts().cpu_s - cpu_s
        time.sleep(BEFORE_S)
        status = daemon.status()
        assert status.loop is not None
        assert status.loop.turns is not None
        return Cost(
            name or "none",
            base,
            peak,
            own_mib(pid),
            waited["lag_p50_ms"],
            waited["lag_p99_ms"],
            waited["lag_max_ms"],
            round(cpu_s, 2),
            status.loop.turns.work_max_ms,
            grown(counters, status.counters),
        )


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """The counters that did, and by how much."""
    more = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in more.items() if count > 0}


def table(costs: list[Cost]) -> str:
    """As markdown."""
    lines = [
        "| flood | memory before, at most, after, MiB | honest call p50, p99, max, ms |",
        "|---|---|---|",
    ]
    lines += [
        f"| {one.name.replace('_', ' ')} | {one.base_mib:.0f}, {one.peak_mib:.0f}, "
        f"{one.after_mib:.0f} | {one.p50_ms:.1f}, {one.p99_ms:.0f}, {one.max_ms:.0f} |"
        for one in costs
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    costs = []
    for name in sys.argv[2:] or ["", *ATTACKS]:
        costs.append(measure(name, seconds))
        print(costs[-1], file=sys.stderr)
    print(table(costs))
