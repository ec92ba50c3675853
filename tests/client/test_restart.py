"""What workers see when their daemon is gone, comes back, or comes back as another."""

import threading
from pathlib import Path

import pytest

from client.payloads import LAYOUT, payload
from kvferry_client import FerryError, Role, connect
from kvferry_proto import worker
from live import LiveDaemon


def test_no_daemon_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FerryError) as caught:
        connect(tmp_path, LAYOUT)
    assert caught.value.code == "daemon_unreachable"
    assert str(tmp_path) in caught.value.message


def test_transfers_of_a_daemon_that_began_anew_are_over_and_new_ones_are_not(
    tmp_path: Path,
) -> None:
    first = LiveDaemon(tmp_path / "a")
    with connect(first.directory, LAYOUT) as client:
        sending = client.send("t")
        first.stop_and_forget()
        watched = worker.Watched(role=Role.SOURCE, transfer_id="t")
        with LiveDaemon(tmp_path / "a") as second:
            before = client.pool
            with pytest.raises(FerryError) as caught:
                sending.fill(0, payload(1))
            assert caught.value.code == "daemon_restarted"
            assert client.pool is not before
            assert client.poll(watched).refused[0].error.code == "unknown_transfer"
            with client.send("t", attempt=1) as again:
                again.fill(0, payload(1), aux={"first_token": 1})
            assert again.snapshot.total_tokens == 1
            assert second.status().workers == 1


def test_a_thread_that_opens_after_a_restart_fills_the_new_pool(tmp_path: Path) -> None:
    """Another thread met the restart first; this one filled a file that nobody read any more."""
    first = LiveDaemon(tmp_path / "a")
    with connect(first.directory, LAYOUT) as client:
        old = client.send("old")
        first.stop_and_forget()
        with LiveDaemon(tmp_path / "a") as second, LiveDaemon(tmp_path / "b") as other:

            def meet() -> None:
                with pytest.raises(FerryError):
                    old.ready(0)

            thread = threading.Thread(target=meet)
            thread.start()
            thread.join()
            arrays = payload(5)
            with client.send("new") as sending:
                sending.fill(0, arrays, aux={"first_token": 1})
            with (
                connect(other.directory, LAYOUT) as sink,
                sink.receive("new", source=second.address) as receiving,
            ):
                (window,) = receiving
                assert (window.gather("ids") == arrays["ids"]).all()


def test_a_worker_joins_a_runtime_directory_that_was_made_anew(tmp_path: Path) -> None:
    """As when an emptyDir volume was thrown away: its lock file went with the directory."""
    first = LiveDaemon(tmp_path / "a")
    with connect(first.directory, LAYOUT) as client:
        first.stop()
        first.directory.rename(tmp_path / "gone")
        with LiveDaemon(tmp_path / "a") as second:
            sending = client.send("t")
            assert second.status().workers == 1
            sending.abort()


def test_a_slow_first_hello_is_one_session(tmp_path: Path) -> None:
    """The daemon stands still while the client repeats its hello."""
    with LiveDaemon(tmp_path / "a", lost_s=2) as daemon:
        daemon.pause()
        threading.Timer(1.5, daemon.resume).start()
        with connect(daemon.directory, LAYOUT) as client:
            assert daemon.status().workers == 1
            sending = client.send("t")
            watched = worker.Watched(role=Role.SOURCE, transfer_id="t", after=99)
            client.poll(watched, wait_s=5)  # the heart beats for the session that has it
            sending.ready(0)
            assert not sending.ended
            sending.abort()
