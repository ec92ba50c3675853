"""Random lives of several transfers, each from one seed, checked token by token.

Messages are lost, doubled and reordered, streams cut, resumes stale or partial, transfers aborted
and retried. Then the faults stop, and everything must finish and give every block back.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvferry_proto import worker
from kvferry_proto.states import TERMINAL, Mode, Role, State
from world import Chunk, World

SOURCE, SINK, LOCAL = b"source worker", b"sink worker", b"worker beside the sink"
WHOLE_TOKENS = 44


@dataclass
class Fate:
    """What a test knows of one transfer."""

    name: str
    total: int
    late: bool
    local: bool
    whole: bool
    attempt: int = 0
    taken: int = 0
    sent: int = 0
    is_done: bool = False
    opened: set[tuple[Role, int]] = field(default_factory=set)


class Life:
    """A world, some transfers, and dice."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        window = self.dice.choice([4, 8, 16])
        blocks = self.dice.choice([b for b in (4, 6, 8, 16) if b * 2 >= window])
        self.world = World(blocks=blocks, window_tokens=window)
        for machine in self.world.machines.values():
            machine.node.owed_a_turn = 1 + seed % 2 * 7  # in every other life all is in slices
        for where, route in (("a", SOURCE), ("b", SINK), ("b", LOCAL)):
            self.world.hello(where, route)
        self.fates = [self._fate(f"t{n}", blocks) for n in range(self.dice.randint(1, 4))]

    def _fate(self, name: str, blocks: int) -> Fate:
        dice = self.dice
        return Fate(
            name,
            dice.randint(0, 40),
            late=dice.random() < 0.5,
            local=dice.random() < 0.2,
            whole=dice.random() < 0.3 and blocks * 2 >= WHOLE_TOKENS,
        )

    def end(self, fate: Fate, role: Role) -> tuple[str, bytes]:
        """Daemon and worker of one side."""
        if role is Role.SINK:
            return "b", SINK
        return ("b", LOCAL) if fate.local else ("a", SOURCE)

    def call(self, fate: Fate, role: Role, call: Any) -> Any:
        return self.world.call(*self.end(fate, role), call)

    def seen(self, fate: Fate, role: Role) -> worker.Snapshot | None:
        if (role, fate.attempt) not in fate.opened:
            return None
        return self.world.snapshot(*self.end(fate, role), role, fate.name, fate.attempt)

    def names(self, fate: Fate) -> dict[str, Any]:
        return {"transfer_id": fate.name, "attempt": fate.attempt}

    # --- what workers do ---

    def open(self, fate: Fate, role: Role) -> None:
        call: Any
        if role is Role.SOURCE:
            call = worker.Send(**self.names(fate))
        else:
            call = worker.Receive(
                source=None if fate.local else "tcp://a:1",
                mode=Mode.WHOLE if fate.whole else Mode.CONSUME,
                max_tokens=WHOLE_TOKENS if fate.whole else None,
                **self.names(fate),
            )
        assert isinstance(self.call(fate, role, call), worker.Snapshots)
        fate.opened.add((role, fate.attempt))

    def produce(self, fate: Fate) -> None:
        seen = self.seen(fate, Role.SOURCE)
        if seen is None or seen.state in TERMINAL:
            return
        edge = max(seen.available_tokens, seen.base_tokens + seen.allocated_tokens)
        ready = self.dice.randint(
            seen.available_tokens, max(seen.available_tokens, min(fate.total, edge))
        )
        self.world.fill(self.end(fate, Role.SOURCE)[0], seen, ready)
        tell = not fate.late or (ready == fate.total and self.dice.random() < 0.5)
        total = fate.total if tell else None
        call = worker.Ready(ready_tokens=ready, total_tokens=total, **self.names(fate))
        assert isinstance(self.call(fate, Role.SOURCE, call), worker.Snapshots)

    def consume(self, fate: Fate, *, all_of_it: bool) -> None:
        seen = self.seen(fate, Role.SINK)
        if seen is None or seen.state is State.FAILED:
            return
        assert seen.sent_tokens >= fate.sent, "I2: progress fell"
        fate.sent = seen.sent_tokens
        if fate.sent > fate.taken:
            at = fate.sent if all_of_it else self.dice.randint(fate.taken + 1, fate.sent)
            got = [
                self.world.block("b", block)[index]
                for token, (block, index) in self.world.slots("b", seen)
                if fate.taken <= token < at
            ]
            expected = [(fate.name, fate.attempt, token) for token in range(fate.taken, at)]
            assert got == expected, "I3: other tokens than were sent"
            fate.taken = at
            call = worker.Resume(sent_tokens=at, **self.names(fate))
            assert isinstance(self.call(fate, Role.SINK, call), worker.Snapshots)
        if seen.state is State.SUCCESS:
            assert seen.total_tokens == fate.total == seen.sent_tokens
            fate.is_done = fate.taken == fate.total

    def release(self, fate: Fate) -> None:
        for role in Role:
            if (role, fate.attempt) in fate.opened:
                self.call(fate, role, worker.Release(role=role, **self.names(fate)))

    def retry(self, fate: Fate) -> None:
        self.release(fate)
        fate.attempt += 1
        fate.taken = fate.sent = 0

    # --- what chance does ---

    def step(self) -> None:
        dice, fate = self.dice, self.dice.choice(self.fates)
        role = dice.choice(list(Role))
        act = dice.random()
        if act < 0.16:
            self.open(fate, role)
        elif act < 0.35:
            self.produce(fate)
        elif act < 0.5:
            self.consume(fate, all_of_it=dice.random() < 0.5)
        elif act < 0.75:
            self.network()
        elif act < 0.8:
            self.world.settle()
        elif act < 0.9:
            self.world.wait(dice.choice([0.01, 0.3, 1.0]))
            self.world.beat()
        elif act < 0.93 and self.world.sockets:
            self.world.cut(dice.choice(list(self.world.sockets)))
        elif act < 0.96 and self.seen(fate, Role.SINK):
            call = worker.Resume(sent_tokens=dice.randint(0, fate.taken), **self.names(fate))
            assert isinstance(self.call(fate, Role.SINK, call), worker.Snapshots)
        elif act < 0.98 and self.seen(fate, role):
            self.call(fate, role, worker.Abort(role=role, **self.names(fate)))
        elif not fate.is_done:
            self.retry(fate)

    def network(self) -> None:
        """Something arrives, in any order but that of one stream; or is lost, or doubled."""
        wire, dice = self.world.wire, self.dice
        if not wire:
            return
        index = dice.randrange(len(wire))
        thing = wire[index]
        if isinstance(thing, Chunk):
            same = [isinstance(other, Chunk) and other.key == thing.key for other in wire]
            self.world.deliver(same.index(True))
        elif dice.random() < 0.1:
            wire.pop(index)
        else:
            self.world.deliver(index, keep=dice.random() < 0.1)

    def finish(self) -> None:
        """No more faults: what failed is retried once, and all must end."""
        for fate in self.fates:
            sides = [self.seen(fate, role) for role in Role]
            if any(side is not None and side.state is State.FAILED for side in sides):
                self.retry(fate)
            for role in Role:
                self.open(fate, role)
        for _ in range(400):
            for fate in self.fates:
                fate.late = fate.late and self.dice.random() < 0.9
                self.produce(fate)
                self.consume(fate, all_of_it=True)
                if fate.is_done:
                    self.release(fate)
            self.world.wait(0.1)
            self.world.beat()
            if all(fate.is_done for fate in self.fates):
                break
        else:
            raise AssertionError([(f, self.seen(f, r)) for f in self.fates for r in Role])
        self.world.wait(5)
        assert self.world.blocks_free("a"), "I8: blocks of the source daemon are lost"
        assert self.world.blocks_free("b"), "I8: blocks of the sink daemon are lost"


@pytest.mark.parametrize("seed", range(250))
def test_a_random_life_ends_well(seed: int) -> None:
    life = Life(seed)
    for _ in range(life.dice.randint(20, 120)):
        life.step()
    life.finish()
