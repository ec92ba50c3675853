"""One case: a transfer between four real processes, one of which is caught, and one is struck."""

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from faults.four import DAEMON_OF, DAEMONS, WORKERS, Four
from faults.points import POINTS, Point
from faults.processes import WAIT_S, until
from kvferry_proto.states import TERMINAL, State

Act = Literal["kill", "stop"]
WORKER_OF = {daemon: worker for worker, daemon in DAEMON_OF.items()}
# A restart must not count as silence. And below 2 s the daemon takes its own standing still for the
# silence of others: it looks for that once a second, and forgives from one second on.
LOST_S: dict[Act, float] = {"kill": 15.0, "stop": 2.5}
STOP_S = LOST_S["stop"] + 1.3  # silence, too, is looked for once a second

LATE_S = 0.3


class Case(NamedTuple):
    """``late``: the caught process goes on only when the fault is over, else right after it.

    If it is the victim itself, it is struck only after the others had time for all that they can do
    without what it is about to do.
    """

    name: str
    victim: str
    act: Act
    nth: int = 1
    late: bool = False

    @property
    def point(self) -> Point:
        """Of this name."""
        return POINTS[self.name]

    @property
    def caught(self) -> str:
        """The process that the point is in."""
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        late = "-late" if self.late else ""
        return f"{self.name}@{self.nth}-{self.act}-{self.victim}{late}"


class Scene(Four):
    """The four of one case."""

    def __init__(self, directory: Path, case: Case) -> None:
        super().__init__(directory)
        self.case = case

    def flags(self, name: str) -> Mapping[str, object]:
        """What counts as silence depends on the fault."""
        return {"lost_s": LOST_S[self.case.act]}

    def trap(self, name: str, arm: str) -> str | None:
        """For the process of the point, in the life in which it is to be reached."""
        if (name, arm) != (self.case.caught, self.case.point.arm):
            return None
        return f"{self.case.name}@{self.case.nth}={self.directory}"

    def run(self) -> None:
        """The whole case."""
        case = self.case
        self.start_all()
        self.move("warm-up")
        before = {name: self.quiet(name) for name in DAEMONS}
        self.spring()
        attempt = self.route("case")
        # A daemon that is killed goes on from its ledger, and one that stood still knows it did:
        # neither costs an attempt. A worker that is killed costs the attempt that decode had not
        # finished; whether it had, and whether one that stood still was missed, is a matter of
        # time, so that one more attempt may be needed, or not.
        assert attempt <= (case.victim in WORKERS), f"attempt {attempt} was needed"
        if case.act == "kill" and case.victim == "decode":
            assert attempt == (self.struck is not None)
        for name in DAEMONS:
            self.all_over(name, attempt)
        self.relieve()
        self.move("after")
        for name in DAEMONS:
            self.same(name, before[name])
        self.leave()

    def spring(self) -> None:
        """Begin the transfer, wait until the trap has caught its process, and do the fault."""
        case, arm = self.case, self.case.point.arm
        if arm != "restart":
            (self.directory / "armed").touch()
        if arm == "fresh":
            self.replace(case.caught)
        self.begin("case", pause=arm == "restart")
        if arm == "restart":
            (self.directory / "armed").touch()
            self.daemons[case.caught].signal(signal.SIGKILL)
            self.start(case.caught, "restart")
            self.go_on()
        until((self.directory / "hit").exists, f"{case} was never reached")
        self.strike()

    def replace(self, name: str) -> None:
        """Another process without a past takes over, with the trap in it; so does its worker."""
        worker = WORKER_OF.get(name, name)
        self.workers[worker].leave()
        self.daemons[DAEMON_OF[worker]].wait_for_workers(0)
        if name in DAEMONS:
            self.daemons[name].signal(signal.SIGKILL)
            for path in self.daemons[name].directory.glob("ledger.db*"):
                path.unlink()
            self.start(name, "fresh")
            self.await_daemon(name)
        self.start(worker, "fresh")

    def strike(self) -> None:
        """Do the fault, and let the one that was caught go on."""
        case, victim = self.case, self.process(self.case.victim)
        caught = self.process(case.caught)
        if case.late and victim is caught:
            time.sleep(LATE_S)  # part of the fault: nobody waits for anything here
        victim.signal(signal.SIGKILL if case.act == "kill" else signal.SIGSTOP)
        if not case.late and victim is not caught:
            self.let_go()
        if case.act == "kill":
            self._start_again(case.victim)
        else:
            time.sleep(STOP_S)  # this is the fault itself: longer than anybody waits for a sign
            victim.signal(signal.SIGCONT)
        self.let_go()
        if case.point.arm == "restart" and caught.alive:
            self.await_daemon(case.caught)

    def _start_again(self, name: str) -> None:
        self.start(name)
        if name in DAEMONS:
            self.await_daemon(name)
        elif self.workers[name].outcome("case", 0) is None:
            self.struck = (name, "case", 0)

    def let_go(self) -> None:
        """Who was caught goes on."""
        (self.directory / "go").touch()

    def all_over(self, name: str, attempt: int) -> None:
        """Every attempt is terminal, the last one well, and every block free."""
        daemon = self.daemons[name]

        def states() -> dict[int, State]:
            rows = daemon.transfers("case")
            return {row.snapshot.attempt: row.snapshot.state for row in rows}

        until(lambda: TERMINAL.issuperset(states().values()), states)
        # A source whose worker died, or was missed, when all had left is failed alone (design, 4).
        if name == "sink" or self.case.victim != "prefill":
            assert states()[attempt] is State.SUCCESS, states()
        daemon.wait_until_free(WAIT_S)
