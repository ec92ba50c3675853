"""A pool's file that was cut or is gone: that pool is lost, and nobody else's."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.payloads import BLOCK, LAYOUT, WINDOW, payload
from kvferry_client import connect
from kvferry_proto import worker
from kvferry_proto.states import Role
from live import LAYOUT as OTHER
from live import LiveDaemon, RawWorker


def cut(pool: Path) -> None:
    """As any worker can who maps it."""
    os.truncate(pool, 0)


def kill_by(raw: RawWorker, daemon: LiveDaemon) -> None:
    """Have the daemon wipe blocks that are not there any more."""
    raw.snapshot(worker.Abort(transfer_id="lost", role=Role.SOURCE, reason="x"))
    raw.snapshot(worker.Release(transfer_id="lost", role=Role.SOURCE))
    raw.socket.send(worker.CALLS.encode(worker.Send(transfer_id="kills")))
    assert daemon.process.wait(20) == -signal.SIGBUS


def test_a_worker_that_cuts_its_pool_ends_the_daemon_and_loses_its_own_alone(
    tmp_path: Path,
) -> None:
    daemon = LiveDaemon(tmp_path / "a", budget_bytes="1MiB")
    arrays = payload(WINDOW)
    with connect(daemon.directory, LAYOUT) as client, RawWorker(daemon.directory, OTHER) as raw:
        sending, receiving = client.send("t"), client.receive("t")
        sending.fill(0, {name: array[:BLOCK] for name, array in arrays.items()})
        daemon.wait_for_transfer("t", lambda row: row.snapshot.sent_tokens == BLOCK)
        for transfer_id in ("lost", "also"):
            raw.snapshot(worker.Send(transfer_id=transfer_id))
            raw.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens > 0, transfer_id)
        assert raw.welcome is not None
        pool = Path(raw.welcome.pool.path)
        cut(pool)
        kill_by(raw, daemon)
        daemon = daemon.again()
        daemon.wait_for_log(f"pool {pool.name} is lost: its file has 0 bytes")
        sending.fill(BLOCK, {k: v[BLOCK:] for k, v in arrays.items()}, aux={"first_token": 7})
        sending.finish()
        got = np.concatenate([window.gather("ids").copy() for window in receiving])
        receiving.release()
        np.testing.assert_array_equal(got, arrays["ids"])
        sending.wait(20)
        serves_anew(raw, pool)
    daemon.wait_until_free()
    daemon.stop()


def serves_anew(raw: RawWorker, pool: Path) -> None:
    """Its worker has no session, finds its transfer failed in a new one, and goes on."""
    assert raw.welcome is not None
    raw.socket = raw.connect()  # the old one may bear an answer to what killed the daemon
    session = raw.welcome.session
    hello = worker.Hello(lock=raw.lock_name, layout=OTHER, session=session)
    assert raw.code(hello) == "unknown_session"
    raw.welcome = raw.call(worker.Hello(lock=raw.lock_name, layout=OTHER))
    assert isinstance(raw.welcome, worker.Welcome), raw.welcome
    assert raw.welcome.session != session
    end = raw.poll(Role.SOURCE, "also")
    assert end.error is not None
    assert end.error.code == "pool_lost"
    assert pool.stat().st_size > 0
    raw.snapshot(worker.Send(transfer_id="also", attempt=1))
    watched = worker.Watched(role=Role.SOURCE, transfer_id="also", attempt=1)
    seen = raw.snapshot(worker.Poll(transfers=[watched], wait_s=5))
    raw.fill(seen, seen.allocated_tokens)
    raw.snapshot(worker.Abort(transfer_id="also", role=Role.SOURCE, attempt=1, reason="x"))
    raw.snapshot(worker.Release(transfer_id="also", role=Role.SOURCE, attempt=1))


@pytest.mark.parametrize("how", [cut, Path.unlink, lambda pool: os.truncate(pool, 1 << 20)])
def test_a_file_that_is_not_what_the_ledger_says_is_removed(
    tmp_path: Path, how: Callable[[Path], None]
) -> None:
    daemon = LiveDaemon(tmp_path / "a")
    with RawWorker(daemon.directory) as raw:
        assert raw.welcome is not None
        pool = Path(raw.welcome.pool.path)
        raw.snapshot(worker.Send(transfer_id="t"))
        daemon.process.kill()
        daemon.process.wait()
        how(pool)
        daemon = daemon.again()
        assert not pool.exists()
        assert not (daemon.directory / "ledger.bad.db").exists()
        (row,) = daemon.transfers("t")
        assert row.snapshot.error is not None
        assert row.snapshot.error.code == "pool_lost"
        daemon.process.kill()
        daemon = daemon.again()  # and so it stays
        assert daemon.transfers("t")[0].snapshot.error == row.snapshot.error
    daemon.stop()
