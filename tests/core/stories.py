"""Whole transfers through the modelled world, step by step."""

from dataclasses import dataclass, field
from typing import Any

from kvferry_proto import worker
from kvferry_proto.states import TERMINAL, Mode, Role, StallReason, State
from world import BLOCK, World, layout

SOURCE, SINK = b"source worker", b"sink worker"
TAKE = (StallReason.WAITING_FOR_RESUME, StallReason.WAITING_FOR_BLOCKS)


@dataclass
class Story:
    """One transfer, its workers, and what its consumer has read so far."""

    total: int
    world: World = field(default_factory=World)
    late: bool = True
    handoff: bool = False
    copy: Role | None = None  # within one daemon, too, but the blocks of this side are larger
    attempt: int = 0
    start: int = 0
    read: list[Any] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)
    windows: list[list[tuple[int, int]]] = field(default_factory=list)  # runs of each window

    def __post_init__(self) -> None:
        self.where = "b" if self.handoff or self.copy else "a"
        for where, route, role in ((self.where, SOURCE, Role.SOURCE), ("b", SINK, Role.SINK)):
            self.world.hello(where, route, layout(block=2 * BLOCK if role is self.copy else BLOCK))

    def open(self, **receive: Any) -> None:
        """Open both sides."""
        self.open_source()
        self.open_sink(**receive)

    def open_source(self) -> None:
        total = None if self.late else self.total
        call = worker.Send(transfer_id="t", attempt=self.attempt, total_tokens=total)
        assert isinstance(self.world.call(self.where, SOURCE, call), worker.Snapshots)

    def open_sink(self, mode: Mode = Mode.CONSUME, max_tokens: int | None = None) -> None:
        call = worker.Receive(
            transfer_id="t",
            attempt=self.attempt,
            source=None if self.where == "b" else "tcp://a:1",
            start_tokens=self.start,
            mode=mode,
            max_tokens=max_tokens,
        )
        assert isinstance(self.world.call("b", SINK, call), worker.Snapshots)

    def source(self) -> worker.Snapshot:
        return self.world.snapshot(self.where, SOURCE, Role.SOURCE, attempt=self.attempt)

    def sink(self) -> worker.Snapshot:
        return self.world.snapshot("b", SINK, Role.SINK, attempt=self.attempt)

    def produce(self, up_to: int | None = None) -> None:
        """Fill the source's window and mark it ready."""
        seen = self.source()
        if seen.state in TERMINAL or seen.available_tokens == seen.total_tokens:
            return
        edge = min(self.total, seen.base_tokens + seen.allocated_tokens)
        edge = max(seen.available_tokens, min(edge, self.total if up_to is None else up_to))
        self.world.fill(self.where, seen, edge)
        told = self.total if edge == self.total and edge == seen.available_tokens else None
        self.ready(edge, told)

    def ready(self, ready: int, total: int | None = None) -> None:
        call = worker.Ready(
            transfer_id="t", attempt=self.attempt, ready_tokens=ready, total_tokens=total
        )
        assert isinstance(self.world.call(self.where, SOURCE, call), worker.Snapshots)

    def resume(self, at: int) -> Any:
        call = worker.Resume(transfer_id="t", attempt=self.attempt, sent_tokens=at)
        return self.world.call("b", SINK, call)

    def take(self, seen: worker.Snapshot) -> None:
        """Read what is new in the sink's window."""
        if seen.sent_tokens > seen.partial_sent_tokens:
            self.read += self.world.read("b", seen)
            self.windows.append(list(seen.runs))

    def run(self, steps: int = 400) -> worker.Snapshot:
        """Produce and consume to the end."""
        for _ in range(steps):
            self.world.wait(0.01)
            self.produce()
            self.world.wait(0.01)
            seen = self.sink()
            if seen.state in TERMINAL:
                self.take(seen)
                return seen
            if seen.stall in TAKE and seen.sent_tokens > seen.partial_sent_tokens:
                self.take(seen)
                self.resumes.append(seen.sent_tokens)
                self.resume(seen.sent_tokens)
            self.world.beat()
        raise AssertionError((self.source(), self.sink()))

    def check(self, end: worker.Snapshot) -> None:
        """Every token once, in order, with the right name; then every block comes back."""
        assert end.state is State.SUCCESS, end
        expected = [("t", self.attempt, token) for token in range(self.start, self.total)]
        assert self.read == expected
        self.release()
        assert self.world.blocks_free("a")
        assert self.world.blocks_free("b")

    def release(self) -> None:
        for where, route, role in (
            (self.where, SOURCE, Role.SOURCE),
            ("b", SINK, Role.SINK),
        ):
            call = worker.Release(transfer_id="t", attempt=self.attempt, role=role)
            self.world.call(where, route, call)
        self.world.wait(1)
