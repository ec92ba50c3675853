"""Who has which slot of a pool's status board, and what is to be written there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core import outside as out
from kvferry_proto.board import slot_key
from kvferry_proto.worker import BoardSlot

if TYPE_CHECKING:
    from kvferry_daemon.core.node import AnyTransfer

SLOTS = 4096  # of one board, 256 bytes each; who finds none free polls by message


def board_path(pool_path: str) -> str:
    """Where the board of a pool lies: beside it."""
    return f"{pool_path}.board"


class Boards:
    """Slots are given to those who ask, and kept until their transfer is forgotten."""

    def __init__(self) -> None:
        self._free: dict[str, list[int]] = {}  # by pool
        self._stale: dict[tuple[AnyTransfer, int], None] = {}  # and rank: shown as it was
        self._cleared: list[out.NodeEffect] = []

    def give(self, transfer: AnyTransfer, rank: int) -> None:
        """Put a rank on the board from now on, if there is room."""
        if rank in transfer.slots:
            return
        pool_id = transfer.opening.pool_id
        free = self._free.get(pool_id)
        if free is None:
            free = self._free[pool_id] = list(reversed(range(SLOTS)))
        if free:
            key = transfer.key
            name = slot_key(key.role, key.transfer_id, key.attempt, rank)
            transfer.take_slot(rank, BoardSlot(index=free.pop(), key=name))
            self._stale[transfer, rank] = None

    def changed(self, transfer: AnyTransfer) -> None:
        """Its ranks that are on the board are to be shown anew."""
        for rank in transfer.slots:
            self._stale[transfer, rank] = None

    def forget(self, transfer: AnyTransfer) -> None:
        """It is over: its slots may be others', and nobody is to read them for its own."""
        pool_id = transfer.opening.pool_id
        for rank, slot in transfer.drop_slots().items():
            self._stale.pop((transfer, rank), None)
            self._cleared.append(out.ClearSlot(pool_id, slot.index))
            self._free[pool_id].append(slot.index)

    def drop(self, pool_id: str) -> None:
        """The pool is gone, and its board."""
        self._free.pop(pool_id, None)

    def take(self) -> list[out.NodeEffect]:
        """What this event has changed on the boards: a slot is cleared before another has it."""
        if not self._stale and not self._cleared:
            return []
        effects, self._cleared = self._cleared, []
        stale, self._stale = self._stale, {}
        for transfer, rank in stale:
            effects.append(out.ShowSlot(transfer.opening.pool_id, transfer.snapshot(rank)))
        return effects
