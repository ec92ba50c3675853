"""The daemon as a process: what it loads, what it leaves, how it stops."""

import os
import signal
import stat
import time
from pathlib import Path

from kvferry_proto import worker
from kvferry_proto.control import TransferStatus
from kvferry_proto.states import Role, State
from live import BLOCK, LAYOUT, WAIT_S, WINDOW, LiveDaemon, RawWorker


def test_neither_torch_nor_numpy_is_loaded_for_host_pools(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory):
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert "msgpack" in maps, "the check itself would see nothing"
    assert "libtorch" not in maps
    assert "_multiarray_umath" not in maps  # numpy; the path of this test has its name


def test_everything_in_the_runtime_directory_is_private(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        assert one.welcome is not None
        paths = [*daemon.directory.iterdir(), Path(one.welcome.pool.path)]
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert stat.S_IMODE(daemon.directory.stat().st_mode) == 0o700
    assert {name for name, mode in modes.items() if mode & 0o077} == set()
    assert {"worker.sock", "control.sock"} <= set(modes)


def test_all_space_of_a_pool_is_there_from_the_start(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        assert one.welcome is not None
        pool = one.welcome.pool
        facts = os.stat(pool.path)
        assert facts.st_size == pool.blocks * pool.block_bytes
        assert facts.st_blocks * 512 >= facts.st_size


def test_sigterm_takes_nothing_new_and_waits_for_what_runs(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as daemon:
        with RawWorker(daemon.directory) as one:
            one.snapshot(worker.Send(transfer_id="t"))
            one.snapshot(worker.Receive(transfer_id="t"))
            one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW)
            daemon.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 10
            while not daemon.status().draining:
                assert time.monotonic() < until
            assert one.code(worker.Send(transfer_id="new")) == "draining"
            one.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK, total_tokens=BLOCK))
            one.wait_end(Role.SINK)
            assert daemon.process.poll() is None, "the sink's window was not released yet"
            one.snapshot(worker.Release(transfer_id="t", role=Role.SINK))
            assert daemon.process.wait(10) == 0
            assert one.welcome is not None
            kept = {"ledger.db", Path(one.welcome.pool.path).name}  # its worker is still there
        left = {p.name for p in daemon.directory.rglob("*") if p.is_file() or p.is_socket()}
        assert left == {"daemon.lock", one.lock_name, *kept}
        assert "Traceback" not in daemon.log()


def test_a_silent_worker_loses_its_transfer_but_its_blocks_wait_for_proof(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a", lost_s=2) as daemon:
        with RawWorker(daemon.directory) as one, RawWorker(daemon.directory) as two:
            one.snapshot(worker.Send(transfer_id="t"))
            one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW)

            def failed(row: TransferStatus) -> bool:
                two.call(worker.Heartbeat())
                return row.snapshot.state is State.FAILED

            daemon.wait_for_transfer("t", failed)  # and not 200 times a second: that is a flood
            status = daemon.status()
            assert status.pools[0].blocks_quarantined == WINDOW // BLOCK
            assert status.blocks_free == status.blocks_total - WINDOW // BLOCK
            seen = one.poll(Role.SOURCE)
            assert seen.error is not None
            assert seen.error.code == "worker_lost"
        daemon.wait_until_free()


def test_a_pool_that_nobody_uses_makes_room_for_another_layout(tmp_path: Path) -> None:
    """The first layout took the whole budget for the daemon's life."""
    budget = 4 * WINDOW // BLOCK * LAYOUT.block_bytes
    other = LAYOUT.model_copy(update={"aux": ("rope",)})
    with LiveDaemon(tmp_path / "a", budget_bytes=budget, pool_tokens=1 << 20) as daemon:
        with RawWorker(daemon.directory) as first:
            assert first.welcome is not None
            old = Path(first.welcome.pool.path)
            second = RawWorker(daemon.directory, other, hello=False)
            hello = worker.Hello(lock=second.lock_name, layout=other)
            assert second.call(hello).error.code == "pool_refused"  # the first one is in use
            first.snapshot(worker.Send(transfer_id="t"))
        daemon.wait_until_free()
        with second:
            welcome = second.call(hello)
            assert isinstance(welcome, worker.Welcome)
            assert Path(welcome.pool.path).exists()
            assert not old.exists()


def test_a_worker_that_dies_before_its_hello_leaves_no_file(daemon: LiveDaemon) -> None:
    """Its lock file was there until the daemon's next start: one for every such death."""
    workers = daemon.directory / "workers"
    with RawWorker(daemon.directory, hello=False) as unlucky:
        lock = workers / unlucky.lock_name
        os.utime(lock, (0, 0))
        living = RawWorker(daemon.directory, hello=False)
        os.utime(workers / living.lock_name, (0, 0))
    until = time.monotonic() + WAIT_S
    while lock.exists():
        assert time.monotonic() < until, list(workers.iterdir())
        time.sleep(0.02)
    assert (workers / living.lock_name).exists()  # it may say hello yet
    living.close()
