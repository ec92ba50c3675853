"""A GPU as the daemon uses it: memory that others can open, pinned buffers, and streams to copy on.

Copies go over a stream of the thread that asks, and end with an event that this thread alone waits
for: no other thread's and no worker's work is waited for. torch is loaded with the first device.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from kvferry_daemon.memory.cuda_driver import DriverError, export
from kvferry_proto.worker import DeviceMemory

if TYPE_CHECKING:
    from torch import Tensor
    from torch.cuda import Event, Stream

log = logging.getLogger(__name__)


class DeviceError(OSError):
    """The device is not there, has no room, or failed; the message has the numbers."""


class NoRoom(DeviceError):
    """It has no memory for this just now; nothing is damaged."""


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
        self.arenas = threading.Lock()  # what was freed reaches the driver before the next is made
        try:
            self._device = torch.device(name)
            self.is_cuda = self._device.type == "cuda"
            if self.is_cuda:
                self._check_is_there()
            # The context comes with the first allocation; whether it still works is tried on it.
            self._spare = torch.empty(8, dtype=torch.uint8, device=self._device)
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(f"{name} cannot be used: {_words(error)}") from error

    @property
    def index(self) -> int | None:
        """N of cuda:N; None where there is no N."""
        index: int | None = self._device.index
        return index

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
        """Zeroed bytes; NoRoom with the numbers if the device has not so much left."""
        try:
            with self.arenas:
                self._check_room(size_bytes)
                arena = self.scratch(size_bytes)
        except self._torch.OutOfMemoryError as error:  # somebody was faster
            raise NoRoom(f"no {size_bytes} bytes of {self.name}: {_words(error)}") from error
        except RuntimeError as error:
            raise DeviceError(f"no {size_bytes} bytes of {self.name}: {_words(error)}") from error
        with self.copying():
            return arena.zero_()  # it may hold what another process left

    def _check_room(self, size_bytes: int) -> None:
        if not self.is_cuda:
            return
        self._torch.cuda.empty_cache()  # what earlier pools had
        free_bytes, total_bytes = self._torch.cuda.mem_get_info(self._device)
        if size_bytes > free_bytes:
            raise NoRoom(
                f"the pool needs {size_bytes} bytes of {self.name}, which has {free_bytes} "
                f"of {total_bytes} left; lower budget_bytes or pool_tokens"
            )

    def enter(self) -> None:
        """This thread works for this device; else what it begins may wake the first one, too."""
        if self.is_cuda:
            self._torch.cuda.set_device(self._device)

    def give_back(self) -> None:
        """Let other processes have what is not used any more, if the device still does that."""
        if not self.is_cuda:
            return
        try:
            self._torch.cuda.empty_cache()
        except RuntimeError as error:
            log.error("%s keeps what this process has freed: %s", self.name, _words(error))

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
        except self._torch.OutOfMemoryError as error:
            raise NoRoom(f"no room for a copy on {self.name}: {_words(error)}") from error
        except RuntimeError as error:
            raise DeviceError(f"a copy on {self.name} failed: {_words(error)}") from error

    def works(self) -> bool:
        """Whether the device still does anything for us: an error may have ended its context."""
        try:
            with self.copying():
                return self._spare.fill_(7).tolist() == [7] * 8
        except DeviceError as error:
            log.error("%s is of no use any more: %s", self.name, error)
            return False

    def _lane(self) -> _Lane:
        lane: _Lane | None = getattr(self._threads, "lane", None)
        if lane is None:
            self.enter()
            cuda = self._torch.cuda
            lane = _Lane(cuda.Stream(self._device), cuda.Event(blocking=True))
            self._threads.lane = lane
        return lane


def _words(error: Exception) -> str:
    """The first line: the others are advice on how to debug kernels."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
