"""Polls by message after all: boards that are none, that stand still, or go with their daemon."""

import logging
import threading
import time
from pathlib import Path

import pytest

from client.payloads import LAYOUT, WINDOW, payload
from kvferry_client import BoardTrouble, Client, FerryError, Role, connect
from kvferry_proto import worker
from kvferry_proto.board import HEADER_BYTES, MAGIC, VERSION
from kvferry_proto.worker import Snapshot
from live import LiveDaemon

WAIT_S = 20.0
WATCHED = worker.Watched(role=Role.SOURCE, transfer_id="t")


def spoiled(how: str, path: Path) -> None:
    """Put another file in the board's place; the daemon keeps the one that it has mapped."""
    data = bytearray(path.read_bytes())
    match how:
        case "truncated":
            del data[-1:]
        case "truncated in its header":
            del data[HEADER_BYTES - 1 :]
        case "empty":
            data.clear()
        case "longer":
            data += b"x"
        case "other version":
            data[len(MAGIC)] = VERSION + 1
        case "other magic":
            data[0] ^= 1
        case "other life":
            data[16] ^= 1
    path.unlink()
    if how != "missing":
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "trouble"),
    [
        ("truncated", BoardTrouble.TRUNCATED),
        ("truncated in its header", BoardTrouble.TRUNCATED),
        ("empty", BoardTrouble.TRUNCATED),
        ("longer", BoardTrouble.TRUNCATED),
        ("other version", BoardTrouble.OTHER_VERSION),
        ("other magic", BoardTrouble.NOT_A_BOARD),
        ("other life", BoardTrouble.OTHER_LIFE),
        ("missing", BoardTrouble.NOT_THERE),
    ],
)
def test_a_board_that_is_none_is_named_once_and_polls_go_by_message(
    daemon: LiveDaemon, caplog: pytest.LogCaptureFixture, how: str, trouble: BoardTrouble
) -> None:
    with connect(daemon.directory, LAYOUT) as first:
        assert first.welcome.pool.board is not None
        spoiled(how, Path(first.welcome.pool.board))
        with caplog.at_level(logging.INFO), connect(daemon.directory, LAYOUT) as client:
            assert client.board_trouble is trouble
            sending = client.send("t")
            for ready in range(3):
                assert client.poll(WATCHED).transfers[0].available_tokens == ready
                sending.fill(ready, payload(1))
            assert [r.message for r in caplog.records if "status board" in r.message] == [
                f"polls go by message, status board {first.welcome.pool.board!r} is {trouble}"
            ]


def test_a_daemon_that_stands_still_is_noticed_and_asked_as_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        LiveDaemon(tmp_path / "a", lost_s=2) as daemon,
        connect(daemon.directory, LAYOUT) as client,
        caplog.at_level(logging.INFO),
    ):
        client.send("t")
        client.poll(WATCHED)  # from now on by the board
        daemon.pause()
        [seen] = client.poll(WATCHED).transfers

        def look_on() -> None:
            while True:
                assert client.poll(WATCHED).transfers == [seen]

        with pytest.raises(FerryError) as caught:
            look_on()
        assert caught.value.code == "daemon_unreachable"
        assert client.board_trouble is BoardTrouble.STALE
        daemon.resume()
        until = time.monotonic() + WAIT_S
        while client.board_trouble is not None:
            assert client.poll(WATCHED).transfers[0].snapshot >= seen.snapshot
            assert time.monotonic() < until
        said = [record.message.partition(" ")[2] for record in caplog.records]
        assert len([one for one in said if "board" in one]) == 2  # gone, and back


def test_progress_never_falls_through_a_kill_and_a_restart(tmp_path: Path) -> None:
    daemon = LiveDaemon(tmp_path / "a", lost_s=5)
    seen: list[Snapshot] = []
    stop = threading.Event()

    def look(client: Client) -> None:
        while not stop.is_set():
            [now] = client.poll(WATCHED).transfers
            if not seen or now is not seen[-1]:
                seen.append(now)

    with connect(daemon.directory, LAYOUT) as client:
        sending = client.send("t", window_tokens=WINDOW)
        watcher = threading.Thread(target=look, args=(client,))
        watcher.start()
        try:
            for token in range(6):
                sending.fill(token, payload(1))
                if token in (2, 4):
                    daemon.process.kill()
                    daemon = daemon.again()
                [now] = client.poll(WATCHED).transfers
                assert now.snapshot >= sending.snapshot.snapshot
                assert now.available_tokens == token + 1
        finally:
            stop.set()
            watcher.join()
        numbers = [one.snapshot for one in seen]
        tokens = [one.available_tokens for one in seen]
        assert numbers == sorted(numbers)
        assert tokens == sorted(tokens)
        assert client.board_trouble is None
        daemon.pause()
        assert client.poll(WATCHED).transfers[0].available_tokens == 6  # by the new board
        daemon.resume()
        sending.abort()
    daemon.stop()


def test_a_board_goes_with_its_daemon(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a", lost_s=30, stop_s=0.1) as daemon,
        connect(daemon.directory, LAYOUT) as client,
    ):
        client.send("t")
        client.poll(WATCHED)
        assert client.welcome.pool.board is not None
        path = Path(client.welcome.pool.board)
        assert path.stat().st_mode & 0o777 == 0o600
        life = client.welcome.boot_id
        daemon.process.terminate()
        daemon.process.wait()
        assert not path.exists()
        with daemon.again():  # long before the heartbeat would be too old
            client.poll(WATCHED)
            assert client.welcome.boot_id != life
            assert path.exists()
            assert client.board_trouble is None
