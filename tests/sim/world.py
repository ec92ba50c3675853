"""A whole world from one plan: machines, workers, requests, faults; and how it must end."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from kvferry_daemon.core.events import Key, Timing
from kvferry_daemon.core.settings import Settings
from sim import tell
from sim.clock import Clock
from sim.faults import SILENCE_S, Fault, excuse
from sim.jobs import Job, JobPlan
from sim.machine import Machine
from sim.memory import BLOCK, WIDE, Broken
from sim.network import Network
from sim.quiet import Quiet
from sim.streams import Connection
from sim.workers import LAYOUTS, Lock, Process

TIMING = Timing(
    resend_s=0.2, resend_max_s=2.0, stall_s=25.0, connect_s=12.0, lease_s=14.0, hold_s=10.0,
    drain_s=1.0, heartbeat_s=1.0, lost_s=3.0, tombstone_s=60.0,
)  # fmt: skip
CALM_S = 150.0  # from the last fault on, everything must have ended by then
TIDY_S = 30.0  # and then, every block be free


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before a world begins to move."""

    seed: int
    machines: tuple[str, ...]
    blocks: int
    window_tokens: int
    source_share: float
    streams: int
    chunk_blocks: int
    ledger_s: float  # a commit takes so long at most
    aux: bool
    calm_at_s: float
    jobs: tuple[JobPlan, ...]
    faults: tuple[Fault, ...]
    boards: bool = False  # workers look at status boards
    on_the_loop: bool = False  # some writes are committed at once, if no other is under way


class World:
    """One run of a plan. ``salt`` gives other dice to the same plan."""

    def __init__(self, plan: Plan, *, salt: int = 0, tell: bool = False) -> None:
        self.plan = plan
        self.timing = TIMING
        self.dice = Random(plan.seed * 1_000_003 + salt)
        self.story: list[str] | None = [] if tell else None
        self.clock = Clock()
        self.network = Network(self.clock, self.dice)
        names = ("first",) if plan.aux else ()
        self.layouts = {size: LAYOUTS[names, size] for size in (BLOCK, WIDE)}
        self.node_events = 0
        self.connections: list[Connection] = []
        self.routes: dict[bytes, Process] = {}
        self.locks: dict[str, Lock] = {}
        self.committed: dict[tuple[Any, ...], int] = {}  # (id, attempt) -> tokens at any sink
        self.succeeded: set[tuple[str, int]] = set()  # (id, attempt), at a sink
        self.is_calm = False
        self._silence_s: dict[str, float] = {}
        self._secrets = self._processes_started = 0
        self.machines = {
            name: Machine(self, name, self._settings(name), 1000.0 * number)
            for number, name in enumerate(plan.machines)
        }
        self.processes: dict[str, Process] = {}
        self.jobs = [Job(self, number, job) for number, job in enumerate(plan.jobs)]
        self._jobs = {job.plan.name: job for job in self.jobs}
        self.unfinished = len(self.jobs)
        for fault in plan.faults:
            self.clock.at(fault.at_s, self._begin, fault)
        for job in self.jobs:
            for member in job.members:
                if job.process_name(*member) not in self.processes:
                    self._new_process(job.process_name(*member))

    def _settings(self, name: str) -> Settings:
        plan = self.plan
        return Settings(
            boot_id=name,
            daemon_id=name,
            life=1,
            pools_dir="/pools",
            peer_address=f"tcp://{name}:1",
            timing=TIMING,
            window_tokens=plan.window_tokens,
            budget_bytes=1 << 40,
            pool_tokens=plan.blocks * BLOCK,
            source_share=plan.source_share,
            streams=plan.streams,
            chunk_bytes=plan.chunk_blocks * self.layouts[BLOCK].block_bytes,
            transfers_max=100,
            workers_max=20,
        )

    def new_secret(self) -> bytes:
        """Secrets are numbers here."""
        self._secrets += 1
        return self._secrets.to_bytes(32, "big")

    # --- who is where ---

    def job(self, key: Key) -> Job:
        """The request that a transfer belongs to."""
        return self._jobs[key.transfer_id]

    def machine_at(self, address: str) -> Machine:
        """The machine with this peer address."""
        return self.machines[address.removeprefix("tcp://").partition(":")[0]]

    def jobs_of(self, *, process: str | None = None, machine: str | None = None) -> list[Job]:
        """The requests that a process or a machine has a part in."""
        return [
            job
            for job in self.jobs
            if process in {job.process_name(*member) for member in job.members}
            or machine in (job.plan.source, job.plan.sink)
        ]

    def processes_of(self, machine: str) -> list[Process]:
        """The living workers beside a daemon."""
        return [p for p in self.processes.values() if p.alive and p.machine.name == machine]

    def silence(self, machine: str, for_s: float) -> None:
        """A machine's daemon and its workers do not hear each other for so long."""
        self._silence_s[machine] = self._silence_s.get(machine, 0.0) + for_s
        if self._silence_s[machine] > SILENCE_S:
            excuse(self.jobs_of(machine=machine), "silence")

    # --- starts ---

    def _new_process(self, name: str) -> None:
        self._processes_started += 1
        machine = self.machines[name[0]]
        self.processes[name] = Process(self, machine, name, self._processes_started)

    def start_process(self, name: str) -> None:
        """A worker is started again; the router tells it of the attempts that are current."""
        if self.processes[name].alive:
            return
        self._new_process(name)
        for job in self.jobs:
            for role, rank in job.members:
                if job.process_name(role, rank) == name and self.clock.now_s >= job.begins_s(role):
                    job.switch(role, rank, job.attempt)

    def start_daemon(self, name: str, keeps: bool) -> None:
        """A daemon is started again."""
        self.machines[name].restart(with_ledger=keeps)

    def _begin(self, fault: Fault) -> None:
        if self.is_calm:
            return
        self.say("world", "FAULT", fault)
        fault.begin(self)

    # --- the run ---

    def run(self) -> None:
        """Faults, then calm; raises Broken, or whatever the core raises."""

        def finished() -> bool:
            return self.unfinished == 0

        self.clock.run(self.plan.calm_at_s, finished)
        self._calm()
        if not self.clock.run(self.clock.now_s + CALM_S, finished):
            late = [
                f"{job.plan.name} attempt {job.attempt}" for job in self.jobs if not job.finished
            ]
            raise Broken(f"I9: {late} did not end: {self._where()}")
        if not self.clock.run(self.clock.now_s + TIDY_S, self._is_tidy):
            for machine in self.machines.values():
                assert machine.life is not None
                machine.life.watcher.check_all_free()
        self._check_jobs()

    def _calm(self) -> None:
        """No fault from now on: who is down is started, who stands still goes on."""
        self.say("world", "CALM", "")
        self.is_calm = True
        self.network.calm()
        for machine in self.machines.values():
            machine.paused_until_s = 0.0
            machine.zero_s = 0.002
            machine.pools_refused = 0
            machine.restart(with_ledger=machine.keeps)
        for name, process in list(self.processes.items()):
            process.stopped_until_s = 0.0
            self.start_process(name)
        Quiet(self)

    def _is_tidy(self) -> bool:
        for machine in self.machines.values():
            assert machine.life is not None
            if machine.life.node.transfers:
                return False
        try:
            for machine in self.machines.values():
                assert machine.life is not None
                machine.life.watcher.check_all_free()
        except Broken:
            return False
        return True

    def _check_jobs(self) -> None:
        for job in self.jobs:
            if job.excuse is None and (job.attempt or not job.done):
                raise Broken(f"{job.plan.name} needed {job.attempt + 1} attempts: {job.story}")

    def failed(self, key: Key, code: str, message: str) -> None:
        """A daemon has ended a transfer as failed; the workers will say so too."""
        self.say(key, "ENDS", f"{code}: {message}")

    def _where(self) -> list[object]:
        return [
            transfer.snapshot()
            for machine in self.machines.values()
            if machine.life is not None
            for transfer in machine.life.node.transfers.values()
        ]

    def say(self, who: object, what: str, about: object) -> None:
        """A line of the story, if somebody wants to hear it."""
        if self.story is not None:
            line = tell.line(self.clock.now_s, who, what, about)
            if line is not None:
                self.story.append(line)
