"""What a prefill and a decode worker do with one attempt of a transfer: one call at a time each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvferry_daemon.core.events import Key
from kvferry_proto import worker
from kvferry_proto.errors import Code
from kvferry_proto.states import TERMINAL, Mode, Role, StallReason, State
from sim import boards
from sim.memory import BLOCK, EMPTY, Broken, Memory

if TYPE_CHECKING:
    from sim.jobs import Job
    from sim.life import Life
    from sim.workers import Process

WAIT_S = 2.0  # of one poll
MUST_TAKE = (StallReason.WAITING_FOR_RESUME, StallReason.WAITING_FOR_BLOCKS)
# A worker that does as it should gets these only when its attempt is over for other reasons.
ATTEMPT_OVER = (Code.STALE_ATTEMPT, Code.UNKNOWN_TRANSFER)


class Side:
    """One side of one attempt, in one process."""

    role: Role

    def __init__(self, job: Job, attempt: int, process: Process, rank: int) -> None:
        self.job = job
        self.key = Key(self.role, job.plan.name, attempt)
        self.rank = rank
        self.name: dict[str, Any] = {
            "transfer_id": job.plan.name,
            "attempt": attempt,
            "rank": rank,
        }
        self.process = process
        self.world = process.world
        self.think_s = job.plan.think_s
        self.token_name = job.name(attempt, rank)
        self.seen: worker.Snapshot | None = None
        self.over = False  # nothing is left to do for it
        self.released = False  # touches no block any more
        self.memory: Memory | None = None
        self._shown: dict[int, int] = {}  # block -> its first token
        self._shown_as: object = None

    # --- its life ---

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.process.layout.block_size_tokens

    @property
    def group(self) -> tuple[int, str]:
        """Which attempt, and at which daemon: one that began anew knows nothing of the others."""
        life = self.process.life
        return self.key.attempt, life.node.settings.daemon_id if life is not None else ""

    def start(self) -> None:
        """Open it."""
        self.process.sides[self.key, self.rank] = self
        if self.process.life is not None:
            self.adopt(self.process.life)
        self.open()

    def open(self) -> None:
        """Make the first call."""
        raise NotImplementedError

    def adopt(self, life: Life) -> None:
        """The session is with this life of the daemon, and so is its pool."""
        life.sides[self.key, self.rank] = self
        self.memory = life.pools[self.process.layout.digest.hex()]

    def daemon_restarted(self) -> None:
        """The daemon has lost the attempt, and its pool is another file now."""
        self._end()
        self.job.attempt_failed(self.key.attempt, "daemon restarted")

    def process_died(self) -> None:
        """Dead workers touch nothing."""
        if not self.over:
            self._end()
            self.job.attempt_failed(self.key.attempt, "worker died")

    def _end(self) -> None:
        self.over = self.released = True
        self.job.look()

    def give_up(self, *, abort: bool) -> None:
        """Another attempt, or nobody, wants it now."""
        if self.released or self.over:
            return
        self.process.forget(self)
        if abort:
            self.process.ask(worker.Abort, self._aborted, role=self.role, **self.name)
        else:
            self.release()

    def _aborted(self, _reply: object) -> None:
        self.release()

    def release(self) -> None:
        """Touch no block from now on, and say so."""
        if self.released:
            return
        self.released = True
        self.process.ask(worker.Release, self._on_released, role=self.role, **self.name)

    def _on_released(self, _reply: object) -> None:
        self.process.sides.pop((self.key, self.rank), None)
        self._end()

    def touches(self, block: int) -> bool:
        """Whether the worker may still read or write a block that it was shown."""
        if self.released or self.over or self.seen is None:
            return False
        if self._shown_as != (self.seen.base_tokens, self.seen.runs):
            self._shown_as = (self.seen.base_tokens, self.seen.runs)
            self._shown = {}
            token = self.seen.base_tokens
            for first, blocks in self.seen.runs:
                for one in range(first, first + blocks):
                    self._shown[one] = token
                    token += self.block_size
        first_token = self._shown.get(block)
        return first_token is not None and self.needs(first_token + self.block_size)

    def needs(self, end_token: int) -> bool:
        """Whether the worker still needs the block that ends there."""
        raise NotImplementedError

    # --- calls and answers ---

    def ask(self, kind: type[Any], **fields: Any) -> None:
        """One call at a time."""
        self.process.ask(kind, self._on_reply, **fields, **self.name)

    def poll(self) -> None:
        """Wait for a change."""
        assert self.seen is not None
        watched = worker.Watched(role=self.role, after=self.seen.snapshot, **self.name)
        if self.world.plan.boards:
            boards.poll(self, watched, self.world.dice.choice((0.0, 0.0, WAIT_S)))
            return
        self.process.ask(worker.Poll, self._on_reply, transfers=[watched], wait_s=WAIT_S)

    def _on_reply(self, reply: worker.Snapshots | worker.Failure) -> None:
        self.heard(reply, 0.0)

    def heard(self, reply: worker.Snapshots | worker.Failure, idle_s: float) -> None:
        """Take an answer in and go on; only after ``idle_s`` if it brings nothing."""
        if self.released or self.over:
            return
        if isinstance(reply, worker.Failure):
            self._refused(reply.error.code, reply.error.message)
            return
        for refused in reply.refused:
            self._refused(refused.error.code, refused.error.message)
            return
        for seen in reply.transfers:
            if self.seen is None or seen.snapshot >= self.seen.snapshot:
                if self.seen is not None and seen.sent_tokens < self.seen.sent_tokens:
                    raise Broken(f"I2: {self.key} was told {self.seen.sent_tokens}, now {seen}")
                if seen.rank != self.rank:
                    raise Broken(f"I10: {self.key} rank {self.rank} is shown {seen}")
                self.job.was_shown(self.role, self.group, seen.snapshot, _common(seen))
                self.seen = seen
        wait_s = self.think_s if reply.transfers else max(idle_s, self.think_s)
        wait_s *= 0.5 + self.world.dice.random()
        self.process.later(wait_s, self._think)

    def _think(self) -> None:
        if not self.released and not self.over:
            self.step()

    def step(self) -> None:
        """The next thing to do."""
        raise NotImplementedError

    def _refused(self, code: str, message: str) -> None:
        if code not in ATTEMPT_OVER:
            raise Broken(f"{self.key} is refused {code}: {message}")
        self.job.attempt_failed(self.key.attempt, code)
        self.release()

    def failed(self) -> None:
        """The daemon says that the attempt has failed."""
        assert self.seen is not None
        code = self.seen.error.code if self.seen.error else "no error"
        self.job.attempt_failed(self.key.attempt, code)
        self.release()

    def slot(self, token: int) -> int:
        """Where a token of the window lies."""
        assert self.seen is not None
        index, rest = divmod(token - self.seen.base_tokens, self.block_size)
        for first, blocks in self.seen.runs:
            if index < blocks:
                return (first + index) * self.block_size + rest
            index -= blocks
        raise Broken(f"{self.key}: token {token} lies in no block of {self.seen}")


class SourceSide(Side):
    """A prefill worker: fill what the window has room for, mark it ready, wait for the end."""

    role = Role.SOURCE

    def __init__(self, job: Job, attempt: int, process: Process, rank: int) -> None:
        super().__init__(job, attempt, process, rank)
        self.ready = job.plan.start_source
        self.told = False
        self.aux_told = False

    def open(self) -> None:
        plan = self.job.plan
        self.told = not plan.late
        self.aux_told = self.told and plan.early_aux
        self.ask(
            worker.Send,
            world_size=plan.ranks_of(self.role),
            start_tokens=plan.start_source,
            total_tokens=self.job.total if self.told else None,
            aux=self.job.aux if self.aux_told else None,
            window_tokens=plan.window_source,
        )

    def needs(self, end_token: int) -> bool:
        return end_token > self.ready and not (self.told and self.ready == self.job.total)

    def step(self) -> None:
        seen, total = self.seen, self.job.total
        assert seen is not None
        edge = seen.base_tokens + seen.allocated_tokens
        if seen.state is State.FAILED:
            self.failed()
        elif seen.state is State.SUCCESS:
            self.job.source_succeeded = True
            self.release()
        elif self.ready < total and edge > self.ready:
            most = min(edge, total)
            self._fill(
                self.world.dice.choice((most, self.world.dice.randint(self.ready + 1, most)))
            )
        elif self.ready == total and not (self.told and self.aux_told):
            self._mark(total, tell=True)
        elif self.ready == total and self.job.plan.goodbye:
            self.release()
        else:
            self.poll()

    def _fill(self, end: int) -> None:
        assert self.memory is not None
        assert self.process.life is not None
        life = self.process.life
        for token in range(self.ready, end):
            slot = self.slot(token)
            owner = self.memory.owner[slot // self.block_size]
            if not life.dead and (owner == EMPTY or life.key_of(self.memory, owner) != self.key):
                raise Broken(f"I7: {self.key} fills slot {slot}, which is not its own")
            self.memory.slots[slot] = self.token_name + token
        self._mark(end, tell=self.world.dice.random() < 0.5)

    def _mark(self, ready: int, *, tell: bool) -> None:
        self.ready = ready
        last = ready == self.job.total
        self.told |= tell and last
        self.aux_told |= last
        self.ask(
            worker.Ready,
            ready_tokens=ready,
            total_tokens=self.job.total if self.told else None,
            aux=self.job.aux if self.aux_told else None,
        )


class SinkSide(Side):
    """A decode worker: read what is there, resume behind it, release at the end."""

    role = Role.SINK

    def __init__(self, job: Job, attempt: int, process: Process, rank: int) -> None:
        super().__init__(job, attempt, process, rank)
        self.taken = self.resumed = job.plan.start_sink
        self._probed = False

    def open(self) -> None:
        plan = self.job.plan
        self.ask(
            worker.Receive,
            world_size=plan.ranks_of(self.role),
            source=self.job.source_address,
            mode=Mode.WHOLE if plan.whole else Mode.CONSUME,
            max_tokens=plan.max_tokens if plan.whole else None,
            start_tokens=plan.start_sink,
            window_tokens=plan.window_sink,
        )

    def needs(self, end_token: int) -> bool:
        return end_token > self.resumed

    def step(self) -> None:
        seen = self.seen
        assert seen is not None
        dice = self.world.dice
        if seen.state is State.FAILED:
            if dice.random() < 0.5:
                self._take(seen.sent_tokens)  # its window stays readable until the release
            self.failed()
            return
        if seen.sent_tokens > self.taken and self._is_due(seen):
            some = dice.choice((seen.sent_tokens, dice.randint(self.taken + 1, seen.sent_tokens)))
            end = seen.sent_tokens if self.job.plan.ranks_sink > 1 else some
            self._take(end)
            self.job.took(self.group, self.rank, end)
        if seen.state is State.SUCCESS:
            self._finish(seen)
        elif not self._probed and dice.random() < 0.05:
            self._probe()
        elif self.taken > self.resumed:
            self.resumed = self.taken
            self.ask(worker.Resume, sent_tokens=self.taken)
        elif dice.random() < 0.05:
            self.ask(worker.Resume, sent_tokens=dice.randint(self.job.plan.start_sink, self.taken))
        else:
            self.poll()

    def _is_due(self, seen: worker.Snapshot) -> bool:
        return self.job.plan.eager or seen.state in TERMINAL or seen.stall in MUST_TAKE

    def _probe(self) -> None:
        """A resume that is ahead of everything must be refused and change nothing."""
        self._probed = True
        self.process.ask(
            worker.Resume, self._on_probed, sent_tokens=self.job.total + BLOCK, **self.name
        )

    def _on_probed(self, reply: worker.Snapshots | worker.Failure) -> None:
        if self.released or self.over:
            return
        if isinstance(reply, worker.Failure) and reply.error.code == Code.RESUME_AHEAD:
            self.poll()
        else:
            self._on_reply(reply)

    def _take(self, end: int) -> None:
        """I3: every token exact; and once, since ``taken`` only grows."""
        assert self.memory is not None
        for token in range(self.taken, end):
            got = self.memory.slots[self.slot(token)]
            if got != self.token_name + token:
                raise Broken(f"I3: {self.key} reads {got:x} for token {token}")
        self.taken = end

    def _finish(self, seen: worker.Snapshot) -> None:
        if seen.total_tokens != self.job.total or seen.sent_tokens != self.job.total:
            raise Broken(f"I5: {self.key} succeeded with {seen}")
        if (self.job.aux or None) != (seen.aux or None):
            raise Broken(f"{self.key} got aux {seen.aux}, not {self.job.aux}")
        self._take(self.job.total)
        self.job.consumed(self.key.attempt, self.rank)
        self.release()


def _common(seen: worker.Snapshot) -> tuple[object, ...]:
    """What every rank is shown alike under one number."""
    return seen.state, seen.stall, seen.sent_tokens, seen.total_tokens, seen.base_tokens
