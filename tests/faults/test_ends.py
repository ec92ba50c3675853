"""A daemon that is told to stop while its ledger is still being written."""

import contextlib
import signal
from pathlib import Path

from faults.processes import WAIT_S, FaultDaemon, until
from kvferry_proto.errors import FerryError
from live import RawWorker


def test_what_waits_for_the_ledger_at_a_stop_is_still_done(tmp_path: Path) -> None:
    """The lock file of a worker that has just left stayed behind, and errors were logged."""
    daemon = FaultDaemon(tmp_path / "a", trap=f"sink.ledger.before@1={tmp_path}")
    try:
        daemon.wait_ready()
        with RawWorker(daemon.directory):
            (tmp_path / "armed").touch()
        until((tmp_path / "hit").exists, "the worker's end was not written")
        daemon.process.send_signal(signal.SIGTERM)
        until(lambda: not answers(daemon), "it did not wait for its ledger")
        (tmp_path / "go").touch()
        assert daemon.end(WAIT_S) == 0
        assert daemon.files() == {"daemon.lock": 1}
        assert '"level": "error"' not in daemon.log()
    finally:
        daemon.make_sure_that_it_is_gone()


def answers(daemon: FaultDaemon) -> bool:
    """Whether its event loop runs."""
    with contextlib.suppress(FerryError):
        daemon.status()
        return True
    return False
