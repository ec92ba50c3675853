"""Status boards in the model: the real writer and the real reader, over memory of no file."""

from __future__ import annotations

import mmap
from pathlib import Path
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from kvferry_client.board import Board as Reader
from kvferry_client.board import BoardTrouble, Poll
from kvferry_daemon.memory.board import Board
from kvferry_proto import worker
from kvferry_proto.board import BEAT_WORD, SLOT_BYTES, board_bytes, unpack_slot, word_of
from sim.memory import Broken

if TYPE_CHECKING:
    from kvferry_daemon.core.node import Node
    from sim.sides import Side

SLOTS = 128
LOOK_S = 0.05  # between two looks of a worker that has nothing else to do
FOR_EVER_NS = 1 << 62


class ModelBoard(Board):
    """What a daemon writes."""

    def __init__(self) -> None:
        super().__init__(Path("/board"), mmap.mmap(-1, board_bytes(SLOTS)), SLOTS)
        self.beat()

    def shown(self, index: int) -> tuple[int, int]:
        """The key and the snapshot number that stand in a slot."""
        first = word_of(index) * 8
        slot = unpack_slot(self._mapping[first : first + SLOT_BYTES])
        assert slot is not None
        return slot.key, slot.snapshot

    def give_up(self) -> None:
        """Its daemon has been dead for long enough that everybody sees it."""
        self._words[BEAT_WORD] = 0

    def check(self, node: Node, pool_id: str) -> None:
        """While nothing waits for the ledger, a slot shows what its transfer has come to."""
        for transfer in node.transfers.values():
            for rank, slot in transfer.slots.items():
                number = transfer.snapshot(rank).snapshot
                if transfer.opening.pool_id == pool_id and self.shown(slot.index) != (
                    slot.key, number,
                ):  # fmt: skip
                    said = self.shown(slot.index)
                    raise Broken(f"{transfer.key} rank {rank} is at {number}, its slot at {said}")


class ModelReader(Reader):
    """What a worker sees of it."""

    def __init__(self, welcome: worker.Welcome, board: ModelBoard) -> None:
        self._board = board
        super().__init__(welcome)

    def _map(self) -> BoardTrouble | None:
        self._mapping = self._board._mapping
        self._words = self._board._words
        self._slots, self._stale_ns = SLOTS, FOR_EVER_NS
        assert monotonic_ns() < FOR_EVER_NS
        return None

    def _say(self, trouble: BoardTrouble | None) -> None:
        self.trouble = trouble


def poll(side: Side, watched: worker.Watched, wait_s: float) -> None:
    """Poll as the client does: on the board, and by message where that cannot tell."""
    process = side.process
    asked = Poll(process.board, [watched], wait_s)

    def answered(reply: Any) -> None:
        if isinstance(reply, worker.Snapshots):
            reply = asked.answer(process.board, reply)
        side.heard(reply, 0.0 if wait_s else LOOK_S)

    if asked.call is None:
        side.heard(asked.answer(process.board, None), LOOK_S)
    else:
        process.ask(
            worker.Poll, answered, side=side, transfers=asked.call.transfers, wait_s=wait_s,
            board=asked.call.board,
        )  # fmt: skip
