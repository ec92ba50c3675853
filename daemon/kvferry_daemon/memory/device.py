"""Device memory of a pool: one arena in a GPU, and the copies between it and the host.

Copies go over a stream of the thread that asks, and end with an event that this thread alone waits
for: no other thread's and no worker's work is waited for. torch is loaded with the first device.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import TYPE_CHECKING, NamedTuple, Self

from kvferry_daemon.memory.cuda_driver import DriverError, export
from kvferry_daemon.memory.slices import Area, SlicePlan, Strided
from kvferry_daemon.memory.spans import Span
from kvferry_proto.worker import DeviceMemory

if TYPE_CHECKING:
    from torch import Tensor
    from torch.cuda import Event, Stream

SEGMENT_BYTES = 2 << 20  # torch's allocator gives what is a multiple of this ...
SEGMENT_BYTES_MIN = 20 << 20  # ... and not less than this an allocation of the driver's own
ITEM_BYTES_MAX = 8
log = logging.getLogger(__name__)


class DeviceError(OSError):
    """The device is not there, has no room, or failed; the message has the numbers."""


class NotShared(DeviceError):
    """There is memory, but other processes cannot open it."""


class _Lane(NamedTuple):
    """A thread's own stream, and the event behind its last copy."""

    stream: Stream
    event: Event


class Device:
    """One GPU as this process uses it. Tests use ``cpu``, where streams and events are nothing."""

    def __init__(self, name: str) -> None:
        """Begin with ``cuda:N``; DeviceError says what is missing."""
        try:
            import torch
        except ImportError as error:
            raise DeviceError(f"{name} needs torch, or set device=host: {error}") from error
        self.name = name
        self._torch = torch
        self._threads = threading.local()
        try:
            self._device = torch.device(name)
            self.is_cuda = self._device.type == "cuda"
            if self.is_cuda:
                self._check_is_there()
            torch.empty(1, device=self._device)  # the context comes with the first allocation
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(f"{name} cannot be used: {_words(error)}") from error

    def _check_is_there(self) -> None:
        torch = self._torch
        if torch.version.cuda is None:
            raise DeviceError(
                f"{self.name}: torch {torch.__version__} is built without CUDA; install one that "
                "is built with it, or set device=host"
            )
        count = torch.cuda.device_count()
        if self._device.index >= count:
            there = ", ".join(f"cuda:{index}" for index in range(count)) or "none at all"
            raise DeviceError(
                f"{self.name} does not exist; CUDA devices that this process sees: {there}. Name "
                "one of them, or set device=host"
            )

    def allocate(self, size_bytes: int) -> Tensor:
        """Zeroed bytes; DeviceError with the numbers if the device has not so much left."""
        torch = self._torch
        try:
            if self.is_cuda:
                torch.cuda.empty_cache()  # what earlier pools had
                free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
                if size_bytes > free_bytes:
                    raise DeviceError(
                        f"the pool needs {size_bytes} bytes of {self.name}, which has {free_bytes} "
                        f"of {total_bytes} left; lower budget_bytes or pool_tokens"
                    )
            arena = self.scratch(size_bytes)
        except RuntimeError as error:
            raise DeviceError(f"no {size_bytes} bytes of {self.name}: {_words(error)}") from error
        with self.copying():
            return arena.zero_()  # it may hold what another process left

    def give_back(self) -> None:
        """Let other processes have what is not used any more."""
        if self.is_cuda:
            self._torch.cuda.empty_cache()

    def shared(self, arena: Tensor) -> DeviceMemory | None:
        """How workers open an arena; NotShared if they cannot. None: not a GPU's.

        A handle opens the whole allocation: were there anything else in it, its workers could
        read that too.
        """
        if not self.is_cuda:
            return None
        address, size_bytes = arena.data_ptr(), arena.numel()
        try:
            found = export(self._device.index, address)
        except DriverError as error:
            raise NotShared(
                f"workers cannot open memory of {self.name} ({error}); the driver allows it neither "
                "with expandable_segments or cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF, nor in some "
                "virtual machines and containers: unset the variable, or set device=host"
            ) from error
        if (found.base, found.size_bytes) != (address, size_bytes):
            raise NotShared(
                f"torch placed {size_bytes} bytes within an allocation of {found.size_bytes}; unset "
                "PYTORCH_CUDA_ALLOC_CONF, or set device=host"
            )
        return DeviceMemory(device=self.name, uuid=found.uuid, handle=found.handle)

    def buffer(self, size_bytes: int) -> memoryview:
        """Host memory that the GPU copies from and to by itself: pinned, if that can be had."""
        torch = self._torch
        if self.is_cuda:
            try:
                with torch.cuda.device(self._device):  # else the first one gets a context, too
                    pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                log.warning("copies will be slower, %d bytes not pinned: %s", size_bytes, error)
            else:
                return memoryview(pinned.numpy())
        return memoryview(bytearray(size_bytes))

    def scratch(self, size_bytes: int) -> Tensor:
        """Device memory for the copies of one ``copying``."""
        return self._torch.empty(size_bytes, dtype=self._torch.uint8, device=self._device)

    def staged(self, buffer: memoryview) -> Tensor:
        """A buffer of the host as a tensor, no copy."""
        return self._torch.frombuffer(buffer, dtype=self._torch.uint8)

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """What is begun inside is done when it ends; DeviceError if the device failed."""
        try:
            if not self.is_cuda:
                yield
                return
            lane = self._lane()
            with self._torch.cuda.stream(lane.stream):
                try:
                    yield
                finally:  # also of a copy that failed: those before it still touch their memory
                    lane.event.record(lane.stream)
                    lane.event.synchronize()  # without the GIL
        except RuntimeError as error:
            raise DeviceError(f"a copy on {self.name} failed: {_words(error)}") from error

    def works(self) -> bool:
        """Whether the device still does anything for us: an error may have ended its context."""
        try:
            with self.copying():
                return self.scratch(8).fill_(7).tolist() == [7] * 8
        except DeviceError as error:
            log.error("%s is of no use any more: %s", self.name, error)
            return False

    def _lane(self) -> _Lane:
        lane: _Lane | None = getattr(self._threads, "lane", None)
        if lane is None:
            cuda = self._torch.cuda
            lane = _Lane(cuda.Stream(self._device), cuda.Event(blocking=True))
            self._threads.lane = lane
        return lane


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


class DeviceSpans:
    """Byte ranges of a device pool, copied one by one."""

    def __init__(self, pool: DevicePool, spans: Sequence[Span]) -> None:
        self._pool = pool
        self._spans = spans
        self.payload_bytes = sum(length for _, length in spans)

    def gather(self, out: memoryview) -> None:
        """Fill ``out``, of exactly ``payload_bytes``, from the pool; DeviceError."""
        with self._pool.copying():
            for in_pool, staged in self._pairs(out):
                staged.copy_(in_pool, non_blocking=True)

    def scatter(self, data: memoryview) -> None:
        """Write ``data``, exactly ``payload_bytes``, into the pool; DeviceError."""
        with self._pool.copying():
            for in_pool, staged in self._pairs(data):
                in_pool.copy_(staged, non_blocking=True)

    def _pairs(self, buffer: memoryview) -> Iterator[tuple[Tensor, Tensor]]:
        _check_size(self.payload_bytes, buffer)
        arena, staged = self._pool.arena, self._pool.device.staged(buffer)
        at = 0
        for offset, length in self._spans:
            yield arena[offset : offset + length], staged[at : at + length]
            at += length


class DeviceSlices:
    """Slices of blocks: collected in the device, so that one copy crosses to the host."""

    def __init__(self, pool: DevicePool, plan: SlicePlan, areas: list[Area], tokens: int) -> None:
        self._pool = pool
        self._plan = plan
        self._areas = areas
        self.payload_bytes = plan.chunk_bytes(tokens)

    def gather(self, out: memoryview) -> None:
        """Fill ``out``, of exactly ``payload_bytes``, from the pool; DeviceError."""
        _check_size(self.payload_bytes, out)
        device = self._pool.device
        with self._pool.copying():
            chunk = device.scratch(self.payload_bytes)
            for in_pool, in_chunk in self._pairs(chunk):
                in_chunk.copy_(in_pool)
            device.staged(out).copy_(chunk, non_blocking=True)

    def scatter(self, data: memoryview) -> None:
        """Write ``data``, exactly ``payload_bytes``, into the pool; DeviceError."""
        _check_size(self.payload_bytes, data)
        device = self._pool.device
        with self._pool.copying():
            chunk = device.scratch(self.payload_bytes)
            chunk.copy_(device.staged(data), non_blocking=True)
            for in_pool, in_chunk in self._pairs(chunk):
                in_pool.copy_(in_chunk)

    def _pairs(self, chunk: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        arena = self._pool.arena
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


def _words(error: Exception) -> str:
    """The first line: the others are advice on how to debug kernels."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
