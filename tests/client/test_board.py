"""Polls by status board: the same answers without a message, or by message after all."""

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import board_writer
from client.payloads import BLOCK, LAYOUT, WINDOW, Daemons, payload
from client.ranks import Ranks
from kvferry_client import (
    AsyncClient,
    BoardTrouble,
    Client,
    FerryError,
    Role,
    StallReason,
    State,
    connect,
)
from kvferry_client import board as boards
from kvferry_client.board import Board
from kvferry_daemon.memory.board import Board as WrittenBoard
from kvferry_proto import worker
from kvferry_proto.board import HEADER_BYTES, MAGIC, SLOT_BYTES, VERSION
from kvferry_proto.worker import Snapshot
from live import LiveDaemon

WAIT_S = 20.0
LOOKS = 30_000
WATCHED = worker.Watched(role=Role.SOURCE, transfer_id="t")
SINK = worker.Watched(role=Role.SINK, transfer_id="t")


def by_message(client: Client, watched: worker.Watched = WATCHED) -> Snapshot:
    reply = client.call(worker.Poll(transfers=[watched]))
    assert isinstance(reply, worker.Snapshots)
    return reply.transfers[0].model_copy(update={"slot": None})


def by_board(client: Client, watched: worker.Watched = WATCHED) -> Snapshot:
    """A poll, which has to be answered by the board: the daemon stands still."""
    [seen] = client.poll(watched).transfers
    assert client.board_trouble is None
    return seen.model_copy(update={"slot": None})


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LiveDaemon]:
    """One that is not taken for stale while it stands still for a moment."""
    with LiveDaemon(tmp_path / "a", lost_s=30) as daemon:
        yield daemon
        assert "Traceback" not in daemon.log()


# --- what the board answers ---


def test_what_has_not_changed_is_the_same_object_and_costs_no_message(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client, client.send("t") as sending:
        client.poll(WATCHED)
        daemon.pause()
        [seen] = client.poll(WATCHED).transfers
        assert client.poll(WATCHED).transfers[0] is seen
        assert client.poll(WATCHED.model_copy(update={"after": seen.snapshot})).transfers == []
        assert client.poll(WATCHED, wait_s=5).transfers[0] is seen  # news already
        daemon.resume()
        assert seen.snapshot == sending.snapshot.snapshot


def test_the_board_shows_what_a_message_would_bring(daemon: LiveDaemon, tmp_path: Path) -> None:
    """Through a whole life, on both sides; each time the daemon stands still while we look."""
    with (
        LiveDaemon(tmp_path / "b", lost_s=30) as other,
        connect(daemon.directory, LAYOUT) as source,
        connect(other.directory, LAYOUT) as sink,
    ):
        sinks = WATCHED.model_copy(update={"role": Role.SINK})
        sending = source.send("t")
        receiving = sink.receive("t", source=daemon.address)

        def check() -> None:
            for client, one, watched in ((source, daemon, WATCHED), (sink, other, sinks)):
                client.poll(watched)
                agree(client, one, watched)

        check()
        for first in range(0, 3 * WINDOW, BLOCK):
            sending.fill(first, {k: v[:BLOCK] for k, v in payload(BLOCK).items()})
            check()
            for _ in range(2):
                now = receiving.logic.now
                sink_poll = sinks.model_copy(update={"after": now.snapshot})
                receiving.logic.note(sink.poll(sink_poll, wait_s=0.2))
            receiving.resume(receiving.sent_tokens)
            check()
        sending.finish({"first_token": 7})
        receiving.wait()
        check()
        assert by_message(sink, sinks).aux == {"first_token": 7}
        receiving.release()


def agree(client: Client, daemon: LiveDaemon, watched: worker.Watched) -> None:
    """Compare board and message, of a moment at which nothing changes between the two."""
    until = time.monotonic() + WAIT_S
    while True:
        before = by_message(client, watched)
        seen = by_board(client, watched)
        if by_message(client, watched) == before:
            assert seen == before
            return
        assert time.monotonic() < until


def test_aux_values_are_asked_for_once(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client, client.send("t") as sending:
        client.poll(WATCHED)
        sending.fill(0, payload(3), {"first_token": 5})
        assert client.poll(WATCHED).transfers[0].aux == {"first_token": 5}
        client.poll(WATCHED)
        sending.fill(3, payload(4))
        daemon.pause()
        [seen] = client.poll(WATCHED).transfers
        daemon.resume()
        assert (seen.available_tokens, seen.aux) == (7, {"first_token": 5})


def test_several_transfers_in_one_poll_and_only_the_unknown_are_asked_for(
    daemon: LiveDaemon,
) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        client.send("t").fill(0, payload(2))
        client.send("u")
        both = [WATCHED, WATCHED.model_copy(update={"transfer_id": "u"})]
        client.poll(WATCHED)
        assert [one.transfer_id for one in client.poll(*both).transfers] == ["t", "u"]
        daemon.pause()
        assert [one.transfer_id for one in client.poll(*both).transfers] == ["t", "u"]
        daemon.resume()
        three = [*both, WATCHED.model_copy(update={"transfer_id": "none"})]
        reply = client.poll(*three)
        assert [one.transfer_id for one in reply.transfers] == ["t", "u"]
        assert [one.error.code for one in reply.refused] == ["unknown_transfer"]


def test_a_failure_says_why(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        sending = client.send("t")
        client.poll(WATCHED)
        client.call(worker.Abort(role=Role.SOURCE, transfer_id="t", reason="enough"))
        [seen] = client.poll(WATCHED).transfers
        assert seen.state is State.FAILED
        assert seen.error is not None
        assert "enough" in seen.error.message
        sending.release()


def test_the_asyncio_client_looks_at_the_board_too(daemon: LiveDaemon) -> None:
    async def run() -> None:
        async with AsyncClient(daemon.directory, LAYOUT) as client:
            await client.send("t")
            await client.poll(WATCHED)
            daemon.pause()
            [seen] = (await client.poll(WATCHED)).transfers
            assert (await client.poll(WATCHED)).transfers[0] is seen
            assert client.board_trouble is None
            daemon.resume()

    asyncio.run(run())


def test_a_worker_that_only_looks_at_the_board_is_not_taken_for_lost(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a", lost_s=0.8) as daemon,
        connect(daemon.directory, LAYOUT) as client,
    ):
        client.send("t")
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            [seen] = client.poll(WATCHED).transfers
            assert seen.state is not State.FAILED, seen.error


# --- what it must not answer ---


def test_a_client_that_is_closed_or_forked_does_not_look(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        client.send("t")
        client.poll(WATCHED)
        client.poll(WATCHED)
        child = os.fork()
        if child == 0:
            try:
                client.poll(WATCHED)
            except FerryError as error:
                os._exit(0 if "fork" in error.message else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(FerryError) as caught:
        client.poll(WATCHED)
    assert caught.value.code == "client_closed"


def test_what_is_no_poll_is_refused_as_ever(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        bad: list[Any]
        for bad in ([], ["t"], [1, WATCHED]):
            with pytest.raises(FerryError) as caught:
                client.poll(*bad)
            assert caught.value.code == "bad_message"


def test_the_slot_of_a_forgotten_transfer_goes_to_another(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        sending = client.send("t")
        [first] = client.poll(WATCHED).transfers
        client.poll(WATCHED)
        sending.abort("enough")
        other = WATCHED.model_copy(update={"transfer_id": "u"})
        client.send("u").fill(0, payload(5))
        [second] = client.poll(other).transfers
        assert first.slot is not None
        assert second.slot is not None
        assert first.slot.index == second.slot.index
        [old] = client.poll(WATCHED).transfers
        assert (old.transfer_id, old.state, old.slot) == ("t", State.FAILED, None)
        assert client.poll(other).transfers[0].available_tokens == 5


def test_another_clients_slot_is_not_taken_for_ones_own(daemon: LiveDaemon) -> None:
    """The slot goes on while this one is not looking: only the key tells."""
    with connect(daemon.directory, LAYOUT) as client, connect(daemon.directory, LAYOUT) as other:
        sending = client.send("t")
        client.poll(WATCHED)
        client.poll(WATCHED)
        sending.abort("enough")
        for name in "uv":
            other.send(name).fill(0, payload(5))
            other.poll(WATCHED.model_copy(update={"transfer_id": name}))
        [old] = client.poll(WATCHED).transfers
        assert (old.transfer_id, old.state, old.available_tokens) == ("t", State.FAILED, 0)


def test_who_finds_no_slot_polls_by_message(tmp_path: Path) -> None:
    names = [f"t{number}" for number in range(4097)]
    with (
        LiveDaemon(tmp_path / "a", lost_s=30) as daemon,
        connect(daemon.directory, LAYOUT) as client,
    ):
        for first in range(0, len(names), 256):
            calls: list[worker.Verb] = [
                worker.Send(transfer_id=one) for one in names[first : first + 256]
            ]
            client.call(worker.Batch(calls=calls))
        watched = [WATCHED.model_copy(update={"transfer_id": one}) for one in names]
        for first in range(0, 4096, 1024):  # a frame has no room for more
            given = client.poll(*watched[first : first + 1024]).transfers
            assert all(one.slot is not None for one in given)
        for _ in range(2):
            [late] = client.poll(watched[-1]).transfers
            assert (late.transfer_id, late.slot) == (names[-1], None)
        daemon.pause()
        assert [one.transfer_id for one in client.poll(*watched[:-1]).transfers] == names[:-1]
        daemon.resume()


def test_thousands_that_are_up_to_date_learn_their_slots_in_frames_of_a_bounded_size(
    daemon: LiveDaemon,
) -> None:
    """All of them in one answer would be over a frame's limit."""
    names = [f"t{number}" for number in range(4096)]
    with connect(daemon.directory, LAYOUT) as client:
        watched = []
        for first in range(0, len(names), 256):
            sends: list[worker.Verb] = [
                worker.Send(transfer_id=one) for one in names[first : first + 256]
            ]
            for reply in client.call(worker.Batch(calls=sends)).replies:
                [seen] = reply.transfers
                named = {"transfer_id": seen.transfer_id, "after": seen.snapshot}
                watched.append(WATCHED.model_copy(update=named))
        for _ in range(len(names) // 128):
            assert client.poll(*watched).transfers == []
        daemon.pause()
        assert client.poll(*watched).transfers == []
        daemon.resume()


# --- groups ---


def test_ranks_that_only_poll_take_the_same_windows_over(daemons: Daemons) -> None:
    """A rank says by message that it has acted; else nobody would see anything new."""
    a, b = daemons
    tokens = 3 * WINDOW + 5
    taken: dict[int, list[int]] = {0: [], 1: []}

    def send(rank: int) -> None:
        with (
            connect(a.directory, LAYOUT) as client,
            client.send("t", rank=rank, world_size=2, window_tokens=WINDOW) as sending,
        ):
            sending.fill(0, payload(tokens), {"first_token": 1})

    def receive(rank: int) -> None:
        with connect(b.directory, LAYOUT) as client:
            receiving = client.receive(
                "t", source=a.address, rank=rank, world_size=2, window_tokens=WINDOW // 2
            )
            now = receiving.snapshot
            until = time.monotonic() + WAIT_S
            while now.state is not State.SUCCESS:
                assert time.monotonic() < until, now
                assert now.state is not State.FAILED, now.error
                watched = worker.Watched(
                    role=Role.SINK, transfer_id="t", rank=rank, after=now.snapshot
                )
                for seen in client.poll(watched).transfers:
                    assert seen.snapshot > now.snapshot
                    now = seen
                if now.stall is StallReason.WAITING_FOR_RESUME:
                    taken[rank].append(now.sent_tokens)
                    receiving.resume(now.sent_tokens)
            receiving.release()

    sinks = Ranks(receive, 2)
    Ranks(send, 2).join()
    sinks.join()
    assert sorted(set(taken[0])) == sorted(set(taken[1]))
    assert len(set(taken[0])) >= 3


# --- boards that cannot be trusted ---


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
        LiveDaemon(tmp_path / "a", lost_s=0.8) as daemon,
        connect(daemon.directory, LAYOUT) as client,
        caplog.at_level(logging.INFO),
    ):
        client.send("t")
        [seen] = client.poll(WATCHED).transfers
        daemon.pause()

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
    daemon = LiveDaemon(tmp_path / "a", lost_s=1)
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


# --- answers and looks that overtake each other ---


@pytest.fixture
def written() -> Iterator[tuple[WrittenBoard, Board]]:
    """A board, as the daemon writes it and as a client looks at it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        path = Path(root) / "board"
        daemons = WrittenBoard.create(path, 4, board_writer.BOOT_ID, 3600.0)
        yield daemons, Board(a_welcome(path))


def test_an_answer_that_was_overtaken_by_a_look_is_not_what_is_told(
    written: tuple[WrittenBoard, Board],
) -> None:
    daemons, board = written
    daemons.show(board_writer.state(5))
    assert board.note(board_writer.state(4), -1).snapshot == 4
    seen = board.look(SINK)
    assert seen is not None
    assert seen.number == 5
    assert board.note(board_writer.state(4), -1) is seen.snapshot
    assert board.look(SINK) == seen


def test_a_slot_that_is_behind_the_last_answer_is_not_believed(
    written: tuple[WrittenBoard, Board],
) -> None:
    daemons, board = written
    daemons.show(board_writer.state(4))
    board.note(board_writer.state(5), -1)
    assert board.look(SINK) is None
    daemons.show(board_writer.state(6))
    seen = board.look(SINK)
    assert seen is not None
    assert seen.snapshot == board_writer.state(6)


def test_a_slot_that_stays_half_written_is_asked_for(
    written: tuple[WrittenBoard, Board],
) -> None:
    """As by a daemon that died in the middle of it."""
    daemons, board = written
    daemons.show(board_writer.state(4))
    board.note(board_writer.state(4), -1)
    assert board.look(SINK) is not None
    first = HEADER_BYTES + SLOT_BYTES
    with daemons.path.open("r+b") as file:
        file.seek(first)
        file.write(b"\x03")
    assert board.look(SINK) is None
    daemons.show(board_writer.state(6))
    assert board.look(SINK) is not None


def test_a_beat_that_comes_while_one_looks_makes_the_board_no_staler(
    written: tuple[WrittenBoard, Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemons, board = written
    daemons.show(board_writer.state(4))
    board.note(board_writer.state(4), -1)

    def clock() -> int:
        """The daemon beats as soon as the time has been read."""
        now_ns = time.monotonic_ns()
        while time.monotonic_ns() == now_ns:
            pass
        daemons.beat()
        return now_ns

    monkeypatch.setattr(boards, "monotonic_ns", clock)
    for _ in range(2):
        assert board.look(SINK) is not None
        assert board.is_kept()
        assert board.trouble is None


def test_a_cleared_slot_is_nobodys(written: tuple[WrittenBoard, Board]) -> None:
    daemons, board = written
    daemons.show(board_writer.state(4))
    board.note(board_writer.state(4), -1)
    assert board.look(SINK) is not None
    daemons.clear(board_writer.SLOT.index)
    assert board.look(SINK) is None


def test_news_of_a_group_are_asked_for(written: tuple[WrittenBoard, Board]) -> None:
    """Its ranks tell by their polls that they have acted."""
    daemons, board = written
    old, new = (board_writer.state(n).model_copy(update={"world_size": 2}) for n in (4, 5))
    daemons.show(old)
    board.note(old, 4)
    assert board.look(SINK.model_copy(update={"after": 4})) is not None
    daemons.show(new)
    assert board.look(SINK.model_copy(update={"after": 4})) is None
    board.note(new, 4)
    assert board.look(SINK.model_copy(update={"after": 4})) is not None
    assert board.look(SINK.model_copy(update={"after": 5})) is None  # not told yet


def test_who_has_lost_a_slot_takes_nothing_from_who_has_it_now(
    written: tuple[WrittenBoard, Board],
) -> None:
    daemons, board = written
    first = board_writer.state(4)
    second = first.model_copy(update={"transfer_id": "u"})
    board.note(first, -1)
    board.note(second, -1)
    for seen in (first, second):  # both are forgotten, one after the other
        assert board.note(seen.model_copy(update={"slot": None}), -1).slot is None
    board.note(first, -1)
    daemons.show(first)
    assert board.look(SINK) is not None


# --- torn reads ---

HAMMER_S = 100.0  # two readers and a writer may have to share a slow core


def test_no_reader_ever_sees_a_mix_of_two_states() -> None:
    """Another process writes as fast as it can, through what the daemon writes with."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        path = Path(root) / "board"
        command = [sys.executable, board_writer.__file__, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            try:
                assert writer.stdout is not None
                assert writer.stdout.readline() == b"ready\n"
                board = Board(a_welcome(path))
                assert board.trouble is None
                board.note(board_writer.state(0), -1)
                Ranks(lambda _: hammer(board), 2).join()
            finally:
                writer.kill()


def hammer(board: Board) -> None:
    """Look until enough was seen; whatever is seen is one of the two states, and never older."""
    last = seen = 0
    until = time.monotonic() + HAMMER_S
    while seen < LOOKS:
        assert time.monotonic() < until, f"{seen} of {LOOKS} looks"
        found = board.look(SINK)
        if found is None:
            continue
        seen += found.number > last
        assert found.number >= last
        last = found.number
        assert found.snapshot == board_writer.state(last)


def a_welcome(path: Path) -> worker.Welcome:
    """What a daemon with a board at this path would say."""
    pool = worker.PoolInfo(path="/none", blocks=1, block_bytes=1, window_tokens=1, board=str(path))
    return worker.Welcome(
        version=1, boot_id=board_writer.BOOT_ID, session="0" * 32, pool=pool, heartbeat_s=1.0,
        peer_address="",
    )  # fmt: skip
