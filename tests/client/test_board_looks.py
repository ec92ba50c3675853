"""Looks at a board beside answers by message, and beside whoever writes it."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import board_writer
from client.ranks import Ranks
from kvferry_client import Role
from kvferry_client import board as boards
from kvferry_client.board import Board
from kvferry_daemon.memory.board import Board as WrittenBoard
from kvferry_proto import worker
from kvferry_proto.board import HEADER_BYTES, SLOT_BYTES

LOOKS = 30_000
HAMMER_S = 100.0  # two readers and a writer may have to share a slow core
SINK = worker.Watched(role=Role.SINK, transfer_id="t")


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
