"""NUMA node and CPUs: what is understood, what is refused, and what the kernel then says."""

import ctypes
import mmap
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_daemon.memory import placement
from kvferry_daemon.memory.host import HostPool, MemoryRefused
from kvferry_daemon.memory.placement import (
    CPU_MAX,
    Placement,
    PlacementRefused,
    cpu_list,
    node_bytes_left,
    parse_cpus,
)

ALLOWED = frozenset(os.sched_getaffinity(0))
ONE = frozenset({min(ALLOWED)})
NO_LIMIT = Path("/nonexistent")
has_nodes = pytest.mark.skipif(not placement.NODES.exists(), reason="a kernel without NUMA")
several_cpus = pytest.mark.skipif(len(ALLOWED) < 2, reason="every thread is on the one CPU")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", set()), ("3", {3}), ("0-3,8", {0, 1, 2, 3, 8}), (" 2 , 0-1", {0, 1, 2}), ("5-5", {5})],
)
def test_a_list_of_cpus_is_read_as_linux_writes_it(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize(
    "text", ["a", "1-", "-1", "3-1", "1,,2", ",", "0-8192", "1 2", "0x1", "1-2-3", "99999999"]
)
def test_what_is_no_list_of_cpus_is_refused_and_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"copy_cpus: .*such|copy_cpus: .*looks like"):
        parse_cpus(text)


@given(st.frozensets(st.integers(0, CPU_MAX), max_size=40))
def test_a_list_survives_being_written(cpus: frozenset[int]) -> None:
    assert parse_cpus(cpu_list(cpus)) == cpus


def test_neighbours_are_written_as_a_range() -> None:
    assert cpu_list(frozenset({8, 0, 1, 2, 3})) == "0-3,8"


def test_cpus_that_we_may_not_use_are_refused_with_those_that_we_may() -> None:
    beyond = max(ALLOWED) + 1
    with pytest.raises(PlacementRefused, match="copy_cpus") as caught:
        Placement.settle(None, f"{min(ALLOWED)},{beyond}")
    assert f"CPU {beyond};" in str(caught.value)
    assert cpu_list(ALLOWED) in str(caught.value)


def test_without_settings_nothing_is_placed() -> None:
    assert Placement.settle(None, "") == Placement(None, frozenset())


def fake_nodes(root: Path, cpulist: str) -> Path:
    """Node 0, which has these CPUs."""
    (root / "has_memory").write_text("0\n")
    (root / "node0").mkdir()
    (root / "node0" / "cpulist").write_text(f"{cpulist}\n")
    return root


@has_nodes
def test_a_node_brings_those_of_its_cpus_that_we_may_use(tmp_path: Path) -> None:
    beyond = max(ALLOWED) + 1
    nodes = fake_nodes(tmp_path, f"{min(ALLOWED)},{beyond}")
    assert Placement.settle(0, "", nodes) == Placement(0, ONE)


@has_nodes
def test_a_node_without_cpus_pins_nothing(tmp_path: Path) -> None:
    assert Placement.settle(0, "", fake_nodes(tmp_path, "")) == Placement(0, frozenset())


@has_nodes
def test_cpus_that_were_named_beat_the_nodes(tmp_path: Path) -> None:
    nodes = fake_nodes(tmp_path, "")
    assert Placement.settle(0, cpu_list(ONE), nodes) == Placement(0, ONE)


@has_nodes
def test_a_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlacementRefused, match=r"numa_node: there is no NUMA node 777; .* are 0"):
        Placement.settle(777, "")


def test_a_kernel_without_nodes_refuses(tmp_path: Path) -> None:
    with pytest.raises(PlacementRefused, match=r"numa_node: .* shows none"):
        Placement.settle(0, "", tmp_path / "nothing")


@has_nodes
def test_what_the_kernel_refuses_is_said_when_settling(tmp_path: Path) -> None:
    """No kernel has so many nodes: mbind is really asked."""
    (tmp_path / "has_memory").write_text("1023\n")
    with pytest.raises(PlacementRefused, match=r"numa_node: memory cannot be placed on node 1023"):
        Placement.settle(1023, "", tmp_path)


@several_cpus
def test_only_the_thread_that_enters_is_kept_on_the_cpus() -> None:
    with ThreadPoolExecutor(1, initializer=Placement(None, ONE).enter) as pool:
        assert pool.submit(os.sched_getaffinity, 0).result() == ONE
    assert os.sched_getaffinity(0) == ALLOWED


def test_a_cpuset_that_has_shrunk_is_told_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = Placement(None, frozenset({CPU_MAX}))
    thread = threading.Thread(target=gone.enter)
    thread.start()
    thread.join()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def numa_policy(address: int) -> str:
    """What the kernel says of the mapping that begins there."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        start, policy, *_ = line.split()
        if int(start, 16) == address:
            return policy
    raise AssertionError(f"nothing is mapped at {address:x}")


@has_nodes
def test_a_pool_is_placed_on_its_node() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        for node, policy in ((0, "prefer:0"), (None, "default")):
            path = Path(root) / f"pool-{node}"
            pool = HostPool.create(path, mmap.PAGESIZE, 64, NO_LIMIT, node)
            address = ctypes.addressof(ctypes.c_char.from_buffer(pool.view(0, 1)))
            assert numa_policy(address) == policy
            assert path.stat().st_blocks * 512 >= 64 * mmap.PAGESIZE


@has_nodes
def test_a_pool_that_is_too_large_for_its_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        nodes = Path(root)
        (nodes / "node0").mkdir()
        (nodes / "node0" / "meminfo").write_text(
            "Node 0 MemTotal:  99 kB\nNode 0 MemFree:  8 kB\nNode 0 Active(file):  4 kB\n"
            "Node 0 Inactive(file):  4 kB\nNode 0 Shmem:  64 kB\n"
        )
        monkeypatch.setattr(
            "kvferry_daemon.memory.host.node_bytes_left", lambda node: node_bytes_left(node, nodes)
        )
        with pytest.raises(MemoryRefused) as caught:
            HostPool.create(nodes / "pool", 4096, 5, NO_LIMIT, 0)
        refused = caught.value
        numbers = (refused.needed_bytes, refused.available_bytes, refused.where)
        assert numbers == (20480, 16384, "NUMA node")
        assert not (nodes / "pool").exists()
        HostPool.create(nodes / "pool", 4096, 4, NO_LIMIT, 0).remove()


@has_nodes
def test_a_real_node_says_what_it_has_left(tmp_path: Path) -> None:
    left = node_bytes_left(0)
    assert left is not None
    assert 1 << 20 < left < os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE * 2
    assert node_bytes_left(0, tmp_path) is None
