"""Gather and scatter of all layers beside one plain copy of as many bytes, on one device.

A *row* is what an engine's block holds of one plane; a pool's block has the same tokens, so rows are
in one piece on both sides. Blocks are scattered on both. Rates count bytes read and bytes written.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.figures import rates, ratios
from bench.payload import HEADS, LAYERS, llama
from kvferry_client.paged import CachePlane, PagedCache, PagedCopy, PagedPool
from kvferry_client.views import Run

TOTAL_BYTES = 1 << 30
ROWS_BYTES = (8 << 10, 64 << 10, 256 << 10, 1 << 20)
ROUNDS = 7
CALLS = 10  # between two looks at the clock: what one costs to start hides behind the one before


class Window(NamedTuple):
    """All tokens, in blocks that are no neighbours."""

    first_token: int
    end_token: int
    runs: list[Run]


class Scene:
    """A cache of random bytes, a pool as large, and two plain tensors."""

    def __init__(self, device: torch.device, layers: int, total_bytes: int, row_bytes: int) -> None:
        size = row_bytes // llama(layers=1).planes[0].token_bytes
        self.layout = llama(HEADS, size, layers)
        self.device = device
        self.blocks = total_bytes // self.layout.block_bytes
        self.total_bytes = self.blocks * self.layout.block_bytes
        chance = np.random.default_rng(3)
        self.table = chance.permutation(self.blocks)
        self.order = chance.permutation(self.blocks)
        runs = [Run(at * size, int(block), 1) for at, block in enumerate(self.order)]
        self.window = Window(0, self.blocks * size, runs)
        self.planes = {plane.name: self._noise(size) for plane in self.layout.planes}
        cache = PagedCache({name: CachePlane(tensor) for name, tensor in self.planes.items()})
        shape = (self.blocks, self.layout.block_bytes)
        self.pool = PagedPool(torch.zeros(shape, dtype=torch.uint8, device=device), self.layout)
        self.paged = PagedCopy(cache, self.pool)
        self.plain = torch.ones(self.total_bytes // 8, dtype=torch.int64, device=device)
        self.plain_out = torch.zeros_like(self.plain)

    def _noise(self, size: int) -> torch.Tensor:
        shape = (self.blocks, size, *self.layout.planes[0].shape)
        words = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device=self.device)
        return words.view(torch.bfloat16)

    def copy(self) -> None:
        """The yardstick."""
        self.plain_out.copy_(self.plain)

    def gather(self) -> None:
        """Cache to window."""
        self.paged.gather(self.table, self.window, 0, self.window.end_token)

    def scatter(self) -> None:
        """Window to cache."""
        self.paged.scatter(self.table, self.window, 0, self.window.end_token)

    def check(self) -> None:
        """Every byte, both ways: nothing but the other side can have brought it."""
        table, order = (
            torch.from_numpy(blocks).to(self.device) for blocks in (self.table, self.order)
        )
        self.pool.memory.zero_()
        self.gather()
        for plane in self.layout.planes:
            there = self.pool.plane(plane).view(torch.int16)[order]
            cached = self.planes[plane.name].view(torch.int16)
            assert torch.equal(there, cached[table]), f"{plane.name} was not gathered"
            cached.zero_()
        self.scatter()
        for plane in self.layout.planes:
            there = self.pool.plane(plane).view(torch.int16)[order]
            cached = self.planes[plane.name].view(torch.int16)
            assert there.any(), "zeros prove nothing"
            assert torch.equal(there, cached[table]), f"{plane.name} was not scattered"


def measure_on(
    device: torch.device,
    total_bytes: int = TOTAL_BYTES,
    rows_bytes: tuple[int, ...] = ROWS_BYTES,
    rounds: int = ROUNDS,
    layers: int = LAYERS,
) -> dict[str, Any]:
    """Every size of rows: copy, gather and scatter in turn."""
    found: dict[str, Any] = {"rounds": rounds, "device": _name(device)}
    for row_bytes in rows_bytes:
        scene = Scene(device, layers, total_bytes, row_bytes)
        scene.check()
        seconds: dict[str, list[float]] = {"copy": [], "gather": [], "scatter": []}
        for _ in range(rounds):
            for name, spent in seconds.items():
                spent.append(_seconds(getattr(scene, name), device))
        scene.check()
        moved = 2 * scene.total_bytes
        found[f"{row_bytes >> 10}_KiB"] = {
            **{f"{name}_gb_per_s": rates(moved, spent) for name, spent in seconds.items()},
            "gather_to_copy": ratios(seconds["copy"], seconds["gather"]),
            "scatter_to_copy": ratios(seconds["copy"], seconds["scatter"]),
        }
        found["total_bytes"] = scene.total_bytes
    return {**found, "bytes_verified": True}


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """What one call takes, of several in a row; in host memory there is no queue, and one will do."""
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    timed = {"enable_timing": True}
    begin, end = torch.cuda.Event(**timed), torch.cuda.Event(**timed)  # type: ignore[no-untyped-call]
    call()
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / CALLS


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
