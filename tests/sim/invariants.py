"""The invariants of the design, checked after every event of a node, where something has changed.

I1, I7 and I8 are checked by the pool at every grant and freeing (memory.py), I3 by the consumers
themselves (workers.py), I4 partly by the connections (streams.py), I10 by jobs.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Key
from kvferry_daemon.core.node import AnyTransfer
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.source import SourceTransfer
from kvferry_proto import worker
from kvferry_proto.errors import Code
from kvferry_proto.states import TERMINAL, Role, State
from sim.memory import EMPTY, Broken, owner_part

if TYPE_CHECKING:
    from sim.life import Life

FULL_CHECK_EVERY = 64  # events; the pool's own check walks every block
LATE_S = 0.1  # a deadline may be noticed so much later


@dataclass(slots=True)
class Mark:
    """A transfer as it was seen last."""

    version: int = -1
    sent: int = 0
    available: int = 0
    base: int = 0
    total: int | None = None
    state: State = State.BOOTSTRAPPING
    code: str | None = None


class Watcher:
    """Looks at one life of a daemon."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._world = life.world
        self._node = life.node
        self._timing = life.node.settings.timing
        self._marks: dict[Key, Mark] = {}
        self._clean: dict[tuple[str, int], int] = {}
        self._claimed_success: list[Key] = []
        self._acked: list[tuple[Key, int]] = []
        self._events = 0
        self.received: set[tuple[int, int]] = set()  # (handle, first token)

    def take_up(self) -> None:
        """What an earlier life had come to is where this one begins."""
        for key, transfer in self._node.transfers.items():
            self._marks[key] = Mark(
                sent=transfer.sent_tokens,
                available=transfer.available_tokens,
                base=transfer.window.base_tokens,
                total=transfer.total_tokens,
                state=transfer.state,
                code=transfer.error.code if transfer.error else None,
            )

    def check(self) -> None:
        """After one event."""
        marks = self._marks
        for key, transfer in self._node.transfers.items():
            mark = marks.get(key)
            if mark is None:
                start = transfer.opening.start_tokens
                mark = marks[key] = Mark(sent=start, available=start, base=start)
                if isinstance(transfer, SinkTransfer):
                    mark.available = 0
            if mark.version != transfer.version or transfer.ranks.size > 1:
                self._check_transfer(key, transfer, mark)
        while self._acked:  # now: in one daemon both sides move in one event
            key, sent = self._acked.pop()
            if sent > self._world.committed.get(key[1:], 0):
                raise Broken(f"I2: {key} has {sent} acknowledged, its sink committed less")
        while self._claimed_success:
            key = self._claimed_success.pop()
            stone = self._node.tombstones.get(key._replace(role=Role.SINK))
            if stone is not None and stone.snapshot.state is State.SUCCESS:
                continue  # it held nothing, and was forgotten in the same event
            if (key.transfer_id, key.attempt) not in self._world.succeeded:
                raise Broken(f"I9: {key} succeeded, but its sink did not")
        self._events += 1
        if self._events % FULL_CHECK_EVERY == 0:
            self.check_fully()

    def check_fully(self) -> None:
        """What costs more."""
        self._node.check()
        now_s = self._node.now_s
        for key, transfer in self._node.transfers.items():
            waited_s = now_s - transfer.progress_s
            if not transfer.ended and waited_s > self._timing.stall_s + LATE_S:
                raise Broken(f"I9: {key} is live {waited_s:.1f} s after its last progress")
            if isinstance(transfer, SinkTransfer):
                shape = transfer.shape
                wires = transfer.window.allocated_tokens // shape.wire_block_tokens
                if len(transfer._claims) > wires * len(shape.ranks):
                    raise Broken(f"I13: {key} has {len(transfer._claims)} claims")

    # --- transfers ---

    def _check_transfer(self, key: Key, transfer: AnyTransfer, mark: Mark) -> None:
        self._check_state(key, transfer, mark)
        if transfer.sent_tokens < mark.sent:
            raise Broken(f"I2: sent of {key} fell from {mark.sent} to {transfer.sent_tokens}")
        total = transfer.total_tokens
        if mark.total is not None and total != mark.total:
            raise Broken(f"I5: total of {key} was {mark.total}, now {total}")
        if total is not None and total != self._world.job(key).total:
            raise Broken(f"I5: total of {key} is {total}")
        if total is not None and transfer.sent_tokens > total:
            raise Broken(f"I5: {key} sent {transfer.sent_tokens} of {total}")
        size = transfer.opening.block_size_tokens
        if transfer.window.base_tokens % size or transfer.window.base_tokens < mark.base:
            raise Broken(f"I11: base of {key} is {transfer.window.base_tokens}, was {mark.base}")
        if isinstance(transfer, SinkTransfer):
            self._check_sink(key, transfer, mark)
        else:
            self._check_source(key, transfer, mark)
        mark.version = transfer.version
        mark.sent = transfer.sent_tokens
        mark.available = transfer.available_tokens
        mark.base = transfer.window.base_tokens
        mark.total = total
        mark.state = transfer.state
        mark.code = transfer.error.code if transfer.error else None

    def _check_state(self, key: Key, transfer: AnyTransfer, mark: Mark) -> None:
        if transfer.state is mark.state:
            return
        corrected = mark.code == Code.LEASE_EXPIRED and key.role is Role.SOURCE
        if mark.state in TERMINAL and not (corrected and transfer.state is State.SUCCESS):
            raise Broken(f"I9: {key} was {mark.state.name}, now {transfer.state.name}")
        if transfer.state is State.SUCCESS:
            sunk = (key.transfer_id, key.attempt)
            if key.role is Role.SINK:
                self._world.succeeded.add(sunk)
                if transfer.sent_tokens != transfer.total_tokens:
                    raise Broken(f"I9: {key} succeeded at {transfer.sent_tokens}")
            else:
                self._claimed_success.append(key)
        elif transfer.state is State.FAILED and transfer.error is not None:
            self._world.failed(key, transfer.error.code, transfer.error.message)

    def _check_sink(self, key: Key, transfer: SinkTransfer, mark: Mark) -> None:
        first, sent = mark.sent, transfer.sent_tokens
        if sent > first:
            memory = self._life.pools[transfer.opening.pool_id]
            for rank in range(transfer.ranks.size):
                place = transfer.window.cover(first, sent - first, rank)
                name = self._world.job(key).name(key.attempt, rank)
                got = memory.read(place, first, sent - first)
                if got != list(range(name + first, name + sent)):
                    raise Broken(f"I2: {key} committed [{first}, {sent}), but there lie {got}")
            committed = self._world.committed
            committed[key[1:]] = max(sent, committed.get(key[1:], 0))
        if transfer.opening.max_tokens is None:
            self._check_edge(key, transfer)

    def _check_edge(self, key: Key, transfer: SinkTransfer) -> None:
        """I6: the target edge follows from the last accepted resume and the total alone."""
        opening, window = transfer.opening, transfer.window
        size = opening.block_size_tokens
        start = max(transfer.last_resume_at, opening.start_tokens)
        if not transfer.ended and window.base_tokens != start // size * size:
            raise Broken(f"I6: base of {key} is {window.base_tokens}, resumed at {start}")
        target = start // size * size + opening.window_tokens
        if transfer.total_tokens is not None:
            target = min(target, transfer.total_tokens)
        if transfer.target_tokens != target:
            raise Broken(f"I6: target of {key} is {transfer.target_tokens}, not {target}")
        if window.edge_tokens > -(-target // size) * size and window.blocks:
            raise Broken(f"I6: {key} holds up to {window.edge_tokens}, its target is {target}")
        if transfer.partial_sent_tokens > transfer.sent_tokens:
            raise Broken(f"I2: {key} resumed at {transfer.partial_sent_tokens}, ahead of sent")

    def _check_source(self, key: Key, transfer: SourceTransfer, mark: Mark) -> None:
        if transfer.available_tokens < mark.available:
            raise Broken(f"I2: available of {key} fell to {transfer.available_tokens}")
        sent, start = transfer.sent_tokens, transfer.opening.start_tokens
        size, plan = transfer.opening.block_size_tokens, self._world.job(key).plan
        start = max(start, plan.start_sink)
        handed = plan.source == plan.sink and plan.is_alike
        if sent > start and not handed:
            self._acked.append((key, sent))
        if transfer.window.base_tokens > -(-max(sent, start) // size) * size:
            raise Broken(f"I7: {key} gave blocks up to {transfer.window.base_tokens} away")

    # --- what goes out ---

    def check_shown(self, reply: out.WorkerReply) -> None:
        """A worker is shown its own blocks, and nothing of another transfer in them."""
        if not isinstance(reply, worker.Snapshots):
            return
        for seen in reply.transfers:
            if seen.runs:
                self._check_blocks_shown(seen)

    def _check_blocks_shown(self, seen: worker.Snapshot) -> None:
        key = Key(seen.role, seen.transfer_id, seen.attempt)
        pool_id = self._node.transfers[key].opening.pool_id
        memory = self._life.pools[pool_id]
        own = owner_part(self._world.job(key).name(key.attempt))
        for first, blocks in seen.runs:
            for block in range(first, first + blocks):
                owner = memory.owner[block]
                if self._clean.get((pool_id, block)) == owner:
                    continue
                if owner == EMPTY or self._life.key_of(memory, owner) != key:
                    raise Broken(f"I7: {key} is shown block {block}, which is not its own")
                left = memory.block(block)
                if any(name != EMPTY and owner_part(name) != own for name in left):
                    raise Broken(f"I3: {key} is shown block {block} with {left} of another")
                self._clean[pool_id, block] = owner

    def check_claim(self, effect: out.Expect) -> None:
        """I4: bytes may come only into uncommitted extents of a live transfer's own blocks."""
        key, _ = self._node.sinks.named(effect.handle)
        transfer = self._node.transfers[key]
        memory = self._life.pools[effect.pool_id]
        if (effect.handle, effect.first_token) in self.received or transfer.ended:
            raise Broken(f"I4: {effect} is claimed, but {key} has it or is over")
        for piece in memory.pieces(effect.place, effect.first_token, effect.tokens):
            owner = memory.owner[piece.block]
            if owner == EMPTY or self._life.key_of(memory, owner) != key:
                raise Broken(f"I4: {effect} is claimed in block {piece.block}, of {owner}")

    def check_served(self, effect: out.Transmit) -> None:
        """I7: only what the source's worker has put there is sent, out of the source's blocks."""
        key = effect.owner
        memory = self._life.pools[effect.pool_id]
        for piece in memory.pieces(effect.place, effect.first_token, effect.tokens):
            owner = memory.owner[piece.block]
            if owner == EMPTY or self._life.key_of(memory, owner) != key:
                raise Broken(f"I7: {effect} is served out of block {piece.block}, of {owner}")
        name = self._world.job(key).name(key.attempt, effect.part) + effect.first_token
        got = memory.read(effect.place, effect.first_token, effect.tokens)
        if got != list(range(name, name + effect.tokens)):
            raise Broken(f"I7: {key} serves {got} for the tokens from {effect.first_token} on")

    # --- the end ---

    def check_all_free(self) -> None:
        """I8, I13: when every transfer has ended, nothing is left of them but tombstones."""
        node = self._node
        node.check()
        for book in node.books.values():
            if book.pool.free_blocks != book.pool.blocks:
                raise Broken(f"I8: {book.pool.free_blocks} of {book.pool.blocks} blocks are free")
            waiting = [queue for queue in book._queues.values() if queue]
            kept = (waiting, book._reserved, book._waiting_for_room, book._on_the_way)
            if any(kept) or book._owners:
                raise Broken(f"I13: the books still have {kept}, owners {book._owners}")
        left = (
            node.transfers,
            node.sinks._handles,
            node.sinks._keys,
            node._effects_of._zeroing,
            node.chronicle._windows,
            node.chronicle._batches,
            node.chronicle._chunks,
            node.chronicle._without_trace,
        )
        if any(left):
            raise Broken(f"I13: the daemon still has {left}")
