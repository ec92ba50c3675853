"""A pool in a device's memory: one arena, and the copies between it and a thread's buffer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import TYPE_CHECKING, Self

from kvferry_daemon.memory.device import Device, DeviceError, NoRoom
from kvferry_daemon.memory.slices import Area, SlicePlan, Strided
from kvferry_daemon.memory.spans import Span

if TYPE_CHECKING:
    from torch import Tensor

SEGMENT_BYTES = 2 << 20  # torch's allocator gives what is a multiple of this ...
SEGMENT_BYTES_MIN = 20 << 20  # ... and not less than this an allocation of the driver's own
ITEM_BYTES_MAX = 8
OnBroken = Callable[[str, bool], None]  # what happened; whether the device can still be used


class DevicePool:
    """``blocks`` blocks of ``block_bytes`` each in one arena."""

    def __init__(
        self, device: Device, arena: Tensor, block_bytes: int, blocks: int, on_broken: OnBroken
    ) -> None:
        self.device = device
        self.block_bytes = block_bytes
        self.blocks = blocks
        self.memory = device.shared(arena)
        self._arena: Tensor | None = arena
        self._on_broken = on_broken

    @classmethod
    def create(cls, device: Device, block_bytes: int, blocks: int, on_broken: OnBroken) -> Self:
        """Allocate the arena, zeroed. Raises DeviceError with the numbers, or NotShared.

        ``on_broken`` is called in the thread whose copy failed, before that raises DeviceError.
        """
        size = (
            max(block_bytes * blocks, SEGMENT_BYTES_MIN) if device.is_cuda else block_bytes * blocks
        )
        arena = device.allocate(-(-size // SEGMENT_BYTES) * SEGMENT_BYTES)
        return cls(device, arena, block_bytes, blocks, on_broken)

    @property
    def address(self) -> int:
        """Of the first block, in the device."""
        return self.arena.data_ptr()

    @property
    def cuda_index(self) -> int | None:
        """Which CUDA device it is in; None in the tests' stand-in."""
        return self.device.index

    @property
    def size_bytes(self) -> int:
        """Bytes of all blocks; the arena may be larger."""
        return self.block_bytes * self.blocks

    @property
    def arena(self) -> Tensor:
        """All blocks, and padding behind them: uint8."""
        assert self._arena is not None, "removed: nobody can use it any more"
        return self._arena

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """As the device's, and a failure is told."""
        try:
            with self.device.copying():
                yield
        except NoRoom:
            raise  # it ends a connection, not the pool: what was asked for there is asked for again
        except DeviceError as error:
            self._on_broken(str(error), self.device.works())
            raise

    def zero(self, first_block: int, blocks: int) -> None:
        """Wipe neighbouring blocks; DeviceError."""
        with self.copying():
            self._bytes(first_block * self.block_bytes, blocks * self.block_bytes).zero_()

    def spans(self, spans: Sequence[Span]) -> DeviceSpans:
        """These byte ranges, one behind the other; IndexError if they are not in the pool."""
        for offset, length in spans:
            self._check_inside(offset, length)
        return DeviceSpans(self, spans)

    def remove(self) -> None:
        """Free the arena."""
        with self.device.arenas:
            self._arena = None
            self.device.give_back()

    def _bytes(self, offset_bytes: int, length_bytes: int) -> Tensor:
        self._check_inside(offset_bytes, length_bytes)
        return self.arena[offset_bytes : offset_bytes + length_bytes]

    def _check_inside(self, offset_bytes: int, length_bytes: int) -> None:
        if not 0 <= offset_bytes <= offset_bytes + length_bytes <= self.size_bytes:
            raise IndexError(
                f"{length_bytes} bytes at {offset_bytes} are not in a pool of {self.size_bytes}"
            )


class DevicePlace:
    """Bytes in a device pool that are one chunk on the wire."""

    payload_bytes: int

    def __init__(self, pool: DevicePool) -> None:
        self.pool = pool

    def copy_to(self, sink: DevicePlace) -> None:
        """Copy into another place of the same device: no byte crosses the bus; DeviceError.

        Through a chunk in the device, as both are cut in other places: each side's failure is its own.
        """
        with self.pool.copying():
            chunk = self.pool.device.scratch(self.payload_bytes)
            self._collect(chunk)
        with sink.pool.copying():
            sink._spread(chunk)

    def _collect(self, chunk: Tensor) -> None:
        for in_pool, in_chunk in self._pairs(chunk):
            in_chunk.copy_(in_pool, non_blocking=True)

    def _spread(self, chunk: Tensor) -> None:
        for in_pool, in_chunk in self._pairs(chunk):
            in_pool.copy_(in_chunk, non_blocking=True)

    def _pairs(self, chunk: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError


class DeviceSpans(DevicePlace):
    """Byte ranges of a device pool, copied one by one."""

    def __init__(self, pool: DevicePool, spans: Sequence[Span]) -> None:
        super().__init__(pool)
        self._spans = spans
        self.payload_bytes = sum(length for _, length in spans)

    def gather(self, out: memoryview) -> None:
        """Fill ``out``, of exactly ``payload_bytes``, from the pool; DeviceError."""
        _check_size(self.payload_bytes, out)
        with self.pool.copying():
            self._collect(self.pool.device.staged(out))

    def scatter(self, data: memoryview) -> None:
        """Write ``data``, exactly ``payload_bytes``, into the pool; DeviceError."""
        _check_size(self.payload_bytes, data)
        with self.pool.copying():
            self._spread(self.pool.device.staged(data))

    def _pairs(self, chunk: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        arena = self.pool.arena
        at = 0
        for offset, length in self._spans:
            yield arena[offset : offset + length], chunk[at : at + length]
            at += length


class DeviceSlices(DevicePlace):
    """Slices of blocks: collected in the device, so that one copy crosses to the host."""

    def __init__(self, pool: DevicePool, plan: SlicePlan, areas: list[Area], tokens: int) -> None:
        super().__init__(pool)
        self._plan = plan
        self._areas = areas
        self.payload_bytes = plan.chunk_bytes(tokens)

    def gather(self, out: memoryview) -> None:
        """Fill ``out``, of exactly ``payload_bytes``, from the pool; DeviceError."""
        _check_size(self.payload_bytes, out)
        device = self.pool.device
        with self.pool.copying():
            chunk = device.scratch(self.payload_bytes)
            self._collect(chunk)
            device.staged(out).copy_(chunk, non_blocking=True)

    def scatter(self, data: memoryview) -> None:
        """Write ``data``, exactly ``payload_bytes``, into the pool; DeviceError."""
        _check_size(self.payload_bytes, data)
        device = self.pool.device
        with self.pool.copying():
            chunk = device.scratch(self.payload_bytes)
            chunk.copy_(device.staged(data), non_blocking=True)
            self._spread(chunk)

    def _pairs(self, chunk: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        arena = self.pool.arena
        for one in self._plan.strided(self._areas):
            item = _item_bytes(one)
            yield (
                _view(arena, item, one.shape, one.pool_at, one.in_pool),
                _view(chunk, item, one.shape, one.chunk_at, one.in_chunk),
            )


def _item_bytes(one: Strided) -> int:
    """The largest items that all of it can be cut into; unlike numpy torch has none in between."""
    numbers = (one.shape[-1], one.pool_at, *one.in_pool[:-1], one.chunk_at, *one.in_chunk[:-1])
    return gcd(ITEM_BYTES_MAX, *numbers)


def _view(
    flat: Tensor, item: int, shape: tuple[int, ...], at: int, strides: tuple[int, ...]
) -> Tensor:
    import torch

    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[item]
    whole = flat[: flat.numel() // item * item].view(dtype)
    items = (*shape[:-1], shape[-1] // item)
    return whole.as_strided(items, (*(step // item for step in strides[:-1]), 1), at // item)


def _check_size(payload_bytes: int, buffer: memoryview) -> None:
    if len(buffer) != payload_bytes:
        raise ValueError(f"a chunk of {payload_bytes} bytes in {len(buffer)}")
