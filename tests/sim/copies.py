"""Copies within one daemon in the model: threads that take their time, and cannot be interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core import outside as out
from kvferry_proto.peer import PARTS_MAX
from sim.streams import CHUNK_S, Claim

if TYPE_CHECKING:
    from sim.life import Life

SLOW_S = 3.0  # of a few: longer than anybody waits for a drain
SLOW = 0.03


class Copies:
    """Claims and served extents of one life; a thread begins in any order."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._world = life.world
        self._claims: dict[tuple[int, int], Claim] = {}

    def claim(self, effect: out.Expect) -> None:
        """Expect an extent."""
        claim = Claim(effect, self._life.pools[effect.pool_id])
        claim.begin()
        self._claims[effect.handle, effect.first_token] = claim

    def cancel(self, handle: int) -> list[out.ChunkMissed]:
        """Take back what no thread has begun, of every part."""
        taken = [at for at in self._claims if handle <= at[0] < handle + PARTS_MAX]
        missed = []
        for at in taken:
            claim = self._claims.pop(at)
            claim.end()
            missed.append(out.ChunkMissed(claim.effect.key, *at))
        return missed

    def put(self, job: out.Transmit) -> None:
        """Queue an extent; its blocks are read until ChunkSent."""
        self._read(job, 1)
        self._later(self._begin, job)

    def _read(self, job: out.Transmit, threads: int) -> None:
        memory = self._life.pools[job.pool_id]
        for piece in memory.pieces(job.place, job.first_token, job.tokens):
            memory.readers[piece.block] += threads

    def _later(self, do: object, *args: object) -> None:
        roll = self._world.dice.random
        wait_s = SLOW_S * roll() if roll() < SLOW else CHUNK_S * roll()
        self._world.clock.after(wait_s, self._run, do, *args)

    def _run(self, do: object, *args: object) -> None:
        """A thread goes on, if its process is there and does not stand still."""
        if self._life.dead:
            return
        if self._life.machine.paused_until_s > self._world.clock.now_s:
            self._world.clock.at(self._life.machine.paused_until_s, self._run, do, *args)
            return
        assert callable(do)
        do(*args)

    def _begin(self, job: out.Transmit) -> None:
        claim = self._claims.pop((job.handle, job.first_token), None)
        if claim is None:
            self._finish(job, None)
            return
        self._move(job, claim, job.tokens // 2)
        self._later(self._finish, job, claim)

    def _move(self, job: out.Transmit, claim: Claim, tokens: int) -> None:
        """The first so many tokens, as they lie there now."""
        names = self._life.pools[job.pool_id].read(job.place, job.first_token, tokens)
        claim.memory.write(claim.effect.place, job.first_token, names)

    def _finish(self, job: out.Transmit, claim: Claim | None) -> None:
        if claim is not None:
            self._move(job, claim, job.tokens)
            claim.end()
        self._read(job, -1)
        sent = out.ChunkSent(job.key, job.owner, job.part, job.first_token, job.tokens)
        self._life.deliver(sent)
        if claim is not None and not self._life.dead:
            self._life.watcher.received.add((job.handle, job.first_token))
            self._life.deliver(out.ChunkReceived(job.key, job.handle, job.first_token, job.tokens))
