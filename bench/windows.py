"""1 GiB through two daemons and two workers: in one window, and in windows with sliding resume.

The source worker's payload is ready before the clock starts. A round is the time from `receive`
until all is committed and taken over. The sink worker takes over a quarter of a window at a time,
so the daemon refills it while the rest is under way. An untimed first round compares every word
that arrives; the timed ones a word of every plane of every block.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench.figures import rates, ratios, spread
from bench.payload import Payload, llama, numbered
from bench.probe import Probe
from bench.served import ServedDaemon
from bench.source_worker import SourceWorker, batched, has_succeeded, let_go, wait_all
from kvferry_client import Client, Layout, Role, WindowView, connect
from kvferry_proto import worker

ROUNDS = 3
LAG_EVERY_S = 0.005
PARTS_OF_A_WINDOW = 4


class Case(NamedTuple):
    """One payload, and the windows it is received in."""

    layout: Layout
    tokens: int
    windows: tuple[int, ...]


CASES = {
    "llama_8192": Case(llama(), 8192, (1024, 2048)),
    # One rank of four: 32 KiB a token, so that a window of 8,192 is a part of 1 GiB.
    "quarter_32768": Case(llama(heads=2), 32768, (8192,)),
}
AT_ONCE = Case(llama(block_size_tokens=8), 8192, ())
COUNTS = (1, 8, 64, 1024)


class Scene:
    """Two daemons, a source worker in a process of its own, and a sink worker here."""

    def __init__(
        self, case: Case, stack: ExitStack, served: type[ServedDaemon] = ServedDaemon
    ) -> None:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        self.layout, self.tokens = case.layout, case.tokens
        self.total_bytes = case.tokens * case.layout.token_bytes
        self.daemons = {
            name: stack.enter_context(
                served(
                    root / name,
                    pool_tokens=case.tokens,
                    window_tokens=case.tokens,
                    source_share=share,
                    budget_bytes=2 * self.total_bytes + (64 << 20),
                )
            )
            for name, share in (("source", 1), ("sink", 0))
        }
        self.source = stack.enter_context(
            SourceWorker(self.daemons["source"].directory, case.layout)
        )
        self.client: Client = stack.enter_context(
            connect(self.daemons["sink"].directory, case.layout, "sink")
        )
        self.payload = Payload(self.client.pool.info, case.layout)
        self._ids = (f"bench-{number}" for number in itertools.count())

    def ids(self, count: int) -> list[str]:
        """Transfer ids never used before."""
        return list(itertools.islice(self._ids, count))

    def take_windows(self, window_tokens: int, check: Callable[..., None]) -> float:
        """Receive the payload in windows; seconds."""
        (name,) = self.ids(1)
        self.source.offer([name], self.tokens)
        part = max(window_tokens // PARTS_OF_A_WINDOW, self.layout.block_size_tokens)
        least = None if window_tokens == self.tokens else part
        begun = time.monotonic()
        with self.client.receive(
            name, source=self.daemons["source"].address, window_tokens=window_tokens
        ) as receiving:
            for window in receiving.windows(least):
                self._look(window, check)
            took_s = time.monotonic() - begun
        self.source.over()
        return took_s

    def _look(self, window: WindowView, check: Callable[..., None]) -> None:
        runs = [(run.first_block, run.blocks) for run in window.runs]
        found = numbered(runs, window.runs[0].first_token, self.layout)
        size = self.layout.block_size_tokens
        check([one for one in found if window.first_token <= one[0] * size < window.end_token])

    def take_at_once(self, count: int, check: Callable[..., None]) -> float:
        """Receive the same bytes as so many transfers; seconds until the last has succeeded."""
        ids, tokens = self.ids(count), self.tokens // count
        self.source.offer(ids, tokens)
        address = self.daemons["source"].address
        begun = time.monotonic()
        calls = [worker.Receive(transfer_id=i, source=address, window_tokens=tokens) for i in ids]
        ended = wait_all(self.client, batched(self.client, calls), has_succeeded)
        took_s = time.monotonic() - begun
        blocks = tokens // self.layout.block_size_tokens
        for index, one in enumerate(ended):
            check(numbered(one.runs, one.base_tokens, self.layout, index * blocks))
        let_go(self.client, Role.SINK, ids)
        self.source.over()
        return took_s

    def lag(self, rounds: int) -> dict[str, Any]:
        """What a message waits for each daemon's loop meanwhile; nothing else is timed then."""
        probes = {name: Probe(one.directory, LAG_EVERY_S) for name, one in self.daemons.items()}
        for probe in probes.values():
            probe.start()
        for _ in range(rounds):
            self.take_windows(self.tokens, self.payload.glance)
        return {
            name: {**probe.result(), "loop": _loop(self.daemons[name])}
            for name, probe in probes.items()
        }


def _loop(daemon: ServedDaemon) -> dict[str, Any]:
    told = daemon.status().loop
    assert told is not None
    return told.model_dump()


def measure(cases: dict[str, Case] = CASES, rounds: int = ROUNDS) -> dict[str, Any]:
    """Every case: windows of each size in turn with the whole-size one."""
    return {
        "rounds": rounds,
        "bytes_verified": True,
        **{name: _measure_case(case, rounds) for name, case in cases.items()},
    }


def _measure_case(case: Case, rounds: int) -> dict[str, Any]:
    with ExitStack() as stack:
        scene = Scene(case, stack)
        sizes = (case.tokens, *case.windows)
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for size in sizes:
            scene.take_windows(size, scene.payload.check)
        for _ in range(rounds):
            for size in sizes:
                seconds[size].append(scene.take_windows(size, scene.payload.glance))
        found: dict[str, Any] = {"total_bytes": scene.total_bytes, "tokens": case.tokens}
        for size in sizes:
            name = "whole" if size == case.tokens else f"window_{size}"
            found[f"{name}_seconds"] = spread(seconds[size])
            found[f"{name}_gb_per_s"] = rates(scene.total_bytes, seconds[size])
            if size != case.tokens:
                found[f"{name}_to_whole"] = ratios(seconds[case.tokens], seconds[size])
        found["lag"] = scene.lag(rounds)
        return found


def measure_at_once(
    case: Case = AT_ONCE, counts: tuple[int, ...] = COUNTS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """The same bytes as one transfer and as many at once; blocks of few tokens, for all alike."""
    with ExitStack() as stack:
        scene = Scene(case, stack)
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        for count in counts:
            scene.take_at_once(count, scene.payload.check)
        for _ in range(rounds):
            for count in counts:
                seconds[count].append(scene.take_at_once(count, scene.payload.glance))
        found: dict[str, Any] = {"rounds": rounds, "bytes_verified": True}
        found |= {"total_bytes": scene.total_bytes, "block_bytes": case.layout.block_bytes}
        for count in counts:
            found[f"transfers_{count}_gb_per_s"] = rates(scene.total_bytes, seconds[count])
            if count != 1:
                found[f"transfers_{count}_to_1"] = ratios(seconds[1], seconds[count])
        return found
