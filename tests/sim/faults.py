"""What goes wrong in a world, and when: small values that a story is made of, and can do without.

``excuse`` in a fault's ``begin`` names the jobs whose attempts may fail from it. All others must
succeed at their first attempt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvferry_proto.states import Role

if TYPE_CHECKING:
    from sim.jobs import Job
    from sim.world import World

SILENCE_S = 1.2  # what a worker's heartbeat survives, all in all


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that begins at ``at_s``."""

    at_s: float

    def begin(self, world: World) -> None:
        """Let it happen."""
        raise NotImplementedError


def excuse(jobs: Iterable[Job], why: str) -> None:
    """These may fail from now on."""
    for job in jobs:
        job.excuse = job.excuse or why


@dataclass(frozen=True, slots=True)
class Weather(Fault):
    """Messages between daemons are lost, doubled, slow and out of order for a while."""

    for_s: float
    loss: float
    doubled: float
    slow_s: float

    def begin(self, world: World) -> None:
        network = world.network
        network.loss, network.doubled, network.slow_s = self.loss, self.doubled, self.slow_s
        world.clock.after(self.for_s, self._end, world)

    def _end(self, world: World) -> None:
        network = world.network
        network.loss = network.doubled = network.slow_s = 0.0


@dataclass(frozen=True, slots=True)
class IpcWeather(Fault):
    """Calls of workers and replies to them are lost and doubled for a while."""

    for_s: float
    loss: float
    doubled: float

    def begin(self, world: World) -> None:
        world.network.ipc_loss, world.network.ipc_doubled = self.loss, self.doubled
        world.clock.after(self.for_s, self._end, world)
        if self.loss:
            for machine in world.machines:
                world.silence(machine, self.for_s)

    def _end(self, world: World) -> None:
        world.network.ipc_loss = world.network.ipc_doubled = 0.0


@dataclass(frozen=True, slots=True)
class Partition(Fault):
    """Messages from one machine to another are lost for a while; not those that come back."""

    for_s: float
    sender: str
    receiver: str

    def begin(self, world: World) -> None:
        world.network.partition(self.sender, self.receiver, 1)
        world.clock.after(self.for_s, world.network.partition, self.sender, self.receiver, -1)


@dataclass(frozen=True, slots=True)
class Cut(Fault):
    """A data connection ends."""

    which: int

    def begin(self, world: World) -> None:
        if world.connections:
            world.connections[self.which % len(world.connections)].close()


@dataclass(frozen=True, slots=True)
class Damage(Fault):
    """The bytes of a few chunks are damaged on their way."""

    chunks: int

    def begin(self, world: World) -> None:
        world.network.corrupt_chunks += self.chunks


@dataclass(frozen=True, slots=True)
class Freeze(Fault):
    """Data connections stand still for a while, chunks half received."""

    for_s: float

    def begin(self, world: World) -> None:
        network = world.network
        network.frozen_until_s = max(network.frozen_until_s, world.clock.now_s + self.for_s)


@dataclass(frozen=True, slots=True)
class KillWorker(Fault):
    """A worker's process is gone at once, and started again later."""

    process: str
    for_s: float

    def begin(self, world: World) -> None:
        excuse(world.jobs_of(process=self.process), "worker killed")
        process = world.processes[self.process]
        if process.alive:
            process.crash()
            world.clock.after(self.for_s, world.start_process, self.process)


@dataclass(frozen=True, slots=True)
class StopWorker(Fault):
    """A worker's process stands still for a while, its memory mapped."""

    process: str
    for_s: float

    def begin(self, world: World) -> None:
        if self.for_s > SILENCE_S:
            excuse(world.jobs_of(process=self.process), "worker stopped")
        else:
            world.silence(world.processes[self.process].machine.name, self.for_s)
        world.processes[self.process].stop(self.for_s)


@dataclass(frozen=True, slots=True)
class Reconnect(Fault):
    """A worker's connection to its daemon is made anew."""

    process: str

    def begin(self, world: World) -> None:
        process = world.processes[self.process]
        if process.alive:
            process.reconnect()


@dataclass(frozen=True, slots=True)
class Cancel(Fault):
    """The user goes away."""

    job: int
    first: Role

    def begin(self, world: World) -> None:
        job = world.jobs[self.job % len(world.jobs)]
        job.cancel(self.first)
        for machine in (job.plan.source, job.plan.sink):
            excuse(world.jobs_of(machine=machine), "a cancelled one holds room")


@dataclass(frozen=True, slots=True)
class Retry(Fault):
    """The router starts another attempt for reasons of its own."""

    job: int

    def begin(self, world: World) -> None:
        job = world.jobs[self.job % len(world.jobs)]
        excuse([job], "retried")
        job.retry(job.attempt)


@dataclass(frozen=True, slots=True)
class Jump(Fault):
    """A machine's clock jumps forward."""

    machine: str
    by_s: float

    def begin(self, world: World) -> None:
        world.silence(self.machine, self.by_s)
        world.machines[self.machine].skip_time(self.by_s)


@dataclass(frozen=True, slots=True)
class PauseDaemon(Fault):
    """A daemon stands still for a while, its threads too."""

    machine: str
    for_s: float

    def begin(self, world: World) -> None:
        world.silence(self.machine, self.for_s)
        machine = world.machines[self.machine]
        until_s = world.clock.now_s + self.for_s
        machine.paused_until_s = max(machine.paused_until_s, until_s)


@dataclass(frozen=True, slots=True)
class KillDaemon(Fault):
    """A daemon is gone at once, and started again later, with its ledger and pools or without.

    With them it goes on, and no attempt may fail from it.
    """

    machine: str
    for_s: float
    keeps: bool

    def begin(self, world: World) -> None:
        machine = world.machines[self.machine]
        if not self.keeps:
            excuse(world.jobs_of(machine=self.machine), "daemon killed")
        if machine.life is not None:
            machine.crash()
            machine.paused_until_s = 0.0
            machine.keeps = self.keeps
            world.clock.after(self.for_s, world.start_daemon, self.machine, self.keeps)


@dataclass(frozen=True, slots=True)
class LoseSink(Fault):
    """A sink's daemon is gone with all that it knew, and nobody ever tells the source of one job.

    The daemon in its place speaks to the same source again, for others.
    """

    job: int
    for_s: float

    def begin(self, world: World) -> None:
        job = world.jobs[self.job % len(world.jobs)]
        is_up = world.machines[job.plan.sink].life is not None  # else it comes back as it was
        if is_up and job.plan.source != job.plan.sink:
            excuse(world.jobs_of(machine=job.plan.sink), "sink lost")
            excuse(world.jobs_of(machine=job.plan.source), "a lost one holds room")
            job.lose()
            KillDaemon(self.at_s, job.plan.sink, self.for_s, keeps=False).begin(world)


@dataclass(frozen=True, slots=True)
class KillAtWrite(Fault):
    """A daemon is gone at one of its next writes: kept or not, and nobody has seen what it led to."""

    machine: str
    writes: int
    for_s: float

    def begin(self, world: World) -> None:
        world.machines[self.machine].die_at_write(self.writes, self.for_s)


@dataclass(frozen=True, slots=True)
class NoPool(Fault):
    """The next pools of a machine cannot be made."""

    machine: str
    times: int

    def begin(self, world: World) -> None:
        world.machines[self.machine].pools_refused = self.times


@dataclass(frozen=True, slots=True)
class SlowZero(Fault):
    """Wiping blocks takes long from now on."""

    machine: str
    takes_s: float

    def begin(self, world: World) -> None:
        world.machines[self.machine].zero_s = self.takes_s
