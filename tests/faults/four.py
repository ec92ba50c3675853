"""Two daemons and two workers in processes of their own, and the router that lets them work."""

import functools
import signal
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from faults.processes import WAIT_S, FaultDaemon, FaultWorker, until

DAEMONS, WORKERS = ("source", "sink"), ("prefill", "decode")
VICTIMS = (*DAEMONS, *WORKERS)
DAEMON_OF = {"prefill": "source", "decode": "sink"}
ATTEMPTS_MAX = 4
FILES = {"daemon.lock": 1, "worker.sock": 1, "control.sock": 1, "ledger.db": 1, "ledger.db-wal": 1}
RUNNING = {**FILES, "pools": 2, "workers": 1}


class Four:
    """The processes by name, and what a router does with them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemons: dict[str, FaultDaemon] = {}
        self.workers: dict[str, FaultWorker] = {}
        self.everyone: list[FaultDaemon | FaultWorker] = []
        self.ports: dict[str, int] = {}
        self.struck: tuple[str, str, int] | None = None  # an attempt that ended with its worker

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        for one in self.everyone:
            one.make_sure_that_it_is_gone()
        if kind is not None:
            told = [*self.directory.glob("*.log"), *self.directory.glob("*.*.*")]
            for path in sorted(told):
                print(f"--- {path.name}\n{path.read_text()[-4000:]}")

    # --- processes ---

    def flags(self, name: str) -> Mapping[str, object]:
        """A daemon's own flags."""
        raise NotImplementedError

    def runtime_dir(self, daemon: str) -> Path:
        """A daemon's directory."""
        return self.directory / daemon

    def prefix(self, name: str) -> list[str]:
        """A command in front of a daemon's."""
        return []

    def trap(self, name: str, arm: str) -> str | None:
        """What to tell a process that is started, if it is to be caught."""
        return None

    def start_all(self) -> None:
        """Everybody, before anything is moved."""
        for name in DAEMONS:
            self.start(name, "warm")
        for name in DAEMONS:
            self.await_daemon(name)
        for name in WORKERS:
            self.start(name, "warm")

    def start(self, name: str, arm: str = "") -> None:
        """Start a process, or its next life; it need not be ready when this returns."""
        trap = self.trap(name, arm)
        if name in DAEMONS:
            flags = {"peer_port": self.ports.get(name, 0), **self.flags(name)}
            where, before = self.runtime_dir(name), self.prefix(name)
            daemon = FaultDaemon(where, trap, before, self.directory, **flags)
            self.daemons[name] = daemon
            self.everyone.append(daemon)
        else:
            runtime_dir = self.runtime_dir(DAEMON_OF[name])
            self.workers[name] = FaultWorker(name, runtime_dir, self.directory, trap)
            self.everyone.append(self.workers[name])

    def process(self, name: str) -> FaultDaemon | FaultWorker:
        """By its name."""
        return self.daemons[name] if name in DAEMONS else self.workers[name]

    def await_daemon(self, name: str) -> None:
        """Wait until it is ready; its next life is to have the same port, with a ledger or not."""
        self.daemons[name].wait_ready()
        self.ports[name] = int(self.daemons[name].address.rpartition(":")[2])

    # --- the router ---

    def order(self, worker: str, name: str, attempt: int, pause: bool = False) -> None:
        """Let a worker begin an attempt."""
        more: dict[str, Any] = {}
        if worker == "decode":
            more["source"] = self.daemons["source"].address
            more["pause"] = str(self.directory) if pause else None
        self.workers[worker].order(name, attempt, **more)

    def route(self, name: str) -> int:
        """Retry on both sides until decode has everything; return the attempt that brought it.

        An attempt has failed when one of the workers says so, or is dead without having said
        anything. The next one begins at once, on both sides: it ends what is left of the other.
        """
        for attempt in range(ATTEMPTS_MAX):
            if self._await_end(name, attempt) == "well":
                self._await_all(name, attempt)
                return attempt
            for worker in WORKERS:
                self.order(worker, name, attempt + 1)
        raise AssertionError(f"{ATTEMPTS_MAX} attempts were not enough")

    def _await_end(self, name: str, attempt: int) -> str:
        """How an attempt ended; decode may well have everything when prefill has failed."""

        def end() -> str:
            prefill = self._outcome("prefill", name, attempt)
            decode = self._outcome("decode", name, attempt)
            return decode or (prefill if prefill != "well" else "")

        return str(until(end, f"attempt {attempt} of {name} never ended"))

    def _await_all(self, name: str, attempt: int) -> None:
        """Every attempt so far has ended for both workers."""
        for worker in WORKERS:
            for earlier in range(attempt + 1):
                what = f"attempt {earlier} of {name} never ended for {worker}"
                until(functools.partial(self._outcome, worker, name, earlier), what)

    def _outcome(self, worker: str, name: str, attempt: int) -> str:
        """How an attempt ended for a worker; a struck one's died with it. "" is not yet."""
        said = self.workers[worker].outcome(name, attempt)
        if said is None and (worker, name, attempt) == self.struck:
            return "its worker was killed"
        assert self.workers[worker].alive or said is not None, f"{worker} is dead"
        return "" if said is None else said or "well"

    def begin(self, name: str, pause: bool = False) -> None:
        """Let both workers begin their first attempt; decode pauses behind the second window."""
        for worker in WORKERS:
            self.order(worker, name, 0, pause)
        if pause:
            until((self.directory / "paused").exists, "decode never came to its pause")

    def go_on(self) -> None:
        """Decode has paused long enough."""
        (self.directory / "unpaused").touch()

    def move(self, name: str) -> None:
        """Move a payload from beginning to end, in one attempt."""
        self.begin(name)
        attempt = self.route(name)
        assert attempt == 0, (name, attempt)

    def relieve(self) -> None:
        """New workers: one that met a retry had more to say at once, and has a connection more."""
        for name in WORKERS:
            self.workers[name].leave()
            self.start(name)

    # --- what must hold ---

    def quiet(self, name: str) -> dict[str, Any]:
        """Wait until nothing goes on in a daemon; say what it has then."""
        daemon = self.daemons[name]
        daemon.wait_until_free(WAIT_S)
        until(lambda: daemon.files() == RUNNING, daemon.files)
        return daemon.settled_census()

    def same(self, name: str, before: dict[str, Any]) -> None:
        """Nothing is left of what was: descriptors, threads, tasks, files."""
        seen: list[Any] = []

        def is_same() -> bool:
            seen.append(self.quiet(name))
            return bool(seen[-1] == before)

        until(is_same, lambda: f"{name} had {before}, has {seen[-1]}", 20.0)
        assert "Traceback" not in self.daemons[name].log()

    def leave(self) -> None:
        """End everybody in peace: then nothing but the directories' locks is left."""
        for worker in self.workers.values():
            worker.leave()
        for daemon in self.daemons.values():
            daemon.wait_for_workers(0)
            daemon.process.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            assert daemon.end(WAIT_S) == 0, daemon.log()
            assert daemon.files() == {"daemon.lock": 1}, daemon.files()
            assert "Traceback" not in daemon.log()
        assert not processes_of(self.directory)


def processes_of(directory: Path) -> list[str]:
    """Command lines of living processes that name a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"{directory}/" in line:
            found.append(line)
    return found
