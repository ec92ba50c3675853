"""What floods cost: the daemon's memory, and how long an honest worker waits for an answer.

`python -m bench.attacks [SECONDS] [NAME ...]` prints a table. The attacker is a process of its own
that is let in (the daemon's user, or clear text on loopback); all of them share the machine's cores,
so latencies are also the attacker's hunger for them. Memory is what is no pool's.
"""

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.attackers import ATTACKS
from bench.probe import LAYOUT, Probe
from bench.served import PAGE_BYTES, ROOT, ServedDaemon
from kvferry_client import connect
from kvferry_proto.control import Status

SECONDS = 10.0
EVERY_S = 0.01
TRANSFERS = 500  # of a bystander: what operators ask for has to be worth something
BEFORE_S = 1.0
REFUSED = ("over", "cut", "refused", "bad_messages")


class Cost(NamedTuple):
    """Of one attack."""

    name: str
    base_mib: float
    peak_mib: float
    after_mib: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    refused: dict[str, int]


def own_mib(pid: int) -> float:
    """Memory of a process without what it shares."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (resident - shared) * PAGE_BYTES / 2**20


def free_port() -> int:
    """One that nobody has just now."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def measure(name: str, seconds: float) -> Cost:
    """Run one attack; an empty name: none."""
    data_port, http_port = free_port(), free_port()
    ports = {"data_port": data_port, "http_port": http_port}
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as root,
        ServedDaemon(Path(root) / "a", budget_bytes=64 << 20, window_tokens=16, **ports) as daemon,
        connect(daemon.directory, LAYOUT, "bystander") as bystander,
    ):
        for number in range(TRANSFERS):
            bystander.send(f"bystander-{number}", window_tokens=16)
        probe = Probe(daemon.directory, EVERY_S)
        probe.start()
        time.sleep(BEFORE_S)
        pid = daemon.process.pid
        base = peak = own_mib(pid)
        probe.seconds.clear()
        where = [str(daemon.directory), daemon.address, str(data_port), str(http_port)]
        command = [sys.executable, "-m", "bench.attackers", name, *where]
        attacker = subprocess.Popen(command, cwd=ROOT) if name else None
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            peak = max(peak, own_mib(pid))
            time.sleep(EVERY_S)
        if attacker is not None:
            attacker.kill()
            attacker.wait()
        waited = probe.result()
        time.sleep(BEFORE_S)
        after = own_mib(pid)
        return Cost(
            name or "none",
            base,
            peak,
            after,
            waited["lag_p50_ms"],
            waited["lag_p99_ms"],
            waited["lag_max_ms"],
            refused(daemon.status()),
        )


def refused(status: Status) -> dict[str, int]:
    """The counters that tell of it."""
    return {
        name: count
        for name, count in status.counters.items()
        if count and any(word in name for word in REFUSED)
    }


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
