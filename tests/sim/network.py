"""Message links between machines, and between workers and their machine."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from kvferry_daemon.core import outside as out
from sim.clock import Clock

if TYPE_CHECKING:
    from sim.machine import Machine

PEER_S = 0.002  # a message between daemons takes about so long
IPC_S = 0.0003  # and one between a worker and its daemon


class Network:
    """Loses, doubles, delays and reorders what daemons say; workers' calls stay in order.

    ZeroMQ keeps the order of one connection, and a client's calls go over one: a `release` that
    overtook the `send` before it would be a mistake of the model.
    """

    def __init__(self, clock: Clock, dice: Random) -> None:
        self._clock = clock
        self._dice = dice
        self.loss = self.doubled = self.slow_s = 0.0
        self.ipc_loss = self.ipc_doubled = 0.0
        self.blocked: dict[tuple[str, str], int] = {}  # one-way partitions, how many of them
        self.frozen_until_s = 0.0  # data connections stand still
        self.corrupt_chunks = 0  # so many of the next ones are damaged

    def calm(self) -> None:
        """No faults any more."""
        self.loss = self.doubled = self.slow_s = self.ipc_loss = self.ipc_doubled = 0.0
        self.blocked.clear()
        self.frozen_until_s = 0.0
        self.corrupt_chunks = 0

    def partition(self, one: str, other: str, by: int) -> None:
        """Block the way from one machine to another, or (-1) take one such fault back."""
        left = self.blocked.get((one, other), 0) + by
        if left > 0:
            self.blocked[one, other] = left
        else:
            self.blocked.pop((one, other), None)

    def post(self, sender: str, to: Machine, life: int | None, event: out.NodeEvent) -> None:
        """A message between daemons; ``life``: only that life of the receiver gets it."""
        roll = self._dice.random
        if (sender, to.name) in self.blocked or (self.loss and roll() < self.loss):
            return
        copies = 2 if self.doubled and roll() < self.doubled else 1
        for _ in range(copies):
            wait_s = PEER_S * (0.3 + roll())
            if self.slow_s:
                wait_s += self.slow_s * roll()
            self._clock.after(wait_s, to.hear, life, event)

    def ipc(self, last_s: float, do: Callable[..., Any], *args: Any) -> float:
        """A call or reply; not before ``last_s``, when the one before it comes. Returns when."""
        roll = self._dice.random
        if self.ipc_loss and roll() < self.ipc_loss:
            return last_s
        at_s = max(last_s, self._clock.now_s + IPC_S * (0.3 + roll()))
        self._clock.at(at_s, do, *args)
        if self.ipc_doubled and roll() < self.ipc_doubled:
            self._clock.at(at_s, do, *args)
        return at_s
