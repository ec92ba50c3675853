"""1 GiB handed over within one daemon, and a worker's reading of a window beside memcpy.

The payload is ready before the clock starts; a handoff's time is from `receive` until the sink
worker sees Success. Its blocks must be the source's own, in the same places, and no byte received.
"""

import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import rates, ratios, spread
from bench.payload import Payload, llama, numbered
from bench.served import ServedDaemon
from bench.source_worker import has_succeeded, let_go, offer, wait_all
from bench.wire import Words, mapped
from kvferry_client import Client, Layout, Receiving, Role, connect
from kvferry_client.arrays import empty_array
from kvferry_proto import worker

ROUNDS = 11
TOKENS = 8192
READ_TOKENS = 2048


class Scene:
    """One daemon with room for both sides' share, and a worker of either side here."""

    def __init__(self, layout: Layout, tokens: int, stack: ExitStack) -> None:
        root = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        self.layout, self.tokens = layout, tokens
        self.total_bytes = tokens * layout.token_bytes
        self.daemon = stack.enter_context(
            ServedDaemon(
                Path(root) / "daemon",
                pool_tokens=2 * tokens,
                window_tokens=tokens,
                budget_bytes=2 * self.total_bytes + (64 << 20),
            )
        )
        self.workers: dict[str, Client] = {
            name: stack.enter_context(connect(self.daemon.directory, layout, name))
            for name in ("source", "sink")
        }
        self.payload = Payload(self.workers["sink"].pool.info, layout)

    def offer(self, name: str) -> list[worker.Snapshot]:
        """A payload that is ready to be pulled."""
        return list(offer(self.workers["source"], self.payload, self.layout, [name], self.tokens))

    def receive(self, name: str) -> Receiving:
        """The sink side."""
        return self.workers["sink"].receive(name, window_tokens=self.tokens)

    def over(self, ready: list[worker.Snapshot]) -> None:
        """It has been received, and is released."""
        wait_all(self.workers["source"], ready, has_succeeded)
        let_go(self.workers["source"], Role.SOURCE, [one.transfer_id for one in ready])


def measure(
    layout: Layout | None = None, tokens: int = TOKENS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Handoffs, one after the other; the first one is not counted."""
    with ExitStack() as stack:
        scene = Scene(layout or llama(), tokens, stack)
        seconds = []
        for number in range(rounds + 1):
            ready = scene.offer(f"bench-{number}")
            begun = time.monotonic()
            receiving = scene.receive(f"bench-{number}")
            receiving.wait()
            seconds.append(time.monotonic() - begun)
            assert receiving.snapshot.runs == ready[0].runs, "the blocks are not the source's"
            scene.payload.check(numbered(receiving.snapshot.runs, 0, scene.layout))
            receiving.release()
            scene.over(ready)
        counters = scene.daemon.status().counters
    return {
        "rounds": rounds,
        "bytes_verified": True,
        "total_bytes": scene.total_bytes,
        "microseconds": spread(one * 1e6 for one in seconds[1:]),
        "bytes_copied": counters.get("bytes_copied", 0) + counters.get("bytes_received", 0),
        "blocks_handed_over": counters["blocks_handed_over"],
    }


def measure_reading(
    layout: Layout | None = None, tokens: int = READ_TOKENS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """`WindowView.gather` of every plane into the worker's own arrays, in turn with memcpy.

    In one copy or a block at a time, whichever was faster: above some size, which a machine's cache
    decides, libc stores past the caches, which is faster on some machines and far slower on others.
    """
    with ExitStack() as stack:
        scene = Scene(layout or llama(), tokens, stack)
        ready = scene.offer("bench")
        receiving = scene.receive("bench")
        receiving.wait()
        (window,) = receiving.windows()
        planes = scene.layout.planes
        words = mapped(scene.workers["sink"].pool.info)
        runs = receiving.snapshot.runs
        singly = [(first + at, 1) for first, count in runs for at in range(count)]
        # The same pages are the target of both, or one of them would have the warmer ones.
        blocks = tokens // scene.layout.block_size_tokens
        flat = empty_array((blocks, words.shape[1]), np.dtype(np.uint64))
        outs = flat.view(np.uint16).reshape(len(planes), tokens, *planes[0].shape)
        seconds: dict[str, list[float]] = {"memcpy": [], "read": []}
        for number in range(rounds + 1):
            copied_s = min(_copy(flat, words, runs), _copy(flat, words, singly))
            begun = time.monotonic()
            for plane, out in zip(planes, outs, strict=True):
                window.gather(plane.name, out)
            read = time.monotonic()
            if number:
                seconds["memcpy"].append(copied_s)
                seconds["read"].append(read - begun)
        scene.payload.check_planes(outs, scene.layout)
        receiving.release()
        scene.over(ready)
    return {
        "rounds": rounds,
        "bytes_verified": True,
        "total_bytes": scene.total_bytes,
        "memcpy_gb_per_s": rates(scene.total_bytes, seconds["memcpy"]),
        "read_gb_per_s": rates(scene.total_bytes, seconds["read"]),
        "read_to_memcpy": ratios(seconds["memcpy"], seconds["read"]),
    }


def _copy(flat: Words, words: Words, runs: Iterable[tuple[int, int]]) -> float:
    """Copy blocks, one copy a run; seconds."""
    begun, row = time.monotonic(), 0
    for first, count in runs:
        flat[row : row + count] = words[first : first + count]
        row += count
    return time.monotonic() - begun
