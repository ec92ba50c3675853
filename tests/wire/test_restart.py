"""A daemon that is killed goes on from its ledger: same pools, same sessions, from its token."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.payloads import BLOCK, LAYOUT, WINDOW, payload
from kvferry_client import Client, FerryError, Role, connect
from kvferry_proto import worker
from kvferry_proto.states import State
from live import LiveDaemon, RawWorker

TOKENS = 4 * WINDOW + 5
BOTH = [("source",), ("sink",), ("source", "sink")]


class Pair:
    """A source's and a sink's daemon, their workers, and what has been received."""

    def __init__(self, directory: Path, **flags: object) -> None:
        names = ("source", "sink")
        self.daemons = {name: LiveDaemon(directory / name, **flags) for name in names}
        self.source = connect(self.daemons["source"].directory, LAYOUT, "source")
        self.sink = connect(self.daemons["sink"].directory, LAYOUT, "sink")
        self.arrays = payload(TOKENS)

    def kill(self, *names: str) -> None:
        for name in names:
            self.daemons[name].process.send_signal(signal.SIGKILL)
        for name in names:
            self.daemons[name] = self.daemons[name].again()

    def move(self, killed: tuple[str, ...], at_windows: set[int]) -> list[np.ndarray]:
        """Move the payload; kill daemons after so many windows were taken over."""
        address = self.daemons["source"].address
        got = []
        with self.source.send("t") as sending, self.sink.receive("t", source=address) as receiving:
            windows = receiving.windows()
            at = 0
            for number in range(99):
                if number in at_windows:
                    self.kill(*killed)
                end = min(TOKENS, at + WINDOW)
                if at < TOKENS:
                    part = {name: array[at:end] for name, array in self.arrays.items()}
                    sending.fill(at, part, aux={"first_token": 7} if end == TOKENS else None)
                    at = end
                    if at == TOKENS:
                        sending.finish()
                window = next(windows, None)
                if window is None:
                    break
                got.append(window.gather("ids").copy())
            assert receiving.aux == {"first_token": 7}
        sending.wait(20)
        return got

    def close(self) -> None:
        self.source.close()
        self.sink.close()
        for daemon in self.daemons.values():
            daemon.wait_until_free()
            assert "Traceback" not in daemon.log()
            daemon.stop()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    one = Pair(tmp_path)
    yield one
    one.close()


@pytest.mark.parametrize("killed", BOTH, ids=" and ".join)
@pytest.mark.parametrize("window", [0, 2])
def test_a_killed_daemon_goes_on_from_its_token(
    pair: Pair, killed: tuple[str, ...], window: int
) -> None:
    got = pair.move(killed, {window})
    np.testing.assert_array_equal(np.concatenate(got), pair.arrays["ids"])


def test_daemons_are_killed_at_every_window(pair: Pair) -> None:
    got = pair.move(("source", "sink"), set(range(99)))
    np.testing.assert_array_equal(np.concatenate(got), pair.arrays["ids"])


def test_a_handoff_survives_its_daemon(tmp_path: Path) -> None:
    daemon = LiveDaemon(tmp_path / "a")
    with connect(daemon.directory, LAYOUT) as client:
        arrays = payload(WINDOW)
        sending = client.send("t")
        receiving = client.receive("t")
        sending.fill(0, {k: v[:BLOCK] for k, v in arrays.items()})
        daemon.wait_for_transfer("t", lambda row: row.snapshot.sent_tokens == BLOCK)
        daemon.process.kill()
        daemon = daemon.again()
        sending.fill(BLOCK, {k: v[BLOCK:] for k, v in arrays.items()}, aux={"first_token": 7})
        sending.finish()
        got = np.concatenate([window.gather("ids").copy() for window in receiving])
        receiving.release()
        np.testing.assert_array_equal(got, arrays["ids"])
    daemon.wait_until_free()
    daemon.stop()


def test_a_worker_that_died_meanwhile_strands_no_block(tmp_path: Path) -> None:
    daemon = LiveDaemon(tmp_path / "a")
    one = RawWorker(daemon.directory)
    one.snapshot(worker.Send(transfer_id="t"))
    one.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == WINDOW)
    daemon.process.kill()
    daemon.process.wait()
    one.close()
    daemon = daemon.again()
    daemon.wait_until_free()
    assert daemon.status().workers == 0
    daemon.stop()


def test_ended_transfers_are_remembered(tmp_path: Path) -> None:
    daemon = LiveDaemon(tmp_path / "a")
    with connect(daemon.directory, LAYOUT) as client:
        client.send("t", attempt=3).abort("enough")
        daemon.process.kill()
        daemon = daemon.again()
        watched = worker.Watched(role=Role.SOURCE, transfer_id="t", attempt=3)
        [seen] = client.poll(watched).transfers
        assert seen.state is State.FAILED
        assert seen.error is not None
        assert seen.error.code == "aborted"
        with pytest.raises(FerryError) as caught:
            client.send("t", attempt=2)
        assert caught.value.code == "stale_attempt"
        with pytest.raises(FerryError) as caught:
            client.send("t", attempt=3, window_tokens=BLOCK)
        assert caught.value.code == "parameters_differ"
    daemon.stop()


def begun(tmp_path: Path) -> tuple[LiveDaemon, Client]:
    """A daemon with a transfer, and then its death."""
    daemon = LiveDaemon(tmp_path / "a")
    client = connect(daemon.directory, LAYOUT)
    client.send("t")
    daemon.wait_for_transfer("t", lambda row: row.snapshot.allocated_tokens == WINDOW)
    daemon.process.kill()
    daemon.process.wait()
    return daemon, client


def damage(directory: Path, how: str) -> None:
    import sqlite3

    from kvferry_daemon.core.records import RECORDS, DaemonRecord, PoolRecord
    from kvferry_daemon.ledger import rows_of

    ledger = directory / "ledger.db"
    rows = dict(rows_of(ledger))
    daemon = RECORDS.decode(rows["daemon"])
    assert isinstance(daemon, DaemonRecord)
    match how:
        case "of another format":
            rows["daemon"] = RECORDS.encode(daemon.model_copy(update={"format": 99}))
            rows["aux:source:0:t"] = b"\xff\xff"  # whatever that means there
        case "of another machine's life":
            rows["daemon"] = RECORDS.encode(daemon.model_copy(update={"machine_boot": "x"}))
        case "with a row that is none":
            rows["transfer:source:0:t"] = b"\xff\xff"
        case "with a transfer that has no opening":
            del rows["opening:source:0:t"]
        case "with a block leased twice":
            rows["transfer:source:1:t"] = rows["transfer:source:0:t"]
            rows["opening:source:1:t"] = rows["opening:source:0:t"]
        case "whose pool is of another layout":
            [name] = [name for name in rows if name.startswith("pool:")]
            record = RECORDS.decode(rows[name])
            assert isinstance(record, PoolRecord)
            assert record.layout.planes[0].name != "other"
            plane = record.layout.planes[0].model_copy(update={"name": "other"})
            layout = record.layout.model_copy(update={"planes": (plane, *record.layout.planes[1:])})
            rows[name] = RECORDS.encode(record.model_copy(update={"layout": layout}))
        case "of another daemon":
            (directory / "other").mkdir()
            other, client = begun(directory / "other")
            client.close()
            for file in directory.glob("ledger.db*"):
                file.unlink()
            for file in other.directory.glob("ledger.db*"):
                shutil.copy(file, directory)
            other.stop()
            return
        case "that is no database":
            ledger.write_bytes(b"what is this" * 1000)
            return
        case "with free pages that are none" | "for reading only":
            at, wrong = {"w": (32, [0, 0, 9, 9, 0, 0, 0, 5]), "f": (18, [3])}[how[0]]
            data = bytearray(ledger.read_bytes())
            data[at : at + len(wrong)] = bytes(wrong)
            ledger.write_bytes(data)
            return
    db = sqlite3.connect(ledger)
    with db:
        db.execute("DELETE FROM rows")
        db.executemany("INSERT INTO rows VALUES (?, ?)", rows.items())
    db.close()


@pytest.mark.parametrize(
    "how",
    [
        "of another format",
        "of another machine's life",
        "with a row that is none",
        "with a transfer that has no opening",
        "with a block leased twice",
        "whose pool is of another layout",
        "of another daemon",
        "that is no database",
        "with free pages that are none",  # each life ended at its first full page
        "for reading only",  # and here at its first row
    ],
)
def test_a_ledger_that_cannot_be_trusted_is_set_aside(tmp_path: Path, how: str) -> None:
    daemon, client = begun(tmp_path)
    with client:
        damage(daemon.directory, how)
        daemon = daemon.again()
        daemon.wait_for_log("beginning anew")
        assert (how == "of another format") == ("its format is 99, not" in daemon.log())
        assert (daemon.directory / "ledger.bad.db").exists()
        watched = worker.Watched(role=Role.SOURCE, transfer_id="t")
        assert client.poll(watched).refused[0].error.code == "unknown_transfer"
        sending = client.send("t", attempt=1)
        sending.fill(0, payload(1))
        sending.abort()
    daemon.wait_until_free()
    daemon.stop()


def test_a_ledger_cut_anywhere_is_used_or_set_aside(tmp_path: Path) -> None:
    """As by a full disk, or a copy that was cut: never half of the truth."""
    daemon, client = begun(tmp_path)
    client.close()
    ledger, log = daemon.directory / "ledger.db", daemon.directory / "ledger.db-wal"
    saved = {path: path.read_bytes() for path in (ledger, log) if path.exists()}
    pools = tmp_path / "saved"
    shutil.copytree(daemon.directory / "pools", pools)
    for path, whole in saved.items():
        for part in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            for other, content in saved.items():
                other.write_bytes(content)
            for stale in daemon.directory.glob("ledger.bad*"):
                stale.unlink()
            shutil.copytree(pools, daemon.directory / "pools", dirs_exist_ok=True)
            path.write_bytes(whole[:part])
            daemon = daemon.again()
            daemon.wait_until_free()  # its worker is dead
            assert "Traceback" not in daemon.log()
            daemon.process.kill()
            daemon.process.wait()
    daemon.stop()


def test_a_clean_stop_without_workers_leaves_nothing(tmp_path: Path) -> None:
    daemon = LiveDaemon(tmp_path / "a")
    with connect(daemon.directory, LAYOUT):
        pass
    daemon.wait_for_workers(0)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(10) == 0
    left = sorted(p.name for p in daemon.directory.rglob("*") if p.is_file())
    assert left == ["daemon.lock"]
    daemon.stop()


def test_a_clean_stop_keeps_what_workers_have(tmp_path: Path) -> None:
    """An upgrade of the daemon is no reason to lose a transfer."""
    daemon = LiveDaemon(tmp_path / "a", stop_s=0.2)
    with connect(daemon.directory, LAYOUT) as client:
        sending = client.send("t")
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(10) == 3  # it has not drained
        daemon = daemon.again()
        sending.fill(0, payload(5), aux={"first_token": 1})
        assert sending.snapshot.available_tokens == 5
        sending.abort()
    daemon.wait_until_free()
    daemon.stop()
