"""A daemon that is told where to copy: its threads, and what operators are shown."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from cli.processes import kvferry
from kvferry_daemon.memory.placement import cpu_list
from kvferry_proto import worker
from kvferry_proto.states import Role
from live import LAYOUT, WAIT_S, WINDOW, LiveDaemon, RawWorker

ALLOWED = frozenset(os.sched_getaffinity(0))
CPU = max(ALLOWED)
STREAMS = 3  # more than there are threads for memory, of which one has made the pool

pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="every thread is on the one CPU")


def pinned(process: "subprocess.Popen[bytes]") -> tuple[int, bool]:
    """How many threads of a daemon may run on CPU alone, and whether the loop's may on all."""
    masks = {int(task.name): os.sched_getaffinity(int(task.name)) for task in tasks(process)}
    return sum(mask == {CPU} for mask in masks.values()), masks[process.pid] == ALLOWED


def tasks(process: "subprocess.Popen[bytes]") -> list[Path]:
    return list(Path(f"/proc/{process.pid}/task").iterdir())


def wait_for_pinned(daemon: LiveDaemon, threads: int) -> None:
    until = time.monotonic() + WAIT_S
    while (found := pinned(daemon.process))[0] < threads:
        assert time.monotonic() < until, found
        time.sleep(0.02)
    assert found[1], "the loop is pinned"


def move(a: LiveDaemon, b: LiveDaemon) -> None:
    """One window from a worker of one daemon to a worker of the other; the streams stay open."""
    with RawWorker(a.directory) as source, RawWorker(b.directory) as sink:
        source.call(worker.Send(transfer_id="t"))
        sink.call(worker.Receive(transfer_id="t", source=a.address))
        source.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens >= WINDOW)
        source.call(worker.Ready(transfer_id="t", ready_tokens=WINDOW, total_tokens=WINDOW))
        sink.wait_end(Role.SINK)
        for daemon in (a, b):
            wait_for_pinned(daemon, STREAMS + 1)


def test_the_threads_that_copy_stay_on_their_cpus_and_the_loop_does_not(tmp_path: Path) -> None:
    flags = {"copy_cpus": CPU, "streams": STREAMS}
    with LiveDaemon(tmp_path / "a", **flags) as a, LiveDaemon(tmp_path / "b", **flags) as b:
        move(a, b)


def test_operators_are_shown_the_placement_in_force(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "d", copy_cpus=CPU) as daemon:
        placement = daemon.status().placement
        assert placement is not None
        assert (placement.numa_node, placement.copy_cpus) == (None, str(CPU))
        out = kvferry("status", "--runtime-dir", daemon.directory).stdout
        assert f"huge pages: {placement.huge_pages}; copied on CPUs: {CPU}" in out


@pytest.mark.skipif(not Path("/sys/devices/system/node/node0").exists(), reason="no NUMA")
def test_a_node_brings_its_cpus_and_its_pools(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "d", numa_node=0) as daemon, RawWorker(daemon.directory):
        placement = daemon.status().placement
        assert placement is not None
        assert placement.numa_node == 0
        own = Path("/sys/devices/system/node/node0/cpulist").read_text().strip()
        if own == cpu_list(ALLOWED):
            assert placement.copy_cpus == own
        maps = Path(f"/proc/{daemon.process.pid}/numa_maps").read_text().splitlines()
        (policy,) = [
            line.split()[1] for line in maps if f"pools/{LAYOUT.digest.hex()} " in f"{line} "
        ]
        assert policy == "prefer:0"
        out = kvferry("status", "--runtime-dir", daemon.directory).stdout
        assert "pools on NUMA node 0; " in out
