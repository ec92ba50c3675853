"""Random traffic with kills, as a router would cause it: jobs for workers, retries, verdicts."""

import dataclasses
import json
import queue
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.served import ROOT
from bench.soak_worker import ABORTED, BLOCK_TOKENS, DONE, WINDOW_TOKENS, WRONG, Job
from bench.watched import WatchedDaemon
from kvferry_proto.states import Mode

SIZES = (0, 1, BLOCK_TOKENS, WINDOW_TOKENS - 1, WINDOW_TOKENS, 5 * WINDOW_TOKENS + 3)
SIZE_TOKENS_MAX = 12 * WINDOW_TOKENS
WHOLE_TOKENS_MAX = 3 * WINDOW_TOKENS
WORKERS_A_DAEMON = 2
ATTEMPTS_MAX = 8
SETTLE_S = 120.0
DOWN_S_MAX = 1.0
TAKE_OVER_S = 1.0
VIOLATIONS_MAX = 20
KILLED = "killed"
# What a daemon's absence may lead to where the machine is slow to start it again.
DEADLINES = ("stalled", "lease_expired", "daemon_unreachable", "peer_unreachable")


class SoakProcess:
    """A worker process, see `bench.soak_worker`; what it says comes by the queue."""

    def __init__(self, daemon: WatchedDaemon, said: "queue.Queue[Any]") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.soak_worker", str(daemon.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.was_killed = False
        self._said = said
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put((self, json.loads(line)))
        self._said.put((self, None))

    def tell(self, job: Job) -> None:
        """Give it a job; a dead one's end is told by the queue."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(dataclasses.asdict(job)), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        self.was_killed = True
        self.process.kill()

    def close(self) -> int:
        """Let it finish what it has; its exit status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            self.was_killed = True
        status = self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        return status


@dataclass
class Transfer:
    """One payload on its way, over all its attempts."""

    name: str
    tokens: int
    ends: tuple[str, str]  # names of the daemons
    mode: str
    attempt: int = 0
    waits_for: dict[str, SoakProcess] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    detail: str = ""
    is_disturbed: bool = False  # an abort or a kill excuses this attempt's failure
    take_over_at_s: float = float("inf")
    is_restarted: bool = False  # a daemon's kill excuses that a deadline was missed, no more


class Traffic:
    """Keeps so many transfers going at once."""

    def __init__(
        self, name: str, daemons: dict[str, WatchedDaemon], at_once: int, seed: int
    ) -> None:
        """``name`` is in every transfer's: no daemon may ever hear one of them twice."""
        self.name = name
        self.daemons = daemons
        self.at_once = at_once
        self.rng = random.Random(seed)
        self.said: queue.Queue[Any] = queue.Queue()
        self.workers: dict[str, list[SoakProcess]] = {}
        self.unlucky: list[subprocess.Popen[bytes]] = []  # killed before they are welcome
        self.live: dict[str, Transfer] = {}
        self.count = 0
        self.counters: Counter[str] = Counter()
        self.violations: list[str] = []
        self._kill_worker_at_s = self._kill_daemon_at_s = float("inf")

    def open(self) -> None:
        """Start the workers."""
        for name, daemon in self.daemons.items():
            self.workers[name] = [SoakProcess(daemon, self.said) for _ in range(WORKERS_A_DAEMON)]

    def run(self, seconds: float, worker_kill_s: float, daemon_kill_s: float | None) -> None:
        """Random transfers; a worker is killed about every ``worker_kill_s``, a daemon likewise."""
        end_s = time.monotonic() + seconds
        self._kill_worker_at_s = time.monotonic() + worker_kill_s
        if daemon_kill_s is not None:
            self._kill_daemon_at_s = time.monotonic() + daemon_kill_s
        while (now_s := time.monotonic()) < end_s:
            while len(self.live) < self.at_once:
                self._begin()
            if now_s >= self._kill_worker_at_s:
                self._kill_worker()
                self._kill_worker_at_s = now_s + worker_kill_s * self.rng.uniform(0.5, 1.5)
            if daemon_kill_s is not None and now_s >= self._kill_daemon_at_s:
                self._kill_daemon()
                self._kill_daemon_at_s = now_s + daemon_kill_s * self.rng.uniform(0.5, 1.5)
            self._hear()

    def close(self) -> None:
        """No new transfers; wait for those that are live, and for the workers to leave."""
        until_s = time.monotonic() + SETTLE_S
        while self.live and time.monotonic() < until_s:
            self._hear()
        for transfer in self.live.values():
            self._violation(f"never ended: {transfer}")
        self.live.clear()
        for processes in self.workers.values():
            for process in processes:
                if process.close() != 0 and not process.was_killed:
                    self._violation(f"a worker ended with status {process.process.returncode}")
        self.workers.clear()
        for unlucky in self.unlucky:
            unlucky.wait()

    def abandon(self) -> None:
        """Let nothing of it outlive an interrupt."""
        for process in (process for group in self.workers.values() for process in group):
            process.kill()

    def _violation(self, words: str) -> None:
        if len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(words[:600])

    # --- transfers ---

    def _begin(self) -> None:
        rng = self.rng
        self.count += 1
        pairs = [(one, two) for one in self.daemons for two in self.daemons]
        ends = rng.choice(pairs)
        if self.count <= len(pairs):  # each has its link, however slow the machine
            ends = pairs[self.count - 1]
        mode = rng.choice((Mode.CONSUME, Mode.CONSUME, Mode.WHOLE)).value
        tokens = rng.choice(
            (*SIZES, rng.randrange(SIZE_TOKENS_MAX), rng.randrange(SIZE_TOKENS_MAX))
        )
        if mode == Mode.WHOLE.value:
            tokens = min(tokens, WHOLE_TOKENS_MAX)
        transfer = Transfer(f"{self.name}-{self.count}", tokens, ends, mode)
        self.live[transfer.name] = transfer
        self.counters["handoff" if ends[0] == ends[1] else "network"] += 1
        self.counters[mode] += 1
        self._attempt(transfer)

    def _attempt(self, transfer: Transfer) -> None:
        rng = self.rng
        transfer.outcomes, transfer.is_disturbed, transfer.is_restarted = {}, False, False
        transfer.take_over_at_s = float("inf")
        aborts = rng.choice(("source", "sink")) if rng.random() < 0.1 else None
        source, sink = transfer.ends
        common: dict[str, Any] = {
            "transfer_id": transfer.name,
            "attempt": transfer.attempt,
            "tokens": transfer.tokens,
            "window_tokens": rng.choice((None, None, BLOCK_TOKENS, 2 * BLOCK_TOKENS + 1)),
            "world_size": 1 if transfer.mode == Mode.WHOLE else rng.choice((1, 1, 1, 2, 3)),
        }
        if common["world_size"] > 1:
            common["window_tokens"] = BLOCK_TOKENS  # of each: the quota is for all of them
            self.counters["groups"] += 1
        for role, daemon in (("source", source), ("sink", sink)):
            job = Job(
                **common,
                role=role,
                source=None if source == sink else self.daemons[source].address,
                mode=transfer.mode,
                is_total_early=rng.random() < 0.5,
                abort_at_tokens=rng.randrange(SIZE_TOKENS_MAX) if aborts == role else None,
                begin_after_s=rng.choice((0.0, 0.0, 0.05, 0.2)),
            )
            process = rng.choice(self.workers[daemon])
            transfer.waits_for[role] = process
            transfer.is_disturbed |= process.was_killed
            process.tell(job)

    def _hear(self) -> None:
        self._take_over()
        try:
            process, said = self.said.get(timeout=0.05)
        except queue.Empty:
            return
        if said is None:
            self._on_gone(process)
            return
        job = Job(**said["job"])
        transfer = self.live.get(job.transfer_id)
        if said["outcome"] == WRONG:
            self._violation(f"{said}")
        if transfer is not None and transfer.attempt == job.attempt:
            self._on_side(transfer, job.role, said["outcome"], said["detail"])

    def _on_gone(self, process: SoakProcess) -> None:
        if not process.was_killed:
            self._violation("a worker died by itself")
        for transfer in list(self.live.values()):
            for role in [r for r, p in transfer.waits_for.items() if p is process]:
                transfer.is_disturbed = True
                self._on_side(transfer, role, KILLED, "")

    def _on_side(self, transfer: Transfer, role: str, outcome: str, detail: str) -> None:
        """One side has ended."""
        if transfer.waits_for.pop(role, None) is None:
            return
        self.counters[f"{role}_{outcome}"] += 1
        transfer.outcomes[role] = outcome
        transfer.detail += f" {role} {transfer.attempt}: {outcome} {detail};"
        transfer.is_disturbed |= outcome == ABORTED
        if transfer.is_restarted and detail.startswith(DEADLINES):
            transfer.is_disturbed = True
            self.counters["timed_out"] += 1
        if outcome == KILLED:  # the other side may end by that, or the next attempt ends it
            transfer.take_over_at_s = time.monotonic() + self.rng.choice((0.0, TAKE_OVER_S))
        if not transfer.waits_for:
            self._on_both(transfer)

    def _take_over(self) -> None:
        """The next attempt of those whose one side was killed need not wait for the other."""
        for transfer in list(self.live.values()):
            if time.monotonic() >= transfer.take_over_at_s:
                transfer.waits_for.clear()
                self._on_both(transfer)

    def _on_both(self, transfer: Transfer) -> None:
        """An attempt is over: it is a success, or the next one begins."""
        if not transfer.is_disturbed and set(transfer.outcomes.values()) != {DONE}:
            del self.live[transfer.name]
            self._violation(f"failed though nobody disturbed it: {transfer}")
        elif transfer.outcomes.get("sink") == DONE:  # every token was seen, and was right
            del self.live[transfer.name]
            self.counters["transfers_done"] += 1
            self.counters["tokens_done"] += transfer.tokens
        elif transfer.attempt + 1 == ATTEMPTS_MAX:
            del self.live[transfer.name]
            self.counters["given_up"] += 1
        else:
            transfer.attempt += 1
            self.counters["retries"] += 1
            self._attempt(transfer)

    # --- kills ---

    def _kill_worker(self) -> None:
        name = self.rng.choice(list(self.daemons))
        place = self.rng.randrange(WORKERS_A_DAEMON)
        killed = self.workers[name][place]
        for transfer in self.live.values():
            transfer.is_disturbed |= killed in transfer.waits_for.values()
        killed.kill()
        killed.close()
        self.workers[name][place] = SoakProcess(self.daemons[name], self.said)
        self.counters["workers_killed"] += 1
        when = self.rng.choice(("locked", "hello"))
        directory = str(self.daemons[name].directory)
        unlucky = [sys.executable, "-m", "bench.soak_worker", directory, when]
        self.unlucky.append(subprocess.Popen(unlucky, cwd=ROOT))
        self.counters[f"workers_killed_{when}"] += 1

    def _kill_daemon(self) -> None:
        """It goes on with its ledger, so no transfer may fail by it."""
        daemon = self.daemons[self.rng.choice(list(self.daemons))]
        daemon.kill()
        time.sleep(self.rng.uniform(0, DOWN_S_MAX))
        daemon.start()
        for transfer in self.live.values():
            transfer.is_restarted = True
        self.counters["daemons_killed"] += 1
