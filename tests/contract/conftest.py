"""Real daemons behind every transport, and a transfer over them that is driven step by step.

The daemons serve many tests, so every test has ids of its own, and after each of them every block
is free again. A role's quota is one and a half windows: nothing of any length fits at once.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvferry_proto import worker
from kvferry_proto.fields import Aux
from kvferry_proto.layout import Layout, Order
from kvferry_proto.states import TERMINAL, Mode, Role, StallReason, State
from live import BLOCK, LAYOUT, WAIT_S, WINDOW, LiveDaemon, RawWorker

QUOTA = WINDOW * 3 // 2
ALL = 1 << 30
STEPS_MAX = 2000
TAKE = (StallReason.WAITING_FOR_RESUME, StallReason.WAITING_FOR_BLOCKS)
# What both daemons of a transport are started with; `toml` is what has no flag with a value.
TRANSPORTS: dict[str, dict[str, Any]] = {
    "handoff": {},
    "copy": {"chunk_bytes": 2 * LAYOUT.block_bytes},
    "tcp": {},
    "nixl": {"transport": "nixl"},
    "tcp-tls": {"payload_encryption": "tls"},
    "tcp-nochecksum": {"toml": "checksum = false"},
    "tcp-2streams": {"streams": 2, "chunk_bytes": 2 * LAYOUT.block_bytes},
}


@dataclass
class Flow:
    """One attempt of one transfer, and what its sink worker has taken over so far."""

    source: RawWorker
    consumer: RawWorker
    address: str
    transfer_id: str
    total: int
    attempt: int = 0
    seed: int = 0
    start: int = 0
    whole: int | None = None  # max_tokens of whole mode
    late: bool = False  # the total is told in a message of its own, once every token is ready
    ready_step: int = ALL  # most tokens that become ready in one call
    take_step: int = ALL  # most tokens that one resume takes over
    eager: bool = False  # takes what is there without waiting until the window is full
    aux: Aux | None = None
    resumes: list[int] = field(default_factory=list)
    taken: int = 0
    planes: list[bytearray] = field(default_factory=list)

    @property
    def named(self) -> dict[str, Any]:
        """The fields that every call about it has."""
        return {"transfer_id": self.transfer_id, "attempt": self.attempt}

    def open(self, **receive: Any) -> None:
        """Open both sides."""
        self.open_source()
        self.open_sink(**receive)

    def open_source(self, **send: Any) -> worker.Snapshot:
        return self.source.snapshot(
            worker.Send(**self.named, **{"start_tokens": self.start, **send})
        )

    def open_sink(self, **receive: Any) -> worker.Snapshot:
        self.taken = int(receive.get("start_tokens", self.start))
        self.planes = [bytearray() for _ in self.consumer.layout.planes]
        fields = {"start_tokens": self.start, "source": self.address, **receive}
        if self.whole is not None:
            fields.update(mode=Mode.WHOLE, max_tokens=self.whole)
        return self.consumer.snapshot(worker.Receive(**self.named, **fields))

    def seen(self, role: Role, after: int = -1, wait_s: float = 0) -> worker.Snapshot | None:
        """The snapshot now, or with ``after`` the next one, None if none came in time."""
        me = self.source if role is Role.SOURCE else self.consumer
        watched = worker.Watched(role=role, after=after, **self.named)
        reply = me.call(worker.Poll(transfers=[watched], wait_s=wait_s))
        assert isinstance(reply, worker.Snapshots), reply
        assert not reply.refused, reply
        return reply.transfers[0] if reply.transfers else None

    def now(self, role: Role) -> worker.Snapshot:
        seen = self.seen(role)
        assert seen is not None
        return seen

    def wait(self, role: Role, condition: Any) -> worker.Snapshot:
        """Look at every change of one side until it fits."""
        seen = self.now(role)
        for _ in range(STEPS_MAX):
            if condition(seen):
                return seen
            seen = self.seen(role, seen.snapshot, wait_s=0.1) or seen
        raise AssertionError(seen)

    def wait_end(self, role: Role) -> worker.Snapshot:
        return self.wait(role, lambda seen: seen.state in TERMINAL)

    def ready(self, tokens: int, **fields: Any) -> worker.Snapshot:
        """Fill up to a token and say so, once the window reaches so far."""
        fits = lambda s: s.base_tokens + s.allocated_tokens >= tokens or s.state in TERMINAL
        self.source.fill(self.wait(Role.SOURCE, fits), tokens, self.seed)
        return self.source.snapshot(worker.Ready(**self.named, ready_tokens=tokens, **fields))

    def produce(self) -> None:
        """Make ready what the source's window has room for now."""
        seen = self.now(Role.SOURCE)
        done = seen.available_tokens == self.total
        if seen.state in TERMINAL or (done and seen.total_tokens == self.total):
            return
        edge = seen.base_tokens + seen.allocated_tokens
        edge = max(self.start, min(self.total, edge, seen.available_tokens + self.ready_step))
        told = self.total if not self.late or done else None
        if edge > seen.available_tokens or told is not None:
            aux = self.aux if edge == self.total else None
            self.ready(edge, total_tokens=told, aux=aux)

    def consume(self) -> worker.Snapshot:
        """Take over what the sink's worker would take over now."""
        seen = self.now(Role.SINK)
        self.consumer.check(seen, self.seed)
        if seen.state is State.SUCCESS:
            self.take(seen, seen.sent_tokens)
        elif seen.state is not State.FAILED and self._wants_to_take(seen):
            self.resume(seen, min(seen.sent_tokens, self.taken + self.take_step))
        return seen

    def _wants_to_take(self, seen: worker.Snapshot) -> bool:
        due = self.whole is None and (self.eager or seen.stall in TAKE)
        return due and seen.sent_tokens > seen.partial_sent_tokens

    def resume(self, seen: worker.Snapshot, at: int) -> worker.Snapshot:
        """Take tokens over, and say so."""
        self.take(seen, at)
        self.resumes.append(at)
        return self.consumer.snapshot(worker.Resume(**self.named, sent_tokens=at))

    def take(self, seen: worker.Snapshot, end: int) -> None:
        """Copy the tokens behind those taken already out of the pool."""
        for token, block in self.consumer.window(seen):
            self._append(self.planes, self.consumer.block(block), token, end)

    def _append(self, planes: list[bytearray], block: bytes, token: int, end: int) -> None:
        first, last = max(self.taken, token), min(end, token + BLOCK)
        if first >= last:
            return
        assert first == self.taken, (first, self.taken)  # no gap
        for plane, (offset, size) in zip(planes, self.consumer.layout.places, strict=True):
            at = offset + (first - token) * size
            plane += block[at : at + (last - first) * size]
        self.taken = last

    def step(self) -> worker.Snapshot:
        self.produce()
        return self.consume()

    def run(self, steps: int = STEPS_MAX) -> worker.Snapshot:
        """Drive both sides to the end, and compare every byte that was taken over."""
        for _ in range(steps):
            seen = self.step()
            if seen.state in TERMINAL:
                break
            self.seen(Role.SINK, seen.snapshot, wait_s=0.01)
        self.check_success()
        return seen

    def check_success(self) -> None:
        """Both sides ended well, and what was taken over is what was sent."""
        end = self.now(Role.SINK)
        assert end.state is State.SUCCESS, (end, self.now(Role.SOURCE))
        assert end.sent_tokens == end.total_tokens == self.taken == self.total
        expected = [bytearray() for _ in self.planes]
        first = self.taken = end.start_tokens
        for token in range(first // BLOCK * BLOCK, self.total, BLOCK):
            self._append(expected, self.source.content(token, self.seed), token, self.total)
        assert self.planes == expected
        assert self.wait_end(Role.SOURCE).state is State.SUCCESS

    def abort(self, role: Role, reason: str = "") -> worker.Snapshot:
        me = self.source if role is Role.SOURCE else self.consumer
        return me.snapshot(worker.Abort(**self.named, role=role, reason=reason))

    def release(self, role: Role) -> worker.Snapshot:
        me = self.source if role is Role.SOURCE else self.consumer
        return me.snapshot(worker.Release(**self.named, role=role))

    def to_the_middle(self) -> None:
        """Open both sides; the sink's window is full, and a block more is ready."""
        self.open()
        self.ready(WINDOW)
        self.wait(Role.SINK, lambda seen: seen.sent_tokens == WINDOW)
        self.ready(WINDOW + BLOCK)


class Pair:
    """A source's daemon and a sink's, the same one where the transport works within one."""

    def __init__(self, transport: str, source: LiveDaemon, sink: LiveDaemon) -> None:
        self.transport = transport
        self.source = source
        self.sink = sink
        self.address = source.address
        self.workers = ExitStack()
        self._ids = itertools.count()

    @property
    def daemons(self) -> list[LiveDaemon]:
        return [self.source] if self.source is self.sink else [self.source, self.sink]

    def worker(self, role: Role, layout: Layout = LAYOUT) -> RawWorker:
        """A worker that is gone after the test; closing it earlier is its death."""
        if self.transport == "copy":
            layout = _turned(layout, Order.NHD if role is Role.SOURCE else Order.HND)
        directory = (self.source if role is Role.SOURCE else self.sink).directory
        return self.workers.enter_context(_Mortal(directory, layout))

    def flow(self, total: int, layout: Layout = LAYOUT, **fields: Any) -> Flow:
        """A transfer with an id and two workers of its own; nothing is opened yet."""
        source = fields.pop("by", None) or self.worker(Role.SOURCE, layout)
        consumer = fields.pop("to", None) or self.worker(Role.SINK, layout)
        name = fields.pop("transfer_id", f"t{next(self._ids)}")
        return Flow(source, consumer, self.address, name, total, **fields)

    def counters(self, name: str) -> int:
        """A counter, summed up over the daemons."""
        return sum(daemon.status().counters.get(name, 0) for daemon in self.daemons)

    def wait_for_workers(self, workers: int) -> None:
        """Wait until the source's daemon has noticed that all others are gone."""
        end_s = time.monotonic() + WAIT_S
        while self.source.status().workers != workers:
            assert time.monotonic() < end_s

    def check(self) -> None:
        """Nothing is left of a test: no block, no stack trace, and the daemons live."""
        for daemon in self.daemons:
            assert daemon.process.poll() is None, daemon.log()
            status = daemon.wait_until_free()
            assert all(pool.blocks_quarantined == 0 for pool in status.pools), status
            assert "Traceback" not in daemon.log(), daemon.log()


def _turned(layout: Layout, order: Order) -> Layout:
    """The same bytes in the same places, and yet a layout, and a pool, of its own.

    A token of a plane with one head is the same in either order.
    """
    one = {"shape": (1, *layout.planes[0].shape), "heads_total": 1, "order": order}
    first = layout.planes[0].model_copy(update=one)
    return Layout(
        planes=(first, *layout.planes[1:]),
        aux=layout.aux,
        block_size_tokens=layout.block_size_tokens,
    )


class _Mortal(RawWorker):
    """May be closed early."""

    def close(self) -> None:
        if not self.context.closed:
            super().close()


@pytest.fixture(scope="module", params=list(TRANSPORTS))
def _daemons(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    name: str = request.param
    directory: Path = tmp_path_factory.mktemp("d")  # short: a socket's path has 107 bytes
    flags = {"pool_tokens": 2 * QUOTA, "heartbeat_s": 0.1, "drain_s": 0.2, **TRANSPORTS[name]}
    toml = directory / "daemon.toml"
    toml.write_text(str(flags.pop("toml", "")))
    with ExitStack() as stack:
        names = ("a",) if name in ("handoff", "copy") else ("a", "b")
        lives = [
            stack.enter_context(LiveDaemon(directory / n, config=toml, **flags)) for n in names
        ]
        yield Pair(name, lives[0], lives[-1])


@pytest.fixture
def pair(_daemons: Pair) -> Iterator[Pair]:
    """The daemons; afterwards every worker is gone and every block is free."""
    with ExitStack() as _daemons.workers:
        yield _daemons
    _daemons.check()
