"""A process that writes two states into one slot, in turn, as fast as the daemon's writer can."""

import sys
from pathlib import Path

from kvferry_daemon.memory.board import Board
from kvferry_proto.states import Role, State
from kvferry_proto.worker import BoardSlot, Snapshot

BOOT_ID = "ab" * 16
STATES = (State.WAITING_FOR_INPUT, State.TRANSFERRING)
VALUES = (0x0101010101, 0x9E9E9E9E9E)  # no byte of one is the other's
BLOCKS = (0x01010101, 0x7E7E7E7E)
SLOT = BoardSlot(index=1, key=77)


def state(number: int) -> Snapshot:
    """One of the two states; only the number tells it from the others like it."""
    value, block = VALUES[number % 2], BLOCKS[number % 2]
    return Snapshot(
        role=Role.SINK, transfer_id="t", attempt=0, snapshot=number, state=STATES[number % 2],
        start_tokens=value, sent_tokens=value, partial_sent_tokens=value, last_resume_at=value,
        total_tokens=value, available_tokens=value, base_tokens=value, allocated_tokens=value,
        target_tokens=value, runs=[(block, block)] * 18, slot=SLOT,
    )  # fmt: skip


def write(path: Path) -> None:
    """Write until killed."""
    board = Board.create(path, 4, BOOT_ID, 3600.0)
    states = [state(0), state(1)]
    board.show(states[0])
    print("ready", flush=True)
    number = 1
    while True:
        board.show(states[number % 2].model_copy(update={"snapshot": number}))
        number += 1


if __name__ == "__main__":
    write(Path(sys.argv[1]))
